"""Does distillation pay where steps are few? `python -m bench.lab.few_steps --run runs/demo [--figures F]`.

What a demo has distilled, sampled in 8, 4 and 2 steps: teachers with the acceleration LoRA, the coarse student with it
(no distillation at all), and the collection, on the same held-out scenes with the same noise. Differences are paired,
to the coarse student in as many steps.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from bench.lab.study import Images, machine, write_figures
from clora.config import acceleration_lora, load_config
from clora.distill.run import open_bank
from clora.distill.workspace import open_base
from clora.evaluate.baselines import ACCELERATION, COARSE, COLLECTION, methods
from clora.evaluate.exact import evaluate_methods
from clora.jobs.demo import encode_held_out, sample_held_out
from clora.lora.files import read_lora
from clora.tiny.dataset import EVAL_SCENES

STEPS = (8, 4, 2)
CONTROL = "coarse+accel"
WHO = ("teacher+accel", CONTROL, "collection")


def sample(run: Path) -> dict[str, Images]:
    """Images of every method and number of steps; the teachers as their targets are made come first."""
    config, console = load_config(run / "config.yaml"), Console(stderr=True)
    scenes = {EVAL_SCENES + i: path for i, path in enumerate(sorted((run / "data" / "held_out").glob("*.png")))}
    workspace = open_base(config, console)
    examples = encode_held_out(workspace, scenes)
    files = {COLLECTION: run / "collection.safetensors", COARSE: run / "coarse.safetensors"}
    if (fast := acceleration_lora(config.base.model)) is not None:
        files[ACCELERATION] = fast
    for slot, path in files.items():
        workspace.adapters.add_lora(slot, read_lora(path, workspace.adapters.module_shapes).modules)
    bank = open_bank(workspace)
    assert bank is not None
    known = {method.name: method for method in methods(config, bank, files)}
    chosen = [next(iter(known.values()))]
    for steps in STEPS:
        for name in WHO:
            sampling = replace(known[name].sampling, num_steps=steps)
            chosen.append(replace(known[name], name=f"{name}, {steps} steps", sampling=sampling))
    found = {}
    for method in chosen:
        console.print(f"sampling {method.name}")
        images, _ = sample_held_out(workspace, method, examples)
        found[method.name] = {key: [image] for key, image in images.items()}
    return found


def table(images: dict[str, Images]) -> list[dict[str, Any]]:
    """Figures of every row; the differences are those to `CONTROL` in as many steps."""
    rows = []
    for steps in STEPS:
        control = f"{CONTROL}, {steps} steps"
        chosen = {name: one for name, one in images.items() if name.endswith(f", {steps} steps")}
        if steps == STEPS[0]:
            chosen = {name: one for name, one in images.items() if "," not in name} | chosen  # the teachers' own row
        for name, scores in evaluate_methods(chosen, reference=control).items():
            row: dict[str, Any] = {"row": name, "bcr": round(scores.bcr, 3)}
            row["interval"] = [round(x, 3) for x in scores.bcr_interval]
            row |= {"vsa": round(scores.vsa, 2), "detail_error_db": round(scores.detail_error, 2)}
            row["psnr"] = None if scores.psnr is None else round(scores.psnr, 2)
            row["reasons"] = scores.reasons
            row["to_control"] = {
                key: {"mean": round(gap.mean, 3), "interval": gap.interval and [round(x, 3) for x in gap.interval]}
                for key, gap in scores.differences.items()
            }
            rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="folder of a demo that has distilled")
    parser.add_argument("--figures", type=Path, help="write the table as JSON")
    arguments = parser.parse_args()
    started = time.perf_counter()
    rows = table(sample(arguments.run.resolve()))
    figures = {
        "command": "python -m bench.lab.few_steps --run runs/demo",
        "machine": machine(),
        "seconds": round(time.perf_counter() - started),
        "rows": rows,
    }
    write_figures(arguments.figures, figures)


if __name__ == "__main__":
    main()

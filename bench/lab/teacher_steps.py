"""Does the tiny world need a sampler? `python -m bench.lab.teacher_steps --run runs/demo [--figures F] [--picture F]`.

The teachers of a finished demo, sampled with 1, 2, 8 and 40 Euler steps on held-out scenes, four noises each, and
scored against the truth. A world in which one step were as good as forty could not tell a distilled student from a
regression. The picture shows one scene of each random effect.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from clora.config import load_config
from clora.data.image_grid import Pixels, grid_image, to_uint8
from clora.distill.run import open_bank
from clora.distill.workspace import open_base
from clora.evaluate.baselines import Method, sample_examples
from clora.evaluate.exact import MethodScores, Pair, evaluate_methods
from clora.inference.sampling import teacher_sampling
from clora.jobs.demo_samples import encode_held_out
from clora.tiny.dataset import EVAL_SCENES
from clora.tiny.effects import EFFECTS, apply_effect
from clora.tiny.world.scenes import render, sample_scene

STEPS = (1, 2, 8, 40)
SEEDS = (0, 1, 2, 3)
Images = dict[Pair, list[Pixels]]


def sample(run: Path, num_scenes: int) -> dict[int, Images]:
    """uint8 images of every effect on every scene by number of steps, one per seed."""
    config, console = load_config(run / "config.yaml"), Console(stderr=True)
    workspace = open_base(config, console)
    bank = open_bank(workspace)
    assert bank is not None
    scenes = {EVAL_SCENES + i: run / "data" / "held_out" / f"{i:03d}.png" for i in range(num_scenes)}
    examples = encode_held_out(workspace, scenes)
    keys = list(examples)
    found: dict[int, Images] = {}
    for steps in STEPS:
        console.print(f"{steps} steps")
        sampling = replace(teacher_sampling(config), num_steps=steps, guidance=1.0)
        method = Method(f"{steps} steps", 1, sampling, "teacher", bank.slots_for)
        images = found.setdefault(steps, {})
        for seed in SEEDS:
            seeds, size = [seed] * len(examples), config.eval.batch_size
            for place, image in sample_examples(workspace.backbone, method, list(examples.values()), seeds, size):
                images.setdefault(keys[place], []).append(to_uint8(image))
    return found


def row(scores: MethodScores, kind: str) -> dict[str, Any]:
    """The figures of one number of steps over the random or the other effects."""
    chosen = {name: one for name, one in scores.per_effect.items() if EFFECTS[name].random == (kind == "random")}
    figures: dict[str, Any] = {"effects": kind}
    for name in ("bcr", "psnr", "energy_distance", "hf_ratio"):
        values = [value for one in chosen.values() if (value := getattr(one, name)) is not None]
        figures[name] = round(float(np.mean(values)), 3) if values else None
    return figures


def picture(images: dict[int, Images], path: Path) -> None:
    """Source, truth and every number of steps, one scene for each random effect."""
    names = sorted({effect for effect, _ in images[STEPS[0]] if EFFECTS[effect].random})
    rows: list[list[Pixels | None]] = []
    for name in names:
        rendered = render(sample_scene(EVAL_SCENES))
        truth = apply_effect(EFFECTS[name], rendered, np.random.default_rng(0))
        rows.append([rendered.image_HW3, truth, *(images[steps][name, EVAL_SCENES][0] for steps in STEPS)])
    columns = ["source", "a truth", *(f"{steps} step{'s' if steps > 1 else ''}" for steps in STEPS)]
    grid_image(rows, columns, names).save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="folder of a finished demo")
    parser.add_argument("--scenes", type=int, default=4)
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--figures", type=Path, help="write the table as JSON")
    arguments = parser.parse_args()
    images = sample(arguments.run, arguments.scenes)
    scores = evaluate_methods({str(steps): images[steps] for steps in STEPS})
    rows = [{"steps": steps, **row(scores[str(steps)], kind)} for kind in ("random", "exact") for steps in STEPS]
    if arguments.picture:
        picture(images, arguments.picture)
    if arguments.figures:
        figures = {"seeds": len(SEEDS), "scenes": arguments.scenes, "rows": rows}
        arguments.figures.write_text(json.dumps(figures, indent=1) + "\n")
    for one in rows:
        print("  ".join(f"{key} {value}" for key, value in one.items()))


if __name__ == "__main__":
    main()

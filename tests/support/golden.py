"""Golden curves: every figure of twenty steps of a tiny fp32 job, for each preset and stage, in `tests/golden/*.json`.

`tests/distill/test_golden.py` holds the code to them, so that a change of numerics is a change of those files. Where a
change is meant, write them anew and say why in the commit:

    python -m tests.support.golden --write [CASE ...]

Between them the presets also cover what a job may turn on: `clora` accumulates gradients over two batches and has an
acceleration LoRA, `tiny` follows its teachers' velocities in the coarse stage, lets the critic reuse the student's
samples and extends with accelerated teachers. The recipes of imitation run without a critic or with one that reuses,
and `same_step` with accelerated teachers.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import torch
from rich.console import Console

from clora.backbones.load import linear_shapes
from clora.config import PRESETS, Config, build_config, load_preset
from clora.jobs.extend import extend
from clora.jobs.train import train
from clora.lora.catalogue import Catalogue, CatalogueEntry, CatalogueSchedule, write_collection
from clora.lora.files import write_lora
from clora.lora.module import LoraModule
from clora.training.tracker import read_log
from tests.support.random_base import write_random_base
from tests.support.small_job import NAMES, job_values, write_dataset

FOLDER = Path(__file__).resolve().parents[1] / "golden"
STAGES = ("coarse", "full", "extend")
RECIPES = {"segment_mean": 0, "same_step": 0, "imitation_dmd": 1}  # critic updates; the coarse stage is that of all
CASES = (
    *(f"{preset}-{stage}" for preset in PRESETS if preset not in RECIPES for stage in STAGES),
    *(f"{preset}-full" for preset in RECIPES),
)
STEPS = 20
NUM_STEPS = 3  # of the few-step schedule
TARGETS = ("to_q", "add_k_proj", "img_mlp.net.2", "img_mod.1")
Curves = dict[str, list[float | None]]

# AdamW makes a whole step of a gradient that is nothing but rounding; so large an epsilon keeps it small.
TRAIN = {
    "adam_epsilon": 1e-4,
    "max_train_steps": STEPS,
    "critic_updates": 2,
    "critic_reuse": False,
    "gradient_accumulation_steps": 1,
    "batch_size": 2,
    "anchor_batch_size": 3,
    "learning_rate": 0.01,
    "coarse_learning_rate": 0.02,
    "critic_learning_rate": 0.02,
    "max_grad_norm": 1.0,
    "lr_scheduler": "constant",
    "lr_warmup_steps": 2,
    "ema_start": 0,
    "kernels": "reference",
    "gradient_checkpointing": False,
    "sample_steps": 0,
    "log_every": 1,
    "checkpointing_steps": 1000,
}
EXTEND = {
    "rank": 3,
    "max_train_steps": STEPS,
    "coarse_steps": 8,
    "learning_rate": 0.01,
    "coarse_learning_rate": 0.02,
    "coarse_optimizer": "adamw",
    "lr_warmup_steps": 2,
    "anchor_batch_size": 3,
    "rehearsal_share": 0.5,
    "rehearsal_weight": 5.0,
    "rehearsal_sources": 2,
}


def write_inputs(folder: Path) -> Path:
    """A random base, pairs, two teachers, an acceleration LoRA, and a collection of two other effects."""
    base = write_random_base(folder / "base", num_layers=1)
    write_dataset(folder / "data")
    (folder / "cache").mkdir()
    shapes = linear_shapes(base)
    for seed, name in enumerate((*NAMES, "fast")):
        write_lora(folder / f"{name}.safetensors", _random_modules(shapes, seed, rank=2), dtype=torch.float32)
    entries = [
        CatalogueEntry(name="first", trigger="<first>", student_prompt="paint it"),
        CatalogueEntry(name="second", trigger="<second>", student_prompt="make it old"),
    ]
    catalogue = Catalogue(base=str(base), schedule=CatalogueSchedule(num_steps=NUM_STEPS, shift=3.0), effects=entries)
    modules = _random_modules(shapes, len(NAMES) + 1, rank=4)
    write_collection(folder / "collection.safetensors", modules, catalogue, dtype=torch.float32)
    return folder


def _random_modules(shapes: dict[str, tuple[int, int]], seed: int, rank: int) -> dict[str, LoraModule]:
    rng = torch.Generator().manual_seed(seed)
    return {
        name: LoraModule(torch.randn(rank, K, generator=rng) * 0.3, torch.randn(N, rank, generator=rng) * 0.3, rank)
        for name, (N, K) in shapes.items()
        if name.endswith(TARGETS)
    }


def make_config(inputs: Path, out: Path, case: str) -> Config:
    """The objective of the case's preset on the smallest job that has everything."""
    preset, stage = case.split("-")
    values = job_values(inputs / "base", inputs / "data", out)
    effects = [row | {"lora": str(inputs / f"{row['name']}.safetensors")} for row in values["effects"]]
    fast = str(inputs / "fast.safetensors")
    accelerated = (preset, stage) in {("clora", "full"), ("tiny", "extend"), ("same_step", "full")}
    train: dict[str, Any] = TRAIN | {"coarse_steps": STEPS if stage == "coarse" else 0}
    train["coarse_target"] = load_preset(preset)["train"]["coarse_target"]
    train["critic_reuse"] = (preset, stage) in {("tiny", "full"), ("imitation_dmd", "full")}
    train["critic_updates"] = RECIPES.get(preset, TRAIN["critic_updates"])
    train["gradient_accumulation_steps"] = 2 if preset == "clora" else 1
    return build_config(
        values
        | {
            "effects": effects,
            "objective": load_preset(preset)["objective"],
            "student": {
                "rank": 4,
                "alpha": 4,
                "acceleration": fast if accelerated else None,
                "targets": [*TARGETS],
            },
            "schedule": load_preset(preset)["schedule"] | {"num_steps": NUM_STEPS},
            "targets": {"source": "pairs"},
            "train": train,
            "extend": EXTEND,
        },
        inputs,
    )


def run_case(inputs: Path, out: Path, case: str) -> Curves:
    """The figures of a case by name, one value a step; None where the step has no such figure."""
    config, quiet = make_config(inputs, out, case), Console(quiet=True)
    out.mkdir(parents=True)
    (out / "cache").symlink_to(inputs / "cache")  # entries go by content: what one case encoded serves the others
    if case.endswith("extend"):
        # The noise of a rehearsal target follows from hashes of files, which libraries write differently.
        with patch("clora.distill.rehearsal.noise_seed", lambda key: 0):
            extend(inputs / "collection.safetensors", config, console=quiet)
        rows = read_log(out / "extend")
    else:
        train(config, console=quiet)
        rows = read_log(out / "train")
    names = sorted({name for row in rows for name in row} - {"step", "seconds"})
    return {name: [row.get(name) for row in rows] for name in names}


def read_curves(case: str) -> Curves:
    curves: Curves = json.loads((FOLDER / f"{case}.json").read_text(encoding="utf-8"))
    return curves


def write_curves(case: str, curves: Curves) -> None:
    """A line for each figure, seven digits a number."""
    rows = {
        name: [None if value is None else float(f"{value:.7g}") for value in values] for name, values in curves.items()
    }
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(values)}" for name, values in rows.items())
    (FOLDER / f"{case}.json").write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", required=True, help="rewrite tests/golden/*.json")
    parser.add_argument(
        "cases", nargs="*", choices=[*CASES, []], metavar="CASE", help="these alone; all when none is named"
    )
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(1)
    with TemporaryDirectory() as folder:
        inputs = write_inputs(Path(folder))
        for case in options.cases or CASES:
            write_curves(case, run_case(inputs, Path(folder) / case, case))
            print(f"wrote {FOLDER / case}.json")


if __name__ == "__main__":
    main()

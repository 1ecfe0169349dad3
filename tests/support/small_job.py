"""The smallest job that has everything: two effects, general data, both streams, on a random base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from clora.config import Config, build_config

NAMES = ("warm", "cold")


def write_dataset(folder: Path) -> Path:
    """Three pairs of each of two effects (a tint each) and three general images with instructions."""
    rng = np.random.default_rng(0)
    for name, channel in zip(NAMES, (0, 2), strict=True):
        for side in ("source", "target"):
            (folder / name / side).mkdir(parents=True)
        for i in range(3):
            pixels = rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / "source" / f"{i}.png")
            pixels[..., channel] = 255
            Image.fromarray(pixels).save(folder / name / "target" / f"{i}.png")
    (folder / "general").mkdir()
    rows = []
    for i in range(3):
        Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(folder / "general" / f"{i}.png")
        rows.append({"source_images": [f"{i}.png"], "prompt": f"paint it {i}"})
    (folder / "general" / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def make_config(base: Path, dataset: Path, out: Path, *overrides: str, effects: bool = True) -> Config:
    return build_config(job_values(base, dataset, out, effects), out.parent, overrides)


def write_config(path: Path, base: Path, dataset: Path, out: Path) -> Path:
    """The same configuration as a file."""
    path.write_text(yaml.safe_dump(job_values(base, dataset, out)))
    return path


def job_values(base: Path, dataset: Path, out: Path, effects: bool = True) -> dict[str, Any]:
    return {
        "preset": "tiny",
        "base": {"model": str(base), "dtype": "float32"},
        "output_dir": str(out),
        "effects": [
            {
                "name": name,
                "prompt": "change the color",
                "student_prompt": f"make it {name}",
                "pairs": str(dataset / name),
            }
            for name in NAMES
        ]
        if effects
        else [],
        "general": {"pairs": str(dataset / "general")},
        "student": {"rank": 4, "alpha": 4, "acceleration": None},
        "teach": {"max_train_steps": 4, "batch_size": 2, "rank": 2, "alpha": 2, "lr_warmup_steps": 0},
        "targets": {"acceleration": None, "num_steps": 2},
        "schedule": {"num_steps": 3},
        "train": {
            "max_train_steps": 6,
            "coarse_steps": 2,
            "critic_updates": 2,
            "batch_size": 2,
            "anchor_batch_size": 3,
            "lr_warmup_steps": 1,
            "ema_start": 0,
            "checkpointing_steps": 2,
            "log_every": 1,
            "sample_steps": 3,
        },
    }

"""A collection that can be extended, and the configuration of a job that does: `clora extend` at its smallest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from clora.backbones.load import linear_shapes
from clora.config import Config, build_config
from clora.lora.catalogue import Catalogue, CatalogueEntry, CatalogueSchedule, write_collection
from clora.lora.files import write_lora
from clora.lora.module import LoraModule

TARGETS = ["to_q", "to_v", "img_mlp.net.2"]


def random_modules(base: Path, seed: int, rank: int) -> dict[str, LoraModule]:
    rng = torch.Generator().manual_seed(seed)
    return {
        name: LoraModule(torch.randn(rank, K, generator=rng) * 0.1, torch.randn(N, rank, generator=rng) * 0.1, rank)
        for name, (N, K) in linear_shapes(base).items()
        if name.endswith(tuple(TARGETS))
    }


def write_place(random_base: Path, folder: Path) -> Path:
    """A collection of two effects, a teacher and three pairs of a third."""
    rng = np.random.default_rng(0)
    for side in ("source", "target"):
        (folder / "warm" / side).mkdir(parents=True)
        for i in range(3):
            Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(folder / "warm" / side / f"{i}.png")
    write_lora(folder / "warm.safetensors", random_modules(random_base, 1, 2), dtype=torch.float32)
    catalogue = Catalogue(
        base=str(random_base),
        schedule=CatalogueSchedule(num_steps=2, shift=3.0),
        effects=[
            CatalogueEntry(name="first", trigger="<first>", student_prompt="paint it", teacher_sha256="0" * 64),
            CatalogueEntry(name="second", trigger="<second>", student_prompt=""),
        ],
    )
    modules = random_modules(random_base, 0, 6)
    write_collection(folder / "collection.safetensors", modules, catalogue, dtype=torch.float32)
    return folder


def make_config(base: Path, place: Path, out: Path, *overrides: str, name: str = "warm") -> Config:
    values: dict[str, Any] = {
        "preset": "tiny",
        "base": {"model": str(base), "dtype": "float32"},
        "output_dir": str(out),
        "effects": [{"name": name, "prompt": "change it", "lora": "warm.safetensors", "pairs": "warm"}],
        "student": {"acceleration": None, "targets": TARGETS},
        "targets": {"acceleration": None},
        "schedule": {"num_steps": 2},
        "objective": {"p_switch": 1.0, "guidance": 2.0},
        "extend": {
            "rank": 4,
            "p_switch": None,
            "max_train_steps": 4,
            "coarse_steps": 2,
            "rehearsal_sources": 2,
            "anchor_batch_size": 3,
        },
        "train": {"critic_updates": 1, "batch_size": 2, "log_every": 1, "checkpointing_steps": 2},
    }
    return build_config(values, place, overrides)

"""The real model's path at its full width: two layers of 3072, 24 heads, joint width 3584, random weights.

In fp32: few CPUs have arithmetic for bf16, which takes them ten times as long.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from clora.config import build_config
from clora.jobs.teach import teach
from clora.jobs.train import train
from clora.lora.catalogue import read_catalogue
from clora.lora.files import read_lora
from clora.training.tracker import read_log
from tests.support.full_width import FULL_WIDTH
from tests.support.random_base import write_random_base


@pytest.mark.slow
@pytest.mark.big(10)
def test_train_runs_at_full_width(tmp_path: Path) -> None:
    base = write_random_base(tmp_path / "base", area=32 * 32, dtype=torch.float32, **FULL_WIDTH)
    rng = np.random.default_rng(0)
    for side in ("source", "target"):
        (tmp_path / "pairs" / side).mkdir(parents=True)
        for i in range(2):
            pixels = rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "pairs" / side / f"{i}.png")
    config = build_config(
        {
            "preset": "clora",
            "base": {"model": str(base), "dtype": "float32"},
            "output_dir": "run",
            "effects": [{"name": "glow", "prompt": "make it glow", "pairs": "pairs"}],
            "student": {"rank": 4, "alpha": 4},
            "teach": {"max_train_steps": 1, "rank": 2, "alpha": 2},
            "targets": {"num_steps": 1, "guidance": 1.0},
            "objective": {"p_switch": 1.0},
            "schedule": {"num_steps": 2},
            "train": {
                "max_train_steps": 2,
                "coarse_steps": 0,
                "critic_updates": 1,
                "sample_steps": 0,
                "buckets": {"max_area": 1024, "multiple": 8, "aspect_ratios": [[1, 1]]},
            },
        },
        tmp_path,
    )
    teach(config)
    path = train(config)
    assert [entry.name for entry in read_catalogue(path).effects] == ["glow"]
    modules = read_lora(path).modules
    assert modules["transformer_blocks.1.img_mlp.net.0.proj"].B.shape == (12288, 4)
    assert len(modules) == 2 * 14
    rows = read_log(tmp_path / "run" / "train")
    assert rows and all(np.isfinite(value) for row in rows for value in row.values())

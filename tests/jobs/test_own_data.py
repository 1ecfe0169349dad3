"""A user's own data from end to end on the command line: pairs of PNGs, one teacher made elsewhere, one to teach."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from typer.testing import CliRunner

from clora.cli.commands import app
from clora.lora.files import write_lora
from clora.lora.module import LoraModule


def write_pairs(folder: Path, channel: int) -> None:
    rng = np.random.default_rng(channel)
    for side in ("source", "target"):
        (folder / side).mkdir(parents=True)
    for i in range(2):
        pixels = rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "source" / f"{i}.png")
        pixels[..., channel] = 255
        Image.fromarray(pixels).save(folder / "target" / f"{i}.png")


@pytest.mark.parametrize("layout", ["kohya", "diffusers"])
def test_own_dataset_goes_through_every_command(random_base: Path, tmp_path: Path, layout: str) -> None:
    write_pairs(tmp_path / "pairs" / "glow", 0)
    write_pairs(tmp_path / "pairs" / "frost", 2)
    generator = torch.Generator().manual_seed(0)
    elsewhere = {
        f"transformer_blocks.{block}.attn.to_q": LoraModule(
            torch.randn(3, 48, generator=generator) * 0.1, torch.randn(48, 3, generator=generator) * 0.1, alpha=1.5
        )
        for block in (0, 1)
    }
    write_lora(tmp_path / "glow.safetensors", elsewhere, layout=layout)  # type: ignore[arg-type]
    config = {
        "preset": "tiny",
        "base": {"model": str(random_base), "dtype": "float32"},
        "output_dir": "run",
        "effects": [
            {"name": "glow", "lora": "glow.safetensors", "prompt": "make it glow", "pairs": "pairs/glow"},
            {"name": "frost", "prompt": "make it frost", "pairs": "pairs/frost"},
        ],
        "objective": {"p_switch": 1.0},
        "teach": {"max_train_steps": 2, "batch_size": 1, "rank": 2, "alpha": 2},
        "targets": {"source": "teachers", "num_steps": 2, "acceleration": None},
        "student": {"rank": 4, "alpha": 4, "acceleration": None},
        "schedule": {"num_steps": 2},
        "train": {
            "max_train_steps": 2,
            "coarse_steps": 1,
            "critic_updates": 1,
            "batch_size": 1,
            "anchor_batch_size": 2,
        },
    }
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump(config))
    collection = tmp_path / "run" / "collection.safetensors"

    def clora(*arguments: str) -> str:
        result = CliRunner().invoke(app, list(arguments))
        assert result.exit_code == 0, (arguments, result.stderr, result.exception)
        return result.stdout

    assert json.loads(clora("validate", str(path), "--json"))["ok"]
    clora("teach", str(path))
    assert (tmp_path / "run" / "teachers" / "frost.safetensors").exists()
    assert not (tmp_path / "run" / "teachers" / "glow.safetensors").exists()
    clora("train", str(path))
    scores = json.loads(clora("eval", str(path), "--lora", str(collection), "--json"))
    assert set(scores["effects"]) == {"glow", "frost"}
    listed = json.loads(clora("inspect", str(collection), "--json"))["effects"]
    assert [effect["name"] for effect in listed] == ["glow", "frost"] and all(effect["trigger"] for effect in listed)
    picture = tmp_path / "mine.png"
    Image.fromarray(np.random.default_rng(9).integers(0, 255, (80, 60, 4), dtype=np.uint8), "RGBA").save(picture)
    edit = ("edit", "--base", str(random_base), "--lora", str(collection), "--image", str(picture))
    for effect in ("glow", "frost"):
        clora(*edit, "--effect", effect, "--output", str(tmp_path / f"{effect}.png"))
    glow, frost = (np.asarray(Image.open(tmp_path / f"{effect}.png")) for effect in ("glow", "frost"))
    assert glow.shape == frost.shape and not np.array_equal(glow, frost)

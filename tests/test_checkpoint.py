"""Checkpoints: what comes back, what damage is noticed, what stays when a write fails."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import clora.checkpoint as checkpoint
from clora.checkpoint import (
    flatten_optimizer,
    list_checkpoints,
    load_checkpoint,
    load_latest,
    restore_optimizer,
    save_checkpoint,
)
from clora.errors import InputError


def tensors(value: float) -> dict[str, torch.Tensor]:
    return {"a": torch.full((3, 2), value), "b": torch.tensor(value)}


def test_save_checkpoint_round_trip(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 7, tensors(1.5), {"note": "x"})
    loaded, faults = load_latest(tmp_path)
    assert loaded is not None and not faults
    assert loaded.step == 7 and loaded.state == {"note": "x"}
    assert torch.equal(loaded.tensors["a"], torch.full((3, 2), 1.5))
    assert loaded.tensors["b"].shape == ()


def test_save_checkpoint_keeps_the_newest(tmp_path: Path) -> None:
    for step in (1, 2, 10, 3):
        save_checkpoint(tmp_path, step, tensors(step), {}, keep=2)
    assert [int(p.name.split("-")[1]) for p in list_checkpoints(tmp_path)] == [3, 10]


@pytest.mark.parametrize("damage", ["truncate", "flip", "no manifest", "no tensors", "version"])
def test_load_latest_falls_back_past_damage(tmp_path: Path, damage: str) -> None:
    save_checkpoint(tmp_path, 1, tensors(1), {})
    newest = save_checkpoint(tmp_path, 2, tensors(2), {})
    data, manifest = newest / "state.safetensors", newest / "manifest.json"
    if damage == "truncate":
        data.write_bytes(data.read_bytes()[:-3])
    elif damage == "flip":
        content = bytearray(data.read_bytes())
        content[-1] ^= 1
        data.write_bytes(bytes(content))
    elif damage == "no manifest":
        manifest.unlink()
    elif damage == "no tensors":
        data.unlink()
    else:
        manifest.write_text(manifest.read_text().replace('"format_version": 1', '"format_version": 2'))
    with pytest.raises(InputError, match=str(newest)):
        load_checkpoint(newest)
    found, faults = load_latest(tmp_path)
    assert found is not None and found.step == 1 and len(faults) == 1


def test_save_checkpoint_leaves_nothing_visible_when_the_disk_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(tmp_path, 1, tensors(1), {})

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match="No space"):
        save_checkpoint(tmp_path, 2, tensors(2), {})
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-00000001"]


def test_restore_optimizer_continues_exactly(tmp_path: Path) -> None:
    def run(split: bool) -> torch.Tensor:
        weight = torch.nn.Parameter(torch.arange(4.0))
        optimizer = torch.optim.AdamW([weight], lr=0.1)
        for step in range(6):
            if split and step == 3:
                saved = save_checkpoint(tmp_path, 3, {"w": weight} | flatten_optimizer(optimizer, "adam"), {})
                loaded = load_checkpoint(saved).tensors
                weight = torch.nn.Parameter(loaded["w"])
                optimizer = torch.optim.AdamW([weight], lr=0.1)
                restore_optimizer(optimizer, loaded, "adam")
            (weight.sin() * (step + 1)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        return weight.detach()

    assert torch.equal(run(split=False), run(split=True))

"""Checkpoints: what comes back, what damage is noticed, what stays when a write fails."""

from __future__ import annotations

import json
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import clora.training.checkpoint as checkpoint
from clora.errors import InputError
from clora.training.checkpoint import (
    CheckpointWriter,
    GroupPart,
    list_checkpoints,
    open_checkpoint,
    open_latest,
    other_settings,
)


def part(value: float, length: int = 6) -> dict[str, GroupPart]:
    return {"g": GroupPart({"param": torch.arange(float(length)) + value, "ema": torch.zeros(length)}, 0, length)}


def save(folder: Path, step: int, keep: int | None = None, state: dict[str, object] | None = None) -> str | None:
    writer = CheckpointWriter(folder, keep)
    writer.save(step, part(step), state or {})
    return writer.wait()


def test_save_round_trip(tmp_path: Path) -> None:
    assert save(tmp_path, 7, state={"note": "x"}) is None
    loaded, faults = open_latest(tmp_path)
    assert loaded is not None and not faults
    assert loaded.step == 7 and loaded.state == {"note": "x"}
    assert torch.equal(loaded.read("g", "param", 2, 5), torch.tensor([9.0, 10.0, 11.0]))
    assert (tmp_path / "latest").read_text() == "checkpoint-00000007"
    with pytest.raises(InputError, match="has 6 of 7 values of g.param"):
        loaded.read("g", "param", 0, 7)


def test_save_copies_the_json_state_before_it_returns(tmp_path: Path) -> None:
    writer, groups = CheckpointWriter(tmp_path), part(0)
    state = {"steps": {"g": {"a": 3}}, "sums": {"loss": [0.5]}}
    may_write = threading.Event()
    write, CheckpointWriter._write = CheckpointWriter._write, lambda *a: (may_write.wait(), write(*a))  # type: ignore
    try:
        writer.save(1, groups, state)
    finally:
        CheckpointWriter._write = write  # type: ignore[method-assign]
    state["steps"]["g"]["a"] += 1
    state["sums"]["loss"].clear()
    may_write.set()
    assert writer.wait() is None
    saved = open_checkpoint(writer.path(1))
    assert saved.read("g", "param", 0, 6).tolist() == [0, 1, 2, 3, 4, 5]
    assert saved.state == {"steps": {"g": {"a": 3}}, "sums": {"loss": [0.5]}}


def test_save_keeps_the_newest(tmp_path: Path) -> None:
    for step in (1, 2, 3, 10):
        save(tmp_path, step, keep=2)
    assert [int(p.name.split("-")[1]) for p in list_checkpoints(tmp_path)] == [3, 10]
    save(tmp_path, 5, keep=2)  # gone back past a damaged checkpoint of step 10: that one does not count
    assert [int(p.name.split("-")[1]) for p in list_checkpoints(tmp_path)] == [3, 5, 10]
    save(tmp_path, 10, keep=1)
    assert [int(p.name.split("-")[1]) for p in list_checkpoints(tmp_path)] == [10]


def shard_of(path: Path) -> Path:
    return path / "shard-0-of-1.safetensors"


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 4
    path.write_bytes(bytes(content))


def truncate(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


# What happens to the newest of three checkpoints, 10 to 30.
DAMAGES: dict[str, Callable[[Path], object]] = {
    "shard cut by a byte": lambda c: truncate(shard_of(c), -1),
    "shard cut in half": lambda c: truncate(shard_of(c), shard_of(c).stat().st_size // 2),
    "shard empty": lambda c: truncate(shard_of(c), 0),
    "shard header flipped": lambda c: flip(shard_of(c), 12),
    "shard first value flipped": lambda c: flip(shard_of(c), -48),
    "shard last bit flipped": lambda c: flip(shard_of(c), -1),
    "shard missing": lambda c: shard_of(c).unlink(),
    "shard of another checkpoint": lambda c: shard_of(c).write_bytes(
        shard_of(c.with_name("checkpoint-00000020")).read_bytes()
    ),
    "manifest missing": lambda c: (c / "manifest.json").unlink(),
    "manifest cut": lambda c: truncate(c / "manifest.json", 100),
    "manifest empty": lambda c: truncate(c / "manifest.json", 0),
    "manifest step changed": lambda c: edit_manifest(c, step=29),
    "manifest state changed": lambda c: edit_manifest(c, state={"seed": 1}),
    "manifest of another format": lambda c: edit_manifest(c, format_version=1),
    "pointer to nothing": lambda c: (c.with_name("latest").write_text("checkpoint-00000099"), shard_of(c).unlink()),
    "pointer empty": lambda c: (c.with_name("latest").write_text(""), shard_of(c).unlink()),
    "pointer one behind": lambda c: (c.with_name("latest").write_text("checkpoint-00000020"), shard_of(c).unlink()),
    "pointer garbage": lambda c: (c.with_name("latest").write_bytes(b"\xff\0/"), (c / "manifest.json").unlink()),
}


def edit_manifest(path: Path, **changes: object) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | changes))


@pytest.mark.parametrize("damage", DAMAGES)
def test_open_latest_falls_back_past_damage(tmp_path: Path, damage: str) -> None:
    for step in (10, 20, 30):
        save(tmp_path, step)
    newest = tmp_path / "checkpoint-00000030"
    DAMAGES[damage](newest)
    with pytest.raises(InputError, match="checkpoint-00000030"):
        open_checkpoint(newest)
    found, faults = open_latest(tmp_path)
    assert found is not None and found.step == 20 and faults
    assert torch.equal(found.read("g", "param", 0, 6), torch.arange(6.0) + 20)


def test_read_never_gives_what_was_damaged_after_it_was_opened(tmp_path: Path) -> None:
    save(tmp_path, 1)
    loaded = open_checkpoint(tmp_path / "checkpoint-00000001")
    flip(shard_of(loaded.path), -1)
    with pytest.raises(InputError, match="damaged"):
        loaded.read("g", "param", 0, 6)


# Every write of a checkpoint in order; the disk is full at the one named, after half of it.
WRITES = ["shard", "shard rename", "manifest", "manifest rename", "pointer", "folder rename"]


@pytest.mark.parametrize("refused", WRITES)
def test_save_leaves_nothing_visible_when_the_disk_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: str
) -> None:
    assert save(tmp_path, 10) is None
    full = OSError(28, "No space left on device")

    def writes_half(path: Path, text: str) -> None:
        if refused.split()[0] in str(path):
            path.with_name(f".{path.name}.tmp").write_text(text[: len(text) // 2])
            raise full
        real_text(path, text)

    def refuses(*_: object) -> None:
        raise full

    real_text = checkpoint.write_text
    with monkeypatch.context() as patch:
        if refused == "shard":
            patch.setattr("clora.io.atomic.os.fsync", refuses)
        elif refused == "shard rename":
            patch.setattr("clora.io.atomic.os.replace", refuses)
        elif refused == "folder rename":
            patch.setattr(checkpoint, "_replace_folder", refuses)
        elif refused == "manifest rename":
            patch.setattr(checkpoint, "sync_folder", refuses)
        else:
            patch.setattr(checkpoint, "_POINTER", "pointer")
            patch.setattr(checkpoint, "write_text", writes_half)
        failure = save(tmp_path, 20)
    assert failure is not None and "No space left on device" in failure
    found, faults = open_latest(tmp_path)
    assert found is not None and not faults
    assert found.step == (20 if refused == "pointer" else 10)  # the pointer comes last: what it is to name is whole
    assert torch.equal(found.read("g", "param", 0, 6), torch.arange(6.0) + found.step)
    assert save(tmp_path, 30) is None  # there is room again
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".writing")]


def test_restart_removes_what_a_killed_process_left(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (tmp_path / ".writing-00000002").mkdir()
    (tmp_path / ".writing-00000002" / "shard-0-of-2.safetensors").write_bytes(b"half")
    CheckpointWriter(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-00000001", "latest"]


def test_save_on_a_disk_that_is_really_full(tmp_path: Path) -> None:
    """A file system of 64 KiB, two checkpoints of 48."""
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", tmp_path], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        writer = CheckpointWriter(tmp_path)
        writer.save(1, part(0, length=6000), {})
        assert writer.wait() is None
        writer.save(2, part(0, length=6000), {})
        failure = writer.wait()
        assert failure is not None and "shard-0-of-1.safetensors: No space left on device" in failure
        found, faults = open_latest(tmp_path)
        assert found is not None and found.step == 1 and not faults
        assert torch.equal(found.read("g", "param", 0, 6000), torch.arange(6000.0))
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_other_settings_names_key_old_and_new_value(tmp_path: Path) -> None:
    settings = {
        "seed": 1,
        "train": {"lr": 1e-4, "ratios": [[1, 1], [3, 4]]},
        "effects": [{"name": "a", "prompt": "p" * 99}],
    }
    save(tmp_path, 1, state={"settings": settings})
    saved = open_latest(tmp_path)[0]
    assert saved is not None
    text = other_settings(saved, {**settings, "train": {"lr": 1e-3, "ratios": [[1, 1], [4, 3]]}})
    assert "train.lr was 0.0001, is 0.001; train.ratios.1.0 was 3, is 4; train.ratios.1.1 was 4, is 3; put" in text
    text = other_settings(saved, {**settings, "effects": [{"name": "a"}, {"name": "b"}]})
    shown = '"' + "p" * 59 + "..."
    assert f'effects.0.prompt was {shown}, is not there; effects.1.name was not there, is "b"; put' in text
    many = other_settings(saved, {str(i): i for i in range(9)})
    assert many.count(" was ") == 5 and "and 13 more; put" in many  # "was made by another configuration" is the fifth
    save(tmp_path / "old", 1)  # of a version that kept no settings
    old = open_latest(tmp_path / "old")[0]
    assert old is not None and "by another configuration; put back" in other_settings(old, settings)

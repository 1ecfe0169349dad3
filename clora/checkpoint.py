"""Checkpoints that are complete or invisible, and that never run code.

A checkpoint is a folder `checkpoint-STEP/` with `state.safetensors` and `manifest.json` (format version, step, JSON
state, sha256 of the tensors). It is written under a temporary name, synced and renamed, so that a folder with the
final name is whole whatever happened while it was written.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from clora.errors import InputError

FORMAT_VERSION = 1
_TENSORS, _MANIFEST, _PREFIX = "state.safetensors", "manifest.json", "checkpoint-"


@dataclass(frozen=True)
class Checkpoint:
    """What was saved: the step after which it was taken, named tensors (CPU) and a JSON-able state."""

    path: Path
    step: int
    tensors: dict[str, Tensor]
    state: dict[str, Any]


def save_checkpoint(
    folder: Path, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any], keep: int | None = None
) -> Path:
    """Write `folder/checkpoint-STEP`; afterwards only the `keep` newest stay (None: all).

    Raises `OSError` when the disk refuses; nothing visible is left behind then, and older checkpoints are untouched.
    """
    folder.mkdir(parents=True, exist_ok=True)
    final, temporary = folder / f"{_PREFIX}{step:08d}", folder / f".writing-{step:08d}-{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, temporary / _TENSORS)
        manifest = {
            "format_version": FORMAT_VERSION,
            "step": step,
            "sha256": {_TENSORS: _sha256(temporary / _TENSORS)},
            "state": dict(state),
        }
        (temporary / _MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True))
        for path in (temporary / _TENSORS, temporary / _MANIFEST, temporary):
            _sync(path)
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
        _sync(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    if keep is not None:
        for old in list_checkpoints(folder)[:-keep]:
            shutil.rmtree(old, ignore_errors=True)
    return final


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints below `folder`, oldest step first."""
    found = [p for p in folder.glob(f"{_PREFIX}*") if p.name.removeprefix(_PREFIX).isdigit()]
    return sorted(found, key=lambda p: int(p.name.removeprefix(_PREFIX)))


def load_checkpoint(path: Path) -> Checkpoint:
    """Read and verify one checkpoint; `InputError` names what is damaged."""
    try:
        manifest = json.loads((path / _MANIFEST).read_text())
        version, expected = manifest["format_version"], manifest["sha256"][_TENSORS]
        step, state = int(manifest["step"]), dict(manifest["state"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path / _MANIFEST}: is missing or damaged; resume from another checkpoint") from error
    if version != FORMAT_VERSION:
        raise InputError(f"{path}: has checkpoint format {version}, this version reads {FORMAT_VERSION}")
    tensors = path / _TENSORS
    if not tensors.is_file() or _sha256(tensors) != expected:
        raise InputError(f"{tensors}: is missing or damaged (its sha256 differs); resume from another checkpoint")
    return Checkpoint(path, step, load_file(tensors), state)


def load_latest(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest undamaged checkpoint below `folder` (None when there is none), and what was wrong with newer ones."""
    faults: list[str] = []
    for path in reversed(list_checkpoints(folder)):
        try:
            return load_checkpoint(path), faults
        except InputError as error:
            faults.append(str(error))
    return None, faults


def flatten_optimizer(optimizer: torch.optim.Optimizer, prefix: str) -> dict[str, Tensor]:
    """The tensors of an optimizer's state as `prefix.INDEX.NAME` (step counts are 0-d tensors)."""
    state = optimizer.state_dict()["state"]
    return {f"{prefix}.{i}.{name}": torch.as_tensor(v) for i, slot in state.items() for name, v in slot.items()}


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], prefix: str) -> None:
    """Inverse of `flatten_optimizer`; hyperparameters stay those of `optimizer`."""
    whole = optimizer.state_dict()
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith(prefix + "."):
            index, name = key.removeprefix(prefix + ".").split(".", 1)
            state.setdefault(int(index), {})[name] = value
    whole["state"] = state
    optimizer.load_state_dict(whole)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

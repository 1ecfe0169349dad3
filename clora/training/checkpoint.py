"""Checkpoints that are complete or invisible, and that never run code.

A checkpoint is a folder `checkpoint-STEP/`. Each of the N processes that trained wrote its part of the state into
`shard-R-of-N.safetensors`; `manifest.json` holds the format version, the step, a JSON state, the sha256 of every shard
and which part it is, and its own checksum. All of it is written under a temporary name, synced and renamed, so that a
folder with the final name is whole whatever happened meanwhile; then the file `latest` is moved to it, and old ones are
removed. M processes read what N wrote: a part is put together from the shards that overlap it.

The state of an optimizer's parameters is a few flat fp32 tensors of one length (`optimizer.AdamW.snapshot`), which the
processes share out in order of their ranks.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load
from torch import Tensor

from clora.errors import InputError
from clora.io.atomic import sync_folder, write_text
from clora.io.safetensors import write_tensors
from clora.training import distributed

FORMAT_VERSION = 2
_MOST_CHANGES, _MOST_SHOWN = 4, 60  # keys, and characters of a value, in a message
_MANIFEST, _PREFIX, _POINTER, _WRITING = "manifest.json", "checkpoint-", "latest", ".writing-"
_ASIDE = "replaced-"  # before the name of an earlier run's checkpoint
_saves = itertools.count()  # equal on all processes, and never the same twice in one store


@dataclass(frozen=True)
class GroupPart:
    """One process's part, `start` .. `stop` - 1, of a group's flat tensors by kind ("param", "exp_avg", ...), in CPU
    memory and not used otherwise: they are written in the background."""

    tensors: Mapping[str, Tensor]
    start: int
    stop: int


@dataclass(frozen=True)
class Checkpoint:
    """What was saved after `step`: the JSON state, and the groups' tensors through `read`."""

    path: Path
    step: int
    state: dict[str, Any]
    shards: dict[str, dict[str, Any]]  # file name -> {"sha256": ..., "parts": {group: [start, stop]}}
    _held: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    def read(self, group: str, kind: str, start: int, stop: int) -> Tensor:
        """Elements `start` .. `stop` - 1 of a group's tensor of one kind (CPU).

        A shard is hashed as it is read. Raises `InputError` for one that is damaged, and where the part is not there.
        """
        found = torch.empty(stop - start)
        done = 0
        for name, shard in self.shards.items():
            first, last = shard["parts"].get(group, (0, 0))
            low, high = max(first, start), min(last, stop)
            if low < high:
                tensor = self._shard(name).get(f"{group}.{kind}")
                if tensor is None or tensor.shape != (last - first,):
                    raise InputError(f"{self.path / name}: has no {group}.{kind} of its length; start anew")
                found[low - start : high - start] = tensor[low - first : high - first]
                done += high - low
        if done != stop - start:
            raise InputError(f"{self.path}: has {done} of {stop - start} values of {group}.{kind}; start anew")
        return found

    def _shard(self, name: str) -> dict[str, Tensor]:
        if name not in self._held:
            path = self.path / name
            try:
                content = path.read_bytes()
            except OSError as error:
                raise InputError(_damaged(path)) from error
            # The bytes that are hashed are the bytes that are used.
            if hashlib.sha256(content).hexdigest() != self.shards[name]["sha256"]:
                raise InputError(_damaged(path))
            self._held[name] = load(content)
        return self._held[name]


class CheckpointWriter:
    """Writes checkpoints of all processes into `folder` in the background; the `keep` newest stay (None: all).

    One at a time: `save` waits for the one before. The outcome is the same on every process.
    """

    def __init__(self, folder: Path, keep: int | None = None) -> None:
        self._folder, self._keep = folder, keep
        self._thread: threading.Thread | None = None
        self._failure: str | None = None
        if distributed.is_main():
            folder.mkdir(parents=True, exist_ok=True)
            for unfinished in folder.glob(f"{_WRITING}*"):
                shutil.rmtree(unfinished, ignore_errors=True)
        distributed.barrier()

    def save(self, step: int, groups: Mapping[str, GroupPart], state: Mapping[str, Any]) -> str | None:
        """Start to write and return; `state` is copied.

        Returns what `wait` says of the checkpoint before.
        """
        failure = self.wait()
        tensors = {f"{name}.{kind}": value for name, part in groups.items() for kind, value in part.tensors.items()}
        parts = {name: [part.start, part.stop] for name, part in groups.items()}
        key = f"checkpoint/{next(_saves)}"
        copied = json.loads(json.dumps(state))  # the run changes its own while this is written
        self._thread = threading.Thread(target=self._write, args=(key, step, tensors, parts, copied), daemon=True)
        self._thread.start()
        return failure

    def wait(self) -> str | None:
        """Wait until the last checkpoint is on the disk; returns why it could not be written, None when all is well.

        A failure is told once. Nothing visible is left behind by it, and older checkpoints are untouched.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        failure, self._failure = self._failure, None
        return failure

    def path(self, step: int) -> Path:
        """Where the checkpoint of a step lies."""
        return self._folder / f"{_PREFIX}{step:08d}"

    def _write(
        self, key: str, step: int, tensors: dict[str, Tensor], parts: dict[str, Any], state: dict[str, Any]
    ) -> None:
        """One checkpoint: every process its shard, the main process the rest. `key`: where they tell each other."""
        temporary = self._folder / f"{_WRITING}{step:08d}"
        name = f"shard-{distributed.rank()}-of-{distributed.world_size()}.safetensors"
        shard: dict[str, Any] = {"name": name, "parts": parts}
        try:
            temporary.mkdir(exist_ok=True)
            shard["sha256"] = write_tensors(temporary / name, tensors, {})
        except OSError as error:
            shard["error"] = f"{temporary / name}: {error.strerror or error}"
        try:
            shards = [json.loads(text) for text in _gather(key, json.dumps(shard))]
            outcome = self._finish(step, temporary, shards, state) if distributed.is_main() else None
            self._failure = _from_main(f"{key}/outcome", outcome or "") or None
        except Exception as error:  # the store is gone with another process: a thread has no other way to say so
            self._failure = f"{type(error).__name__}: {error}"

    def _finish(self, step: int, temporary: Path, shards: list[dict[str, Any]], state: dict[str, Any]) -> str | None:
        """Make the checkpoint visible; returns why that failed."""
        errors = [shard["error"] for shard in shards if "error" in shard]
        final = self.path(step)
        try:
            if not errors:
                listed = {s["name"]: {"sha256": s["sha256"], "parts": s["parts"]} for s in shards}
                manifest = {"format_version": FORMAT_VERSION, "step": step, "shards": listed, "state": state}
                write_text(temporary / _MANIFEST, _with_checksum(manifest))
                sync_folder(temporary)
                _replace_folder(temporary, final)
                sync_folder(self._folder)
                write_text(self._folder / _POINTER, final.name)
                self._remove_old(step)
        except OSError as error:
            errors.append(f"{error.filename or final}: {error.strerror or error}")
        if errors:
            shutil.rmtree(temporary, ignore_errors=True)
        return "; ".join(errors) or None

    def _remove_old(self, step: int) -> None:
        """Keep the newest; those of later steps are damaged, and about to be replaced."""
        if self._keep is not None:
            for old in [path for path in list_checkpoints(self._folder) if _step_of(path) <= step][: -self._keep]:
                shutil.rmtree(old, ignore_errors=True)


def _gather(key: str, text: str) -> list[str]:
    """On the main process the texts of all, by rank; it may be called in a thread."""
    if distributed.world_size() == 1:
        return [text]
    distributed.post(f"{key}/{distributed.rank()}", text)
    return (
        distributed.wait_for([f"{key}/{r}" for r in range(distributed.world_size())]) if distributed.is_main() else []
    )


def _from_main(key: str, text: str) -> str:
    """The main process's text, on every process; it may be called in a thread."""
    if distributed.world_size() == 1:
        return text
    if distributed.is_main():
        distributed.post(key, text)
    return distributed.wait_for([key])[0]


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints below `folder`, oldest step first."""
    found = [p for p in folder.glob(f"{_PREFIX}*") if p.name.removeprefix(_PREFIX).isdigit()]
    return sorted(found, key=_step_of)


def set_aside(folder: Path) -> list[Path]:
    """Rename an earlier run's checkpoints, so that `open_latest` does not find them. Returns where they are, the newest
    first."""
    found = []
    for path in list_checkpoints(folder)[::-1]:
        aside = path.with_name(f"{_ASIDE}{path.name}")
        shutil.rmtree(aside, ignore_errors=True)
        found.append(path.rename(aside))
    (folder / _POINTER).unlink(missing_ok=True)
    return found


def remove_set_aside(folder: Path) -> None:
    """Remove what `set_aside` renamed: the run in its place is whole."""
    for old in folder.glob(f"{_ASIDE}{_PREFIX}*"):
        shutil.rmtree(old, ignore_errors=True)


def open_checkpoint(path: Path, verify: bool = True) -> Checkpoint:
    """A checkpoint, all of whose shards are hashed first with `verify`; `InputError` names what is damaged."""
    manifest = _read_manifest(path / _MANIFEST)
    if manifest["format_version"] != FORMAT_VERSION:
        version = manifest["format_version"]
        raise InputError(f"{path}: has checkpoint format {version}, this version reads {FORMAT_VERSION}")
    try:
        for name, shard in manifest["shards"].items() if verify else ():
            with (path / name).open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != shard["sha256"]:
                    raise InputError(_damaged(path / name))
    except OSError as error:
        raise InputError(_damaged(path / name)) from error
    return Checkpoint(path, int(manifest["step"]), manifest["state"], manifest["shards"])


def open_latest(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest undamaged checkpoint below `folder` (None when there is none), and what was wrong with newer ones."""
    faults: list[str] = []
    paths = list_checkpoints(folder)
    pointer = folder / _POINTER
    if pointer.is_file() and (named := pointer.read_text(errors="replace").strip()) not in [p.name for p in paths]:
        faults.append(f"{pointer}: names {named[:60]!r}, which is not there")
    for path in reversed(paths):
        try:
            return open_checkpoint(path), faults
        except InputError as error:
            faults.append(str(error))
    return None, faults


def other_settings(checkpoint: Checkpoint, settings: Mapping[str, Any]) -> str:
    """Why a run with these settings (plain values by section) cannot go on from a checkpoint of other ones: each key
    that differs, with the old and the new value."""
    saved, now = _flat(checkpoint.state.get("settings", {})), _flat(settings)
    keys = [key for key in saved | now if saved.get(key) != now.get(key)] if saved else []
    changes = [f"{key} was {_shown(saved, key)}, is {_shown(now, key)}" for key in keys[:_MOST_CHANGES]]
    more = [f"and {len(keys) - _MOST_CHANGES} more"] if len(keys) > _MOST_CHANGES else []
    what = f": {'; '.join([*changes, *more])}" if changes else ""  # a checkpoint of before has no settings
    mend = "put back what it was, or take another output_dir (batch sizes count over all processes)"
    return f"{checkpoint.path}: was made by another configuration{what}; {mend}"


def _flat(values: Any, key: str = "") -> dict[str, Any]:
    """`{"train": {"betas": [1, 2]}}` as `{"train.betas.0": 1, "train.betas.1": 2}`."""
    items = values.items() if isinstance(values, Mapping) else enumerate(values) if isinstance(values, list) else None
    if items is None:
        return {key: values}
    return {name: leaf for k, value in items for name, leaf in _flat(value, f"{key}.{k}" if key else str(k)).items()}


def _shown(values: Mapping[str, Any], key: str) -> str:
    if key not in values:
        return "not there"
    text = json.dumps(values[key], ensure_ascii=False)
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}..."


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads(path.read_bytes())
        stated = manifest.pop("checksum", None)
        sound = isinstance(manifest["format_version"], int) and (
            manifest["format_version"] != FORMAT_VERSION or stated == _checksum(manifest)
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(_damaged(path)) from error
    if not sound:
        raise InputError(_damaged(path))
    found: dict[str, Any] = manifest
    return found


def _checksum(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _with_checksum(manifest: dict[str, Any]) -> str:
    plain = json.loads(json.dumps(manifest))  # as it will be read: tuples become lists
    return json.dumps({**plain, "checksum": _checksum(plain)}, indent=1, sort_keys=True)


def _damaged(path: Path) -> str:
    return f"{path}: is missing or damaged; resume from another checkpoint"


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix(_PREFIX))


def _replace_folder(temporary: Path, final: Path) -> None:
    """Rename, with an older folder of the same name moved aside first."""
    aside = final.with_name(f"{_WRITING}old-{final.name}")
    if final.exists():
        shutil.rmtree(aside, ignore_errors=True)
        final.rename(aside)
    temporary.rename(final)
    shutil.rmtree(aside, ignore_errors=True)

"""A run and its checkpoints: where it starts, what it saves, what becomes of that when it ends."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from clora.errors import InputError, Interrupted, NonFiniteError, ProcessLost
from clora.training import distributed
from clora.training.checkpoint import (
    Checkpoint,
    CheckpointWriter,
    GroupPart,
    open_checkpoint,
    open_latest,
    other_settings,
    remove_set_aside,
    set_aside,
)
from clora.training.optimizer import AdamW


@dataclass(frozen=True)
class LoopConfig:
    """How long a job runs and what it writes where."""

    title: str
    max_steps: int
    folder: Path  # checkpoints and log.jsonl
    checkpointing_steps: int
    fingerprint: str
    checkpoints_total_limit: int | None = 2
    max_seconds: float | None = None
    log_every: int = 10
    stages: tuple[int, ...] = ()  # the steps before which a stage begins, for the log
    report_to: str = "none"
    resume: str | None = None
    identity: Mapping[str, str] = field(default_factory=dict)  # hashes of what a checkpoint belongs to: base, teachers
    record: Mapping[str, Any] = field(default_factory=dict)  # kept in each checkpoint, for people
    settings: Mapping[str, Any] = field(default_factory=dict)  # what `fingerprint` is the hash of, to say what differs


def resume_job(
    config: LoopConfig, optimizers: Mapping[str, AdamW], console: Console
) -> tuple[int, float, Mapping[str, list[float]]]:
    """Step, seconds and figures since the last line of the log, with the optimizers as they were then."""
    checkpoint = _find_checkpoint(config.resume, config.folder, console.print)
    if checkpoint is None:
        return 0, 0.0, {}
    _check_belongs(config, checkpoint)
    _restore(optimizers, checkpoint)
    console.print(f"{config.title}: goes on after step {checkpoint.step} from {checkpoint.path}")
    return checkpoint.step, float(checkpoint.state["seconds"]), checkpoint.state["sums"]


def put_aside(config: LoopConfig, console: Console) -> None:
    """A run that starts anew keeps an earlier one's checkpoints until it is done, where `--resume latest` does not look
    for them: it would go on from the later of the two."""
    with distributed.guard("the start"):
        if distributed.is_main() and (aside := set_aside(config.folder)):
            kept = f"the earlier run's checkpoints are kept until then, the newest as {aside[0]} (--resume takes it)"
            console.print(f"{config.title}: starts anew; {kept}", soft_wrap=True)


def _check_belongs(config: LoopConfig, checkpoint: Checkpoint) -> None:
    if checkpoint.state["fingerprint"] != config.fingerprint:
        raise InputError(other_settings(checkpoint, config.settings))
    saved, now = checkpoint.state["identity"], dict(config.identity)
    if differ := [key for key in saved | now if saved.get(key) != now.get(key)]:
        raise InputError(
            f"{checkpoint.path}: {', '.join(differ)} changed since; put back what it was, or take another output_dir"
        )


def _find_checkpoint(resume: str | None, folder: Path, say: Callable[[str], None]) -> Checkpoint | None:
    """The checkpoint `--resume` asks for: None, "latest" (the newest undamaged one, if any) or a path.

    The main process looks, the others get its choice.
    """
    found = None
    if distributed.is_main() and resume is not None:
        if resume == "latest":
            found, faults = open_latest(folder)
            for fault in faults:
                say(f"passed over: {fault}")
        else:
            found = open_checkpoint(Path(resume))
    path = distributed.from_main(None if found is None else str(found.path))
    return found if distributed.is_main() or path is None else open_checkpoint(Path(path), verify=False)


def _restore(optimizers: Mapping[str, AdamW], checkpoint: Checkpoint) -> None:
    """Put a checkpoint's tensors back; `InputError` when it belongs to another model or configuration."""
    faults = []
    for name, optimizer in optimizers.items():
        saved = {str(key): tuple(shape) for key, shape in checkpoint.state["layout"].get(name, [])}
        wanted = {key: tuple(shape) for key, shape in optimizer.flat.layout()}
        differ = [key for key in saved | wanted if saved.get(key) != wanted.get(key)]
        faults += [f"{name}.{key}" for key in differ or (wanted if list(saved) != list(wanted) else ())]
    if faults:
        raise InputError(
            f"{checkpoint.path}: does not fit this configuration ({len(faults)} tensors differ, first {faults[0]}); "
            "start anew with another output_dir"
        )
    for name, optimizer in optimizers.items():

        def read(kind: str, start: int, stop: int, name: str = name) -> torch.Tensor:
            return checkpoint.read(name, kind, start, stop)

        optimizer.restore(read, checkpoint.state["steps"][name], int(checkpoint.state["updates"][name]))


class Saver:
    """Checkpoints of one run, and what becomes of them."""

    def __init__(
        self, config: LoopConfig, optimizers: Mapping[str, AdamW], saved: int | None, say: Callable[[str], None]
    ):
        self._config, self._optimizers, self._say = config, optimizers, say
        self._writer = CheckpointWriter(config.folder, config.checkpoints_total_limit)
        self._saved, self._pending = saved, saved  # steps: of the newest checkpoint, of the one being written
        self.failures = 0

    def save(self, step: int, seconds: float, sums: Mapping[str, list[float]]) -> None:
        """Start to write the state after `step`, once the one before is written."""
        self.wait()
        if step == self._saved:
            return
        parts = {
            name: GroupPart(one.snapshot(), one.flat.shard.start, one.flat.shard.start + one.flat.shard_length)
            for name, one in self._optimizers.items()
        }
        state = {
            "fingerprint": self._config.fingerprint,
            "seconds": seconds,
            "world": distributed.world_size(),
            "updates": {name: one.updates for name, one in self._optimizers.items()},
            "steps": {name: one.steps for name, one in self._optimizers.items()},
            "layout": {name: one.flat.layout() for name, one in self._optimizers.items()},
            "sums": dict(sums),
            "identity": dict(self._config.identity),
            "record": dict(self._config.record),
            "settings": dict(self._config.settings),
        }
        self._writer.save(step, parts, state)
        self._pending = step

    def wait(self) -> str | None:
        """Wait for the checkpoint being written; tells, counts and returns why it could not be."""
        failure = self._writer.wait()
        if failure is None:
            self._saved = self._pending
            return None
        self.failures += 1
        newest = "there is none yet" if self._saved is None else f"the newest is {self._writer.path(self._saved)}"
        self._say(f"checkpoint of step {self._pending} could not be written: {failure}; {newest}; training goes on")
        self._pending = self._saved
        return failure

    @contextmanager
    def settled(self) -> Iterator[None]:
        """See to it that a checkpoint in flight is written before an error inside ends the run."""
        try:
            yield
        except ProcessLost:
            raise  # a checkpoint in flight needs the others as well
        except NonFiniteError:  # which all processes raise
            self.wait()
            distributed.leave_together()
            raise
        except BaseException:
            self.wait()
            raise

    def stop(self, step: int, signum: int) -> None:
        """End the run on a signal, its state saved: `Interrupted`; `OSError` when it could not be."""
        failure = self.wait()
        distributed.leave_together()
        if failure:
            raise OSError(f"stopped by {signal.Signals(signum).name}; step {step} could not be saved: {failure}")
        raise Interrupted(signum, self._writer.path(step))

    def finish(self, step: int) -> None:
        """End the run; a last checkpoint that failed costs the run only where there is no other."""
        if (failure := self.wait()) and self._saved is None:
            raise OSError(f"no checkpoint could be written, that of step {step} neither: {failure}")
        if distributed.is_main() and self._saved == step:
            remove_set_aside(self._config.folder)

"""The training loop shared by `teach` and `train`: progress, log, checkpoints, signals, resume.

What is learned and how is the caller's business: it hands over named optimizers and a function that does one step. A
job's state is that of its optimizers and its step number; all randomness is a function of (seed, step), so that a
resumed run continues bit for bit. Under torchrun every process runs the loop; the first one writes.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from clora.config import Config, Job
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
from clora.training.run_record import git_revision
from clora.training.tracker import Figures, Tracker


def restore_job(optimizers: Mapping[str, AdamW], checkpoint: Checkpoint) -> None:
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


def find_checkpoint(resume: str | None, folder: Path, say: Callable[[str], None]) -> Checkpoint | None:
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


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM instead of dying in the middle of a step. A second one kills as usual, unless
    torchrun is there, which passes on what the process was sent already, and kills what does not end."""
    received: list[int] = []

    def on_signal(signum: int, frame: FrameType | None) -> None:
        received.append(signum)
        if distributed.world_size() == 1:
            signal.signal(signum, signal.SIG_DFL)

    old = {signum: signal.signal(signum, on_signal) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for signum, handler in old.items():
            signal.signal(signum, handler)


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


def loop_config(
    config: Config,
    job: Job,
    max_steps: int,
    identity: Mapping[str, str],
    resume: str | None = None,
    max_seconds: float | None = None,
    stages: tuple[int, ...] = (0,),
) -> LoopConfig:
    """The loop of a job that writes under `output_dir/JOB`; checkpoints and log as `train` says."""
    train = config.train
    return LoopConfig(
        title=job,
        max_steps=max_steps,
        folder=config.output_dir / job,
        checkpointing_steps=train.checkpointing_steps,
        fingerprint=config.fingerprint(job, distributed.world_size()),
        checkpoints_total_limit=train.checkpoints_total_limit,
        max_seconds=max_seconds,
        log_every=train.log_every,
        stages=stages,
        report_to=train.report_to,
        resume=resume,
        identity=identity,
        record={"config": config.model_dump(mode="json"), "git_revision": git_revision()},
        settings=config.deciding_values(job, distributed.world_size()),
    )


class _Saver:
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


@dataclass
class _Run:
    """A run under way: what its steps report to, and where it stands, which is the same on every process."""

    config: LoopConfig
    saver: _Saver
    tracker: Tracker
    console: Console
    show: Callable[..., None]  # takes `completed` and `rate`
    received: Sequence[int]  # the signals to this process
    device: torch.device
    step: int  # done in all
    seconds: float  # of training in all; the slowest process's count

    def train(self, one_step: Callable[[int], Figures], on_step: Callable[[int, Tracker], None] | None) -> None:
        """All steps that are left, with checkpoints; on a signal `_Saver.stop` ends it."""
        config, most = self.config, self.config.max_seconds
        while self.step < config.max_steps and (most is None or self.seconds < most):
            with distributed.guard(f"step {self.step}"):
                signum = self._do(one_step)
                if on_step is not None:
                    on_step(self.step, self.tracker)
            while self.tracker.faults:
                self.console.print(self.tracker.faults.pop(0))
            if signum or self.step % config.checkpointing_steps == 0:
                self._save()
            if signum:
                self.saver.stop(self.step, signum)
        self._save()
        self.saver.finish(self.step)
        with distributed.guard("the end"):
            signum, _ = self._agreed(self.seconds)
        if signum:
            self.saver.stop(self.step, signum)

    def _do(self, one_step: Callable[[int], Figures]) -> int:
        """One step, logged and shown; the signal that came meanwhile, to whichever process."""
        started = time.perf_counter()
        figures = one_step(self.step)
        self.step += 1
        signum, seconds = self._agreed(self.seconds + time.perf_counter() - started)
        rate, self.seconds = 1 / (seconds - self.seconds), seconds
        self.tracker.log(self.step, self.seconds, _counted(figures, self.saver.failures))
        self.show(completed=self.step, rate=f"{rate:.2f}/s {memory_mb():.0f} MB")
        return signum

    def _agreed(self, seconds: float) -> tuple[int, float]:
        """A signal to any process, 0 for none, and the most seconds of all."""
        signum, most = distributed.max_over_processes([max(self.received, default=0), seconds], self.device)
        return int(signum), most

    def _save(self) -> None:
        self.saver.save(self.step, self.seconds, self.tracker.sums)


def run_loop(
    config: LoopConfig,
    optimizers: Mapping[str, AdamW],
    one_step: Callable[[int], Figures],
    on_step: Callable[[int, Tracker], None] | None = None,
    console: Console | None = None,
    on_start: Callable[[], None] | None = None,
) -> int:
    """Run `one_step(step)` from the resumed step to `max_steps`, or until `max_seconds` of training have passed.
    `on_start` is called before, once nothing keeps the run from being resumed.

    Returns the number of steps done in all. On SIGINT or SIGTERM, to whichever process, the step in flight is finished,
    the state saved and `Interrupted` raised. A checkpoint that cannot be written is told, counted in the log
    (`failed_checkpoints`) and tried again at the next one; `OSError` when none could be. An exception of `one_step`
    passes through (the last checkpoint stays); a process that dies or hangs gives `ProcessLost` in the
    others.
    """
    console = console or Console(stderr=True, quiet=not distributed.is_main())
    with distributed.guard("the start"):
        step, seconds, sums = _resume(config, optimizers, console)
        if on_start is not None:
            on_start()
        saver = _Saver(config, optimizers, step or None, console.print)
    device = next(iter(optimizers.values())).flat.device
    with _signals() as received, _tracker(config, step, sums) as tracker, _progress(console) as progress:
        if config.resume is None:
            _set_aside(config, console)
        task = progress.add_task(config.title, total=config.max_steps, completed=step, rate="")
        show = partial(progress.update, task)
        run = _Run(config, saver, tracker, console, show, received, device, step, seconds)
        with saver.settled():
            run.train(one_step, on_step)
    return run.step


def _resume(
    config: LoopConfig, optimizers: Mapping[str, AdamW], console: Console
) -> tuple[int, float, Mapping[str, list[float]]]:
    """Step, seconds and figures since the last line of the log, with the optimizers as they were then."""
    checkpoint = find_checkpoint(config.resume, config.folder, console.print)
    if checkpoint is None:
        return 0, 0.0, {}
    _check_belongs(config, checkpoint)
    restore_job(optimizers, checkpoint)
    console.print(f"{config.title}: goes on after step {checkpoint.step} from {checkpoint.path}")
    return checkpoint.step, float(checkpoint.state["seconds"]), checkpoint.state["sums"]


def _set_aside(config: LoopConfig, console: Console) -> None:
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


def _counted(figures: Figures, failures: int) -> Figures:
    return {**figures, "failed_checkpoints": float(failures)} if failures else figures


def _tracker(config: LoopConfig, step: int, sums: Mapping[str, list[float]]) -> Tracker:
    return Tracker(
        config.title,
        config.folder,
        config.report_to,
        config.log_every,
        config.max_steps,
        step,
        sums,
        writes=distributed.is_main(),
        stages=config.stages,
    )


def memory_mb() -> float:
    """Memory in use, MB: the GPU's where there is one, else this process's resident set."""
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated() / 1e6
    return float(psutil.Process().memory_info().rss) / 1e6


def _progress(console: Console) -> Progress:
    columns = ("[progress.description]{task.description}", "{task.fields[rate]}")
    return Progress(
        TextColumn(columns[0]),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn(columns[1]),
        console=console,
    )

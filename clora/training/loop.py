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
from dataclasses import dataclass
from functools import partial
from types import FrameType

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
from clora.training import distributed
from clora.training.optimizer import AdamW
from clora.training.run_record import git_revision
from clora.training.saver import LoopConfig, Saver, put_aside, resume_job
from clora.training.tracker import Figures, Tracker


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


@dataclass
class _Run:
    """A run under way: what its steps report to, and where it stands, which is the same on every process."""

    config: LoopConfig
    saver: Saver
    tracker: Tracker
    console: Console
    show: Callable[..., None]  # takes `completed` and `rate`
    received: Sequence[int]  # the signals to this process
    device: torch.device
    step: int  # done in all
    seconds: float  # of training in all; the slowest process's count

    def train(self, one_step: Callable[[int], Figures], on_step: Callable[[int, Tracker], None] | None) -> None:
        """All steps that are left, with checkpoints; on a signal `Saver.stop` ends it."""
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
        step, seconds, sums = resume_job(config, optimizers, console)
        if on_start is not None:
            on_start()
        saver = Saver(config, optimizers, step or None, console.print)
    device = next(iter(optimizers.values())).flat.device
    with _signals() as received, _tracker(config, step, sums) as tracker, _progress(console) as progress:
        if config.resume is None:
            put_aside(config, console)
        task = progress.add_task(config.title, total=config.max_steps, completed=step, rate="")
        show = partial(progress.update, task)
        run = _Run(config, saver, tracker, console, show, received, device, step, seconds)
        with saver.settled():
            run.train(one_step, on_step)
    return run.step


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

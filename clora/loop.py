"""The training loop shared by `teach` and `train`: updates, EMA, progress, log, checkpoints, signals, resume.

What is learned and how is the caller's business: it hands over named trainable groups and a function that does one
step. A job's state is its parameters, optimizers, average and step number; all randomness is a function of
(seed, step), so that a resumed run continues bit for bit.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
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
from torch import Tensor, nn

from clora.checkpoint import (
    Checkpoint,
    flatten_optimizer,
    load_checkpoint,
    load_latest,
    restore_optimizer,
    save_checkpoint,
)
from clora.errors import InputError
from clora.tracker import Figures, Tracker


class NonFiniteError(ArithmeticError):
    """A loss or gradient that is not finite: nothing was updated."""


class Interrupted(Exception):
    """SIGINT or SIGTERM arrived; the state is saved. `code` is the exit code to use (128 + signal)."""

    def __init__(self, signum: int, checkpoint: Path) -> None:
        self.code = 128 + signum
        super().__init__(f"stopped by {signal.Signals(signum).name}; saved {checkpoint}; go on with --resume latest")


@dataclass
class Group:
    """Parameters with one AdamW and one learning-rate schedule; `ema_decay` 0 keeps no average."""

    parameters: dict[str, nn.Parameter]
    learning_rate: float
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    ema_decay: float = 0.0
    ema_start: int = 0
    per_slot: bool = False  # parameters are stacked (S, ...): S independent jobs, each clipped by its own norm
    optimizer: torch.optim.AdamW = field(init=False)
    ema: dict[str, Tensor] = field(init=False)
    updates: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.AdamW(
            list(self.parameters.values()),
            lr=self.learning_rate,
            betas=self.betas,
            eps=self.epsilon,
            weight_decay=self.weight_decay,
        )
        self.ema = {k: v.detach().clone() for k, v in self.parameters.items()} if self.ema_decay else {}

    def averaged(self) -> dict[str, Tensor]:
        """The parameters to export: their average where one is kept."""
        return self.ema if self.ema else {name: value.detach() for name, value in self.parameters.items()}


def lr_factor(update: int, total: int, warmup: int, scheduler: str) -> float:
    """Learning-rate factor of update 0, 1, ...: linear warm-up, then constant, cosine or linear decay to 0."""
    if update < warmup:
        return (update + 1) / warmup
    if scheduler == "constant":
        return 1.0
    progress = min(1.0, (update - warmup) / max(1, total - warmup))
    return 1.0 - progress if scheduler == "linear" else 0.5 * (1 + math.cos(math.pi * progress))


def apply_gradients(group: Group, factor: float, where: str) -> float:
    """Clip, step, average, clear; returns the gradient norm before clipping.

    Raises `NonFiniteError` naming `where` when the norm is not finite; parameters and optimizer are then untouched.
    """
    norm = _clip_per_slot(group) if group.per_slot else _clip(group)
    if not math.isfinite(norm):
        group.optimizer.zero_grad(set_to_none=True)
        raise NonFiniteError(f"gradient is not finite at {where}; nothing was updated")
    for settings in group.optimizer.param_groups:
        settings["lr"] = group.learning_rate * factor
    group.optimizer.step()
    group.optimizer.zero_grad(set_to_none=True)
    group.updates += 1
    if group.ema:
        since = group.updates - group.ema_start
        # The average starts as a copy and forgets the start at the pace of its own age.
        decay = 0.0 if since <= 0 else min(group.ema_decay, since / (since + 10))
        with torch.no_grad():
            names = list(group.ema)
            torch._foreach_lerp_([group.ema[n] for n in names], [group.parameters[n] for n in names], 1 - decay)
    return norm


def _clip(group: Group) -> float:
    return float(torch.nn.utils.clip_grad_norm_(list(group.parameters.values()), group.max_grad_norm))


def _clip_per_slot(group: Group) -> float:
    """Clip each slot of stacked parameters by its own norm; returns the largest."""
    grads = [p.grad for p in group.parameters.values() if p.grad is not None]
    norms = torch.stack([g.square().flatten(1).sum(1) for g in grads]).sum(0).sqrt()
    factors = (group.max_grad_norm / norms.clamp_min(1e-12)).clamp_max(1.0)
    for grad in grads:
        grad.mul_(factors.view(-1, *[1] * (grad.dim() - 1)))
    return float(norms.max())


def check_finite(loss: Tensor, where: str) -> Tensor:
    """`loss` itself, or `NonFiniteError` naming `where`."""
    if not bool(torch.isfinite(loss)):
        raise NonFiniteError(f"loss is {loss.item()} at {where}; nothing was updated")
    return loss


def job_tensors(groups: Mapping[str, Group]) -> dict[str, Tensor]:
    """Every tensor a resume needs, by name."""
    tensors: dict[str, Tensor] = {}
    for name, group in groups.items():
        tensors |= {f"{name}.param.{key}": value.detach() for key, value in group.parameters.items()}
        tensors |= {f"{name}.ema.{key}": value for key, value in group.ema.items()}
        tensors |= flatten_optimizer(group.optimizer, f"{name}.adam")
    return tensors


def restore_job(groups: Mapping[str, Group], checkpoint: Checkpoint) -> None:
    """Put a checkpoint's tensors back; `InputError` when it belongs to another model or configuration."""
    faults = []
    for name, group in groups.items():
        wanted: dict[str, Tensor] = {f"{name}.param.{key}": value for key, value in group.parameters.items()}
        wanted |= {f"{name}.ema.{key}": value for key, value in group.ema.items()}
        for key, value in wanted.items():
            saved = checkpoint.tensors.get(key)
            if saved is None or saved.shape != value.shape:
                faults.append(key)
    if faults:
        raise InputError(
            f"{checkpoint.path}: does not fit this configuration ({len(faults)} tensors differ, first {faults[0]}); "
            "start anew with another output_dir"
        )
    with torch.no_grad():
        for name, group in groups.items():
            for key, parameter in group.parameters.items():
                parameter.copy_(checkpoint.tensors[f"{name}.param.{key}"])
            for key, average in group.ema.items():
                average.copy_(checkpoint.tensors[f"{name}.ema.{key}"])
            restore_optimizer(group.optimizer, checkpoint.tensors, f"{name}.adam")
            group.updates = int(checkpoint.state["updates"][name])


def find_checkpoint(resume: str | None, folder: Path, say: Callable[[str], None]) -> Checkpoint | None:
    """The checkpoint `--resume` asks for: None, "latest" (the newest undamaged one, if any) or a path."""
    if resume is None:
        return None
    if resume != "latest":
        return load_checkpoint(Path(resume))
    checkpoint, faults = load_latest(folder)
    for fault in faults:
        say(f"passed over: {fault}")
    return checkpoint


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM instead of dying in the middle of a step; a second one kills as usual."""
    received: list[int] = []

    def on_signal(signum: int, frame: FrameType | None) -> None:
        received.append(signum)
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
    report_to: str = "none"
    resume: str | None = None


def run_loop(
    config: LoopConfig,
    groups: Mapping[str, Group],
    one_step: Callable[[int], Figures],
    on_step: Callable[[int, Tracker], None] | None = None,
    console: Console | None = None,
) -> int:
    """Run `one_step(step)` from the resumed step to `max_steps`, or until `max_seconds` of training have passed.

    Returns the number of steps done in all. On SIGINT or SIGTERM the step in flight is finished, the state saved and
    `Interrupted` raised; an exception of `one_step` passes through (the last checkpoint stays).
    """
    console = console or Console(stderr=True)
    checkpoint = find_checkpoint(config.resume, config.folder, console.print)
    step, seconds = 0, 0.0
    if checkpoint is not None:
        if checkpoint.state["fingerprint"] != config.fingerprint:
            raise InputError(
                f"{checkpoint.path}: was made by another configuration; take that one, or another output_dir"
            )
        restore_job(groups, checkpoint)
        step, seconds = checkpoint.step, float(checkpoint.state["seconds"])
        console.print(f"{config.title}: goes on after step {step} from {checkpoint.path}")

    def save() -> Path:
        state = {
            "fingerprint": config.fingerprint,
            "seconds": seconds,
            "updates": {name: group.updates for name, group in groups.items()},
        }
        return save_checkpoint(config.folder, step, job_tensors(groups), state, config.checkpoints_total_limit)

    with _signals() as received, _tracker(config, step) as tracker, _progress(console) as progress:
        task = progress.add_task(config.title, total=config.max_steps, completed=step, rate="")
        while step < config.max_steps and (config.max_seconds is None or seconds < config.max_seconds):
            started = time.perf_counter()
            figures = one_step(step)
            step += 1
            elapsed = time.perf_counter() - started
            seconds += elapsed
            tracker.log(step, seconds, figures)
            progress.update(task, completed=step, rate=f"{1 / elapsed:.2f}/s {memory_mb():.0f} MB")
            if on_step is not None:
                on_step(step, tracker)
            if received:
                raise Interrupted(received[0], save())
            if step % config.checkpointing_steps == 0:
                save()
    save()
    return step


def _tracker(config: LoopConfig, step: int) -> Tracker:
    return Tracker(config.title, config.folder, config.report_to, config.log_every, config.max_steps, step)


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

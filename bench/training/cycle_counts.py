"""What the two schedules of `bench.training.train_cycle` compute: forwards, backwards, by hooks."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal
from unittest.mock import patch

from torch import Tensor
from torch.optim import Optimizer

from bench.training.cycle_models import Size, authors_cycle, make_authors, make_data, make_ours, narrow, steps_of
from clora.distill.step import full_step
from clora.method.flow import few_step_sigmas
from clora.method.routing import Stream
from clora.training.optimizer import AdamW

CRITIC_UPDATES = 5
REHEARSALS = 40  # cycles of each stream
STREAMS: tuple[Stream, ...] = ("effect", "general")
Schedule = Literal["ours", "authors"]


@dataclass(frozen=True)
class Work:
    """Samples that went forward through the transformer, and gradients of samples that came back."""

    forwards: float
    backwards: float


@contextmanager
def counted(models: Sequence[Any], optimizers: Iterable[Optimizer | AdamW]) -> Iterator[list[tuple[str, int]]]:
    """Within it the transformers' forwards and backwards are noted in order, with their samples, and all updates."""
    events: list[tuple[str, int]] = []

    def saw_backward(grad: Tensor) -> None:
        events.append(("backward", len(grad)))

    def saw_forward(model: Any, args: Any, output: tuple[Tensor]) -> None:
        events.append(("forward", len(output[0])))
        if output[0].requires_grad:
            output[0].register_hook(saw_backward)

    def noting(update: Callable[..., object]) -> Callable[..., None]:
        def run(*args: Any) -> None:
            update(*args)
            events.append(("update", 0))

        return run

    with ExitStack() as stack:
        for model in models:
            stack.callback(model.register_forward_hook(saw_forward).remove)
        for one in optimizers:
            method = "update" if isinstance(one, AdamW) else "step"
            stack.enter_context(patch.object(one, method, noting(getattr(one, method))))
        yield events


def updates_of(events: list[tuple[str, int]]) -> list[Work]:
    """The work before each update, since the one before."""
    updates, work = [], Work(0, 0)
    for kind, samples in events:
        if kind == "update":
            updates.append(work)
            work = Work(0, 0)
        else:
            work = replace(work, **{f"{kind}s": getattr(work, f"{kind}s") + samples})
    return updates


@dataclass(frozen=True)
class Rehearsal:
    """Mean work of each kind of update by schedule, and the steps of each stream, cycles of average length first."""

    counts: dict[Schedule, dict[str, Work]]
    steps: dict[Stream, list[int]]

    def cycle(self, schedule: Schedule, stream: Stream) -> Work:
        """The mean work of a cycle."""
        critic, student = (self.counts[schedule][kind] for kind in ("critic", f"{stream}_generator"))
        forwards = CRITIC_UPDATES * critic.forwards + student.forwards
        return Work(forwards, CRITIC_UPDATES * critic.backwards + student.backwards)


def rehearse(size: Size, device: str, rehearsals: int = REHEARSALS) -> Rehearsal:
    """Count the updates of both schedules on a narrow transformer that reads the same data."""
    data = make_data(narrow(size), CRITIC_UPDATES)
    ours, authors = make_ours(data, device), make_authors(data, device)
    # A forward for each update's own: as many samples in all, and it is seen whose they are.
    ours = replace(ours, joint_tokens=0)
    seen: dict[Schedule, dict[str, set[Work]]] = {"ours": {}, "authors": {}}
    lengths: dict[Stream, dict[int, float]] = {stream: {} for stream in STREAMS}
    num_exits = len(few_step_sigmas(data.config.schedule.num_steps))
    for stream in STREAMS:
        for done, step in enumerate(steps_of(ours.batches, stream)):
            kinds = {kind: len(work) for kind, work in seen["ours"].items()}
            drawn = all(kinds.get(kind) == num_exits for kind in ("critic", f"{stream}_generator"))
            if done >= (size.rehearsals or rehearsals) and (drawn or size.rehearsals):
                break
            with counted([ours.models.backbone.transformer], [ours.student, ours.critic]) as events:
                full_step(ours, step)
            lengths[stream][step] = sum(work.forwards for work in _note(seen["ours"], stream, events))
            if done == 0:  # theirs does the same work at every step
                models = [authors.student, authors.critic, authors.real]
                with counted(models, authors.optimizers.values()) as events:
                    authors_cycle(authors, ours.batches, step)()
                _note(seen["authors"], stream, events)
    counts: dict[Schedule, dict[str, Work]] = {
        schedule: {kind: _mean(work) for kind, work in kinds.items()} for schedule, kinds in seen.items()
    }
    rehearsal = Rehearsal(counts, {})
    for stream, of_step in lengths.items():
        mean = rehearsal.cycle("ours", stream).forwards
        rehearsal.steps[stream] = sorted(of_step, key=lambda step: abs(of_step[step] - mean))
    return rehearsal


def _note(seen: dict[str, set[Work]], stream: Stream, events: list[tuple[str, int]]) -> list[Work]:
    updates = updates_of(events)
    assert len(updates) == CRITIC_UPDATES + 1
    for index, work in enumerate(updates):
        seen.setdefault("critic" if index < CRITIC_UPDATES else f"{stream}_generator", set()).add(work)
    return updates


def _mean(work: set[Work]) -> Work:
    """Over exit steps: each gives another number of forwards, and all are equally likely."""
    return Work(
        statistics.fmean(one.forwards for one in work),
        statistics.fmean(one.backwards for one in work),
    )

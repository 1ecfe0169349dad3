"""One distillation step, in the order in which it happens (Sec. 4): coarse_step, or full_step.

Samples come from `Batches`, velocities from `Models`, losses from `clora.method.objective`. A full step is the
paper's: the critic follows the student for `critic_updates` updates, then the student moves.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import groupby, islice
from typing import NamedTuple

import torch
from torch import Tensor

from clora.config import Config
from clora.distill.batches import Batches, critic_purpose
from clora.distill.networks import Models
from clora.distill.roles import CRITIC, STUDENT
from clora.method.given import CriticSample, DistillBatch, Networks
from clora.method.imitation import imitation_loss
from clora.method.losses import Figures
from clora.method.noise import Draws
from clora.method.objective import (
    AnchorLoss,
    Loss,
    critic_loss,
    critic_samples,
    has_terms,
    student_sample,
    ta_fm_loss,
    total_loss_terms,
)
from clora.method.routing import Stream
from clora.training import distributed
from clora.training.lr_schedule import critic_lr_multiplier, student_lr_multiplier
from clora.training.optimizer import AdamW, apply_gradients, check_finite

# Independent forwards share one call up to this many tokens, which is faster there (`bench.training.joint`): a forward
# of few tokens mostly reads the weights.
JOINT_TOKENS = 1024


@dataclass(frozen=True)
class Distillation:
    """Everything a step needs.

    anchor_loss: what stands in TA-FM's place. coarse_loss: what the coarse stage learns. joint_tokens: most tokens of a
    forward that is shared, `math.inf` where every forward has to fetch the weights from other processes.
    """

    config: Config
    batches: Batches
    models: Models
    student: AdamW
    critic: AdamW | None  # none where it has no updates
    anchor_loss: AnchorLoss = ta_fm_loss
    coarse_loss: AnchorLoss = ta_fm_loss
    joint_tokens: float = JOINT_TOKENS


class StudentBatch(NamedTuple):
    """A batch of the student's update; `x0` is its `student_sample`, where the critic learned from it already."""

    batch: DistillBatch
    draws: Draws
    x0: Tensor | None = None


class Rollout(NamedTuple):
    """A batch of a critic's update, with the student's samples."""

    batch: DistillBatch
    draws: Draws
    sample: CriticSample


def train_step(d: Distillation, step: int) -> Figures:
    """One step of training, coarse or full. The critic starts where the coarse stage left the student."""
    coarse_steps = d.batches.coarse_steps
    if step < coarse_steps:
        return coarse_step(d, step)
    if step == coarse_steps > 0 and d.critic is not None:
        start_critic(d.student, d.critic)
    return full_step(d, step)


def coarse_step(d: Distillation, step: int) -> Figures:
    """The coarse stage: TA-FM alone (Eq. 6), or what stands in its place, on effect batches; no critic."""
    d.models.prefetch([*d.batches.teachers(step), *d.batches.teachers(step + 1)])
    nets = networks_at(d, step)
    figures: Figures = {}
    where = ""
    for batch, draws in d.batches.of_student(step, "effect", "coarse"):
        where = place(step, STUDENT, batch)
        loss, figures = d.coarse_loss(nets, batch, d.config, draws, None)
        walk_back(d, loss, where)
    factor = student_lr_multiplier(d.config.train, d.batches.coarse_steps, step)
    return move(d.student, STUDENT, factor, figures, where)


def full_step(d: Distillation, step: int) -> Figures:
    """`critic_updates` updates of the critic, then one of the student on the total loss (Eq. 9).

    Each critic update sees samples of its own; with `critic_reuse` the last one takes the student's, which stays
    what it was until its own update: a rollout less. Meanwhile the next step's teachers are fetched.
    """
    train, stream = d.config.train, d.batches.stream(step)
    d.models.prefetch([*d.batches.teachers(step), *d.batches.teachers(step + 1)])
    nets = networks_at(d, step)
    figures: Figures = {}

    fresh = train.critic_updates - train.critic_reuse
    rollouts = critic_rollouts(d, nets, step, stream, fresh)
    for _ in range(fresh):
        figures |= critic_update(d, nets, step, islice(rollouts, train.gradient_accumulation_steps))

    batches: Iterable[StudentBatch] = (StudentBatch(*drawn) for drawn in d.batches.of_student(step, stream))
    if train.critic_reuse:
        batches = [one._replace(x0=student_sample(nets, one.batch, d.config, one.draws)) for one in batches]
        figures |= critic_update(d, nets, step, reused_rollouts(d, step, batches))

    of_student = student_update(d, nets, step, batches)
    return figures | {f"{stream}/{name}": value for name, value in of_student.items()}


def critic_update(d: Distillation, nets: Networks, step: int, rollouts: Iterable[Rollout]) -> Figures:
    """One update of the critic on the student's samples (Eq. 2)."""
    assert d.critic is not None
    figures: Figures = {}
    where = ""
    for batch, draws, sample in rollouts:
        where = place(step, CRITIC, batch)
        loss, figures = critic_loss(nets, batch, d.config, draws, sample)
        walk_back(d, loss, where)
    factor = critic_lr_multiplier(d.config.train, d.batches.coarse_steps, d.critic.updates)
    return move(d.critic, CRITIC, factor, figures, where)


def student_update(d: Distillation, nets: Networks, step: int, batches: Iterable[StudentBatch]) -> Figures:
    """One update of the student (Eq. 9). Each term's graph is walked back before the next is built."""
    figures: Figures = {}
    where = ""
    for batch, draws, x0 in batches:
        where, total, figures = place(step, STUDENT, batch), [], {}
        for loss, of_term in student_loss_terms(d, nets, StudentBatch(batch, draws, x0)):
            walk_back(d, loss, where)
            total.append(loss.detach())
            figures |= of_term
            del loss  # and with it what its graph holds
        figures["total_loss"] = torch.stack(total).sum()
    factor = student_lr_multiplier(d.config.train, d.batches.coarse_steps, step)
    return move(d.student, STUDENT, factor, figures, where)


def student_loss_terms(d: Distillation, nets: Networks, drawn: StudentBatch) -> Iterator[Loss]:
    """The weighted terms of the student's loss, each made when it is asked for: imitation, where it has a weight in the
    stream; and those of Eq. 9."""
    batch, draws, x0 = drawn
    objective = d.config.objective
    imitates = objective.imitates(batch.stream)
    if imitates:
        loss, figures = imitation_loss(nets, batch, d.config, draws)
        yield objective.imitation_weight * loss, figures
    if not imitates or has_terms(objective, batch.stream):
        yield from total_loss_terms(nets, batch, d.config, draws, x0, d.anchor_loss)


def critic_rollouts(d: Distillation, nets: Networks, step: int, stream: Stream, updates: int) -> Iterator[Rollout]:
    """The batches of the critic's first `updates` updates in order, with the student's samples for them.

    The student stays what it is meanwhile, so that batches of one size can roll out together.
    """
    train = d.config.train
    most = max(1, at_once(d, train.critic_updates * train.gradient_accumulation_steps))
    drawn = d.batches.of_critic(step, stream, updates)
    for _, group in groupby(drawn, key=lambda one: (one[0].student_cond.grid, one[0].student_cond.ref_grids)):
        while some := list(islice(group, most)):
            batches, draws = zip(*some, strict=True)
            yield from map(Rollout, batches, draws, critic_samples(nets, batches, d.config, draws))


def reused_rollouts(d: Distillation, step: int, batches: Iterable[StudentBatch]) -> Iterator[Rollout]:
    """The student's batches and samples for the critic's last update, which draws numbers of its own."""
    last = d.config.train.critic_updates - 1
    for part, (batch, draws, x0) in enumerate(batches):
        assert x0 is not None
        generator = d.batches.generator(step, critic_purpose(last, part))
        yield Rollout(batch, replace(draws, generator=generator), CriticSample(x0, False))


def walk_back(d: Distillation, loss: Tensor, where: str) -> None:
    """Gradients of a loss, or of one of its terms; `NonFiniteError` names `where`."""
    (check_finite(loss, where) / d.config.train.gradient_accumulation_steps).backward()


def move(group: AdamW, name: str, factor: float, figures: Figures, where: str) -> Figures:
    """Update a group by its gradients, at `factor` of its learning rate; returns the figures of all processes."""
    norm = apply_gradients(group, factor, where)
    return distributed.sum_figures(figures) | {f"{name}_grad_norm": torch.tensor(norm)}


def start_critic(student: AdamW, critic: AdamW) -> None:
    """Give the critic the student's weights. Where it has more ranks, the student's are its last ones: below them it
    has what the student lies on."""
    start, values = student.fp32_parameters(), critic.fp32_parameters()
    for key, value in values.items():
        own, dim = start[key.replace(CRITIC, STUDENT, 1)], 1 if key.endswith(".A") else 2
        value.narrow(dim, value.shape[dim] - own.shape[dim], own.shape[dim]).copy_(own)
    critic.assign(values)


def networks_at(d: Distillation, step: int) -> Networks:
    """Student, critic and teachers of `step` as velocities."""
    return d.models.networks(joined=step >= d.batches.coarse_steps, joint=at_once(d, 3) == 3)


def at_once(d: Distillation, batches: int) -> int:
    """How many of so many batches may share a forward."""
    return int(min(batches, d.joint_tokens / (d.config.train.batch_size * d.batches.tokens)))


def place(step: int, name: str, batch: DistillBatch) -> str:
    """Where a loss comes from, for messages."""
    return f"step {step} ({name}, {batch.stream} stream: {', '.join(sorted(batch.samples))})"

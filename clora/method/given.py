"""What the objectives are given: the velocities of a step, how they are asked, and its data.

Shapes: latents (B, T, C) packed tokens in fp32, sigma (B,) fp32 with 1 = noise and 0 = data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from clora.config import ObjectiveConfig
from clora.method.flow import Velocity
from clora.method.losses import guided_velocity
from clora.method.routing import Stream


class Query(NamedTuple):
    """What a velocity is asked: x_sigma (B, T, C), sigma (B,), cond."""

    x_sigma: Tensor
    sigma: Tensor
    cond: Any


@dataclass(frozen=True)
class Networks:
    """The three velocities of one step. The teacher takes each sample's effect, or none, from its cond."""

    student: Velocity
    critic: Velocity
    teacher: Velocity
    # Joins conds along the batch, for the guided teacher's one call and for rollouts of several batches; needed only
    # when guidance is not 1.
    cat_conds: Callable[[Sequence[Any]], Any] | None = None
    # The critic's answer and the teacher's in one call; None asks one after the other.
    scores: Callable[[Query, Query], tuple[Tensor, Tensor]] | None = None
    # A teacher that samples in few steps; only `imitation: same_step` asks it.
    few_step_teacher: Velocity | None = None


class Anchor(NamedTuple):
    """What TA-FM and imitation learn from: the teacher's images y (B, T, C), under the student's and the teacher's
    prompts. `y` is None in the general stream; `uncond` and `guided` as in `DistillBatch`."""

    y: Tensor | None
    student_cond: Any
    teacher_cond: Any
    uncond: Any | None = None
    guided: Sequence[int] | None = None


@dataclass(frozen=True)
class DistillBatch:
    """One step's data. Student and critic see `student_cond`, the teacher its own prompt (Eq. 5)."""

    stream: Stream
    student_cond: Any
    teacher_cond: Any
    uncond: Any | None  # the guided samples with the negative prompt; None where there are none
    latent_shape: tuple[int, int]  # (T, C)
    batch_size: int
    samples: Sequence[str]  # what each is, for messages
    step: int
    y: Tensor | None = None  # (B, T, C), the teacher's images; None in the general stream
    anchor: Anchor | None = None  # a batch of their own, usually larger (they cost few forwards); None takes this one
    guided: Sequence[int] | None = None  # the samples whose teacher is guided; None means all


class CriticSample(NamedTuple):
    """What the critic learns from: x0 (B, T, C), and whether it was simulated from targets."""

    x0: Tensor
    on_target: bool


def anchor_of(batch: DistillBatch) -> Anchor:
    """What TA-FM and imitation learn from on this batch: its own anchor, else the batch itself."""
    return batch.anchor or Anchor(batch.y, batch.student_cond, batch.teacher_cond, batch.uncond, batch.guided)


# What critic and teacher are asked: one call for all that can be asked together.


def ask_scores(
    nets: Networks, batch: DistillBatch, objective: ObjectiveConfig, x_sigma: Tensor, sigma: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The velocities of critic, teacher, and teacher without its condition (None at guidance 1), without grad.

    The teacher's two are one call; all three are where `nets.scores` is given. A sample that is not guided is asked
    about once: without its condition its velocity counts as what it is with it, and guiding changes nothing.
    """
    critic = Query(x_sigma, sigma, batch.student_cond)
    teacher, rows = _teacher_query(nets, batch, objective, x_sigma, sigma)
    with torch.no_grad():
        if nets.scores is not None:
            v_critic, v_teacher = nets.scores(critic, teacher)
        else:
            v_critic, v_teacher = nets.critic(*critic), nets.teacher(*teacher)
    v_cond, v_uncond = _branches(v_teacher, rows, objective)
    return v_critic, v_cond, v_uncond


@torch.no_grad()
def ask_teacher(
    nets: Networks, batch: DistillBatch | Anchor, objective: ObjectiveConfig, x_sigma: Tensor, sigma: Tensor
) -> Tensor:
    """The teacher's velocity (B, T, C), guided as `objective` says, without grad: one call."""
    query, rows = _teacher_query(nets, batch, objective, x_sigma, sigma)
    v_cond, v_uncond = _branches(nets.teacher(*query), rows, objective)
    if v_uncond is None:
        return v_cond
    return guided_velocity(v_cond, v_uncond, objective.guidance, objective.guidance_rescale)


def _teacher_query(
    nets: Networks, batch: DistillBatch | Anchor, objective: ObjectiveConfig, x_sigma: Tensor, sigma: Tensor
) -> tuple[Query, Tensor]:
    """What the teacher is asked: every sample, then those `rows` that are guided without their condition."""
    guided = range(len(x_sigma)) if batch.guided is None else batch.guided
    rows = torch.tensor([] if objective.guidance == 1.0 else list(guided), dtype=torch.long, device=x_sigma.device)
    if not len(rows):
        return Query(x_sigma, sigma, batch.teacher_cond), rows
    if batch.uncond is None or nets.cat_conds is None:
        what = f"objective.guidance is {objective.guidance:g}, but there is no uncond or no cat_conds"
        raise ValueError(what)
    cond = nets.cat_conds([batch.teacher_cond, batch.uncond])
    return Query(torch.cat([x_sigma, x_sigma[rows]]), torch.cat([sigma, sigma[rows]]), cond), rows


def _branches(v_teacher: Tensor, rows: Tensor, objective: ObjectiveConfig) -> tuple[Tensor, Tensor | None]:
    """The teacher's answers with and without the condition, (B, T, C) each; the latter None at guidance 1."""
    if objective.guidance == 1.0:
        return v_teacher, None
    v_cond, v_guided = v_teacher.split([len(v_teacher) - len(rows), len(rows)])
    return v_cond, v_cond.index_copy(0, rows, v_guided)

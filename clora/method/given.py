"""What the objectives are given: the velocities of a step, and its data.

Shapes: latents (B, T, C) packed tokens in fp32, sigma (B,) fp32 with 1 = noise and 0 = data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from clora.method.flow import Velocity
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

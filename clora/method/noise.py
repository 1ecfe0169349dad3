"""The random numbers of a step: noise levels by their laws, noise, exit steps.

`Draws` says which numbers: those of one process's rows of a batch, on the generator's device. What decides how many
forwards run (exit steps, chances) is drawn alike on all processes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from clora.config import ObjectiveConfig, ScheduleConfig
from clora.method.flow import few_step_sigmas, shift_sigma


class DistillConfig(Protocol):
    """The two sections the objectives read; `clora.config.Config` has them."""

    @property
    def objective(self) -> ObjectiveConfig: ...

    @property
    def schedule(self) -> ScheduleConfig: ...


@dataclass(frozen=True)
class Rows:
    """Samples `start` .. `stop` - 1 of a batch of `total`. `share`: their weight in the batch's mean."""

    start: int
    stop: int
    total: int
    share: float


def split_rows(total: int, rank: int, world: int) -> Rows:
    """The rows of process `rank` of `world`: consecutive, their counts at most one apart.

    Every process runs the same forwards, so that where there are fewer samples than processes those without
    one take the first sample, with share 0.
    """
    start, stop = rank * total // world, (rank + 1) * total // world
    return Rows(start, stop, total, (stop - start) / total) if stop > start else Rows(0, 1, total, 0.0)


@dataclass(frozen=True)
class Draws:
    """Random numbers for one process's rows of a batch (data parallel).

    Every process draws for the whole batch, from a generator of the same state, and keeps its rows: a sample's
    numbers do not depend on how many processes there are, and draws for the batch as a whole (the exit step)
    are equal on all. `anchor_rows`: the rows of the separate batch that TA-FM may have.
    """

    generator: torch.Generator
    rows: Rows
    anchor_rows: Rows | None = None

    @classmethod
    def alone(cls, generator: torch.Generator, count: int) -> Draws:
        """Those of a process that has all `count` samples."""
        return cls(generator, Rows(0, count, count, 1.0))

    def anchors(self) -> Draws:
        """The same generator for the rows of TA-FM's own batch."""
        return self if self.anchor_rows is None else replace(self, rows=self.anchor_rows)

    def whole(self) -> Draws:
        """The same generator for all rows of the batch."""
        return self.alone(self.generator, self.rows.total)

    def own(self, drawn: Tensor) -> Tensor:
        """This process's rows of what was drawn for all `rows.total`."""
        return drawn[self.rows.start : self.rows.stop]


def own_share(loss: Tensor, figures: dict[str, Tensor], draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
    """A mean over this process's rows as its part of the whole batch's mean."""
    share = draws.rows.share
    return (loss, figures) if share == 1.0 else (loss * share, {name: v * share for name, v in figures.items()})


# One sigma a row, (n,) fp32.


def draw_dmd_sigma(objective: ObjectiveConfig, draws: Draws) -> Tensor:
    """The critic's sigma of DMD-BS: uniform in [dmd_sigma_min, dmd_sigma_max), then shifted."""
    return shift_sigma(uniform(objective.dmd_sigma_min, objective.dmd_sigma_max, draws), objective.dmd_sigma_shift)


def draw_ts_critic_sigma(objective: ObjectiveConfig, draws: Draws) -> Tensor:
    """The critic's sigma of DMD-TS: uniform in [dmd_sigma_min, dmd_sigma_max) above tau_min, then shifted."""
    u = uniform(max(objective.tau_min, objective.dmd_sigma_min), objective.dmd_sigma_max, draws)
    return shift_sigma(u, objective.ts_critic_shift)


def draw_ts_gen_sigma(cfg: DistillConfig, draws: Draws) -> Tensor:
    """Target simulation's sigma below tau_max: uniform, or one of the sampler's steps there. None is one of those that
    imitation has alone."""
    tau_max, least = cfg.objective.tau_max, cfg.objective.imitation_below or 0.0
    if cfg.objective.ts_sigma == "continuous":
        return uniform(least, tau_max, draws)
    sigmas = draw_schedule(cfg, draws)
    device = draws.generator.device
    # Some: a configuration whose schedules have none is refused.
    steps = sigmas[(sigmas < tau_max) & (sigmas >= least)].to(device)
    return steps[draws.own(torch.randint(len(steps), (draws.rows.total,), generator=draws.generator, device=device))]


def draw_ta_fm_sigma(cfg: DistillConfig, draws: Draws, sigma_dmd: Tensor | None = None) -> Tensor:
    """TA-FM's sigma: uniform in [0, 1), that shifted, or uniform above sigma_dmd and then shifted (authors).

    `sigma_dmd` is of the whole batch of DMD; None draws it. Where TA-FM has more samples its values are repeated in
    order.
    """
    law = cfg.objective.ta_fm_sigma
    if law == "uniform":
        return uniform(0.0, 1.0, draws)
    if law == "shifted":
        return shift_sigma(uniform(0.0, 1.0, draws), cfg.schedule.shift)
    total = draws.rows.total
    if sigma_dmd is None:
        sigma_dmd = draw_dmd_sigma(cfg.objective, draws.whole())
    floor = draws.own(sigma_dmd.repeat(-(-total // len(sigma_dmd)))[:total])
    return shift_sigma(floor + (1.0 - floor) * uniform(0.0, 1.0, draws), cfg.schedule.shift)


# What is one for the whole batch.


def draw_schedule(cfg: DistillConfig, draws: Draws, imitated: bool = False) -> Tensor:
    """The noise levels of a sampler of one of the step counts that are trained for, fp32, falling, without the final 0.
    `imitated`: of one that has steps for imitation.

    A single count draws nothing.
    """
    counts = imitated_counts(cfg) if imitated else cfg.schedule.trained_counts
    count = counts[exit_step(len(counts), draws)] if len(counts) > 1 else counts[0]
    return few_step_sigmas(count, cfg.schedule.shift)


def matched_steps(cfg: DistillConfig, sigmas: Tensor) -> int:
    """How many of a schedule's steps, the first ones, distribution matching learns: at least one."""
    below = cfg.objective.imitation_below
    return len(sigmas) if below is None else int((sigmas >= below).sum())


def first_imitated(cfg: DistillConfig, sigmas: Tensor) -> int:
    """The first of a schedule's steps that imitation learns."""
    return 0 if cfg.objective.imitation_below is None else matched_steps(cfg, sigmas)


def imitated_counts(cfg: DistillConfig) -> list[int]:
    """The step counts with steps that imitation learns."""
    counts, below = cfg.schedule.trained_counts, cfg.objective.imitation_below
    return [n for n in counts if below is None or few_step_sigmas(n, cfg.schedule.shift)[-1] < below]


def exit_step(num_steps: int, draws: Draws) -> int:
    """The step at which backward simulation leaves the sampler, the same for all samples of a batch."""
    return int(torch.randint(num_steps, (), generator=draws.generator, device=draws.generator.device))


def normal(sample_shape: Sequence[int], draws: Draws) -> Tensor:
    """Standard normal numbers (n, *sample_shape), fp32, for this process's n rows."""
    generator = draws.generator
    return draws.own(torch.randn(draws.rows.total, *sample_shape, generator=generator, device=generator.device))


def fresh_noise(sample_shape: Sequence[int], cfg: DistillConfig, draws: Draws) -> Callable[[int], Tensor] | None:
    """The noise of the moves of a rollout (`simulate.rollout_state`); None where the schedule's sampler adds none."""
    return None if cfg.schedule.sampler == "euler" else lambda _: normal(sample_shape, draws)


def uniform(low: float, high: float, draws: Draws) -> Tensor:
    """(n,) fp32 in [low, high), for this process's n rows."""
    generator = draws.generator
    return low + (high - low) * draws.own(torch.rand(draws.rows.total, generator=generator, device=generator.device))


def chance(share: float, draws: Draws) -> bool:
    """True with this probability."""
    # 0 and 1 draw nothing: a share that is off leaves the other draws as they were.
    generator = draws.generator
    return share >= 1.0 or (share > 0.0 and bool(torch.rand((), generator=generator, device=generator.device) < share))

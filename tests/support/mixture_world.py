"""A world whose velocities are known in closed form, for testing the objectives without training anything.

Base and teachers are Gaussian mixtures in the plane, given a source s ~ N(0, 0.25 I):
- base: two modes at s +- r, where r is a unit vector turned by the instruction (one of four);
- effect i: two modes around 0.5 s + 3 u_i, where the u_i are unit vectors, one a quadrant;
- teacher i: (1 - leak) effect i + leak * base. The leak is what makes gradients vanish far from the effect.
All modes have width `SD`. Latents are (B, 1, 2): one token of two channels; sigma is 1 at noise, 0 at data.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from clora.config import ObjectiveConfig, ScheduleConfig, load_preset

SD = 0.3
NUM_EFFECTS = 4
NUM_INSTRUCTIONS = 4
EFFECTS = tuple(f"effect{i}" for i in range(NUM_EFFECTS))
UNCONDITIONAL = -1  # the instruction of the negative prompt: all instructions at once

Velocity = Callable[[Tensor, Tensor, Any], Tensor]


@dataclass(frozen=True)
class WorldCond:
    """source (B, 2); instruction (B,) long; effects: one name or None (the base) a sample."""

    source: Tensor
    instruction: Tensor
    effects: tuple[str | None, ...]


@dataclass(frozen=True)
class Mixture:
    """means (B, K, 2), weights (B, K) that sum to 1, one width."""

    means: Tensor
    weights: Tensor
    sd: float = SD

    def sample(self, rng: torch.Generator) -> Tensor:
        """One (B, 1, 2) draw a row."""
        k = torch.multinomial(self.weights, 1, generator=rng)
        mean = self.means.gather(1, k[..., None].expand(-1, 1, 2))
        return mean + self.sd * torch.randn(mean.shape, generator=rng, dtype=mean.dtype)

    def velocity(self, x_sigma: Tensor, sigma: Tensor) -> Tensor:
        """E[eps - x0 | x_sigma]: exact, and free of a division by sigma."""
        sigma = sigma.to(x_sigma.dtype)[:, None]
        a = 1 - sigma
        variance = (a * self.sd) ** 2 + sigma**2  # (B, 1)
        offset = x_sigma - a[..., None] * self.means.to(x_sigma.dtype)  # (B, 1, 2) - (B, K, 2)
        logits = self.weights.log().to(x_sigma.dtype) - offset.square().sum(-1) / (2 * variance)
        posterior = logits.softmax(-1)[..., None]
        x0 = self.means + (a * self.sd**2 / variance)[..., None] * offset
        eps = (sigma / variance)[..., None] * offset
        return (posterior * (eps - x0)).sum(1, keepdim=True)


def make_cond(batch_size: int, rng: torch.Generator, effects: tuple[str | None, ...] | None = None) -> WorldCond:
    source = 0.5 * torch.randn(batch_size, 2, generator=rng)
    instruction = torch.randint(NUM_INSTRUCTIONS, (batch_size,), generator=rng)
    return WorldCond(source, instruction, effects or (None,) * batch_size)


def make_effect_cond(batch_size: int, rng: torch.Generator) -> WorldCond:
    return make_cond(batch_size, rng, tuple(EFFECTS[i % NUM_EFFECTS] for i in range(batch_size)))


def without_effects(cond: WorldCond) -> WorldCond:
    return replace(cond, effects=(None,) * len(cond.effects))


def unconditional(cond: WorldCond) -> WorldCond:
    return replace(cond, instruction=torch.full_like(cond.instruction, UNCONDITIONAL))


def cat_conds(conds: list[WorldCond]) -> WorldCond:
    return WorldCond(
        torch.cat([c.source for c in conds]),
        torch.cat([c.instruction for c in conds]),
        tuple(e for c in conds for e in c.effects),
    )


def effect_directions() -> Tensor:
    """(NUM_EFFECTS, 2): u_i."""
    angle = math.pi / 4 + torch.arange(NUM_EFFECTS) * 2 * math.pi / NUM_EFFECTS
    return torch.stack([angle.cos(), angle.sin()], -1)


def effect_centres(cond: WorldCond) -> Tensor:
    """(B, NUM_EFFECTS, 2): the centre of every effect for each source."""
    return 0.5 * cond.source[:, None] + 3 * effect_directions()


def base_mixture(cond: WorldCond) -> Mixture:
    """Two modes a row for its instruction; under the negative prompt, the eight of all instructions."""
    angle = torch.arange(2 * NUM_INSTRUCTIONS) * math.pi / NUM_INSTRUCTIONS  # mode j and j + 4 are opposite
    means = cond.source[:, None] + torch.stack([angle.cos(), angle.sin()], -1)
    mine = torch.arange(2 * NUM_INSTRUCTIONS) % NUM_INSTRUCTIONS == cond.instruction[:, None]
    mine = mine | (cond.instruction[:, None] == UNCONDITIONAL)
    return Mixture(means, mine / mine.sum(1, keepdim=True))


def effect_mixture(cond: WorldCond) -> Mixture:
    """Two modes 0.5 either side of the asked effect's centre; the base where no effect is asked."""
    index = torch.tensor([-1 if name is None else EFFECTS.index(name) for name in cond.effects])
    u = effect_directions()[index]
    centre, sideways = 0.5 * cond.source + 3 * u, 0.5 * torch.stack([-u[:, 1], u[:, 0]], -1)
    modes = torch.stack([centre - sideways, centre + sideways], 1)
    base = base_mixture(cond)
    asked = (index >= 0)[:, None]
    means = torch.cat([torch.where(asked[..., None], modes, base.means[:, :2]), base.means[:, 2:]], 1)
    of_effect = torch.zeros_like(base.weights)
    of_effect[:, :2] = 0.5
    return Mixture(means, torch.where(asked, of_effect, base.weights))


def teacher_mixture(cond: WorldCond, leak: float) -> Mixture:
    base, effect = base_mixture(cond), effect_mixture(cond)
    asked = torch.tensor([[float(name is not None)] for name in cond.effects])
    w = leak * asked
    weights = torch.cat([(1 - w) * effect.weights, w * base.weights], 1)
    return Mixture(torch.cat([effect.means, base.means], 1), weights)


def base_velocity(x_sigma: Tensor, sigma: Tensor, cond: WorldCond) -> Tensor:
    return base_mixture(cond).velocity(x_sigma, sigma)


def teacher_velocity(leak: float) -> Velocity:
    return lambda x_sigma, sigma, cond: teacher_mixture(cond, leak).velocity(x_sigma, sigma)


def energy_distance(x: Tensor, y: Tensor) -> float:
    """2 E|x - y| - E|x - x'| - E|y - y'| of two (N, ...) samples; 0 when they have one law."""
    x, y = x.flatten(1), y.flatten(1)
    n, m = len(x), len(y)
    within = torch.cdist(x, x).sum() / (n * (n - 1)) + torch.cdist(y, y).sum() / (m * (m - 1))
    return float(2 * torch.cdist(x, y).mean() - within)


def config(preset: str = "paper", **objective: Any) -> SimpleNamespace:
    """A preset's objective, without guidance unless asked, on the design's schedule."""
    values = {**_objective_of(preset), "guidance": 1.0, "dmd_norm_floor": 1e-3, **objective}
    return SimpleNamespace(objective=ObjectiveConfig(**values), schedule=ScheduleConfig(step_counts=None))


@cache
def _objective_of(preset: str) -> dict[str, Any]:
    return dict(load_preset(preset)["objective"])

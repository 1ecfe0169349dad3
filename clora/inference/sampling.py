"""How images are sampled: settings, guidance, and one way to do it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from clora.backbones.base import Backbone
from clora.backbones.cond import Cond, cat_conds
from clora.config import Config, build_config
from clora.data.examples import Example, collate
from clora.lora.catalogue import Catalogue
from clora.method.flow import Velocity, few_step_sigmas
from clora.method.losses import guided_velocity
from clora.method.samplers import few_step_sample, ode_sample

Slots = Callable[[Sequence[str | None]], Sequence[Any]]


def guided_teacher_velocity(backbone: Backbone, slots_for: Slots, guidance: float, rescale: str) -> Velocity:
    """A velocity over conds `(cond, uncond)`: each sample's teacher, guided, both branches in one forward."""

    def velocity(x_BTC: Tensor, sigma_B: Tensor, conds: tuple[Cond, Cond]) -> Tensor:
        cond, uncond = conds
        if guidance == 1.0:
            return backbone.velocity(x_BTC, sigma_B, cond, slots_for(cond.effects))
        both = cat_conds([cond, uncond])
        v = backbone.velocity(x_BTC.repeat(2, 1, 1), sigma_B.repeat(2), both, slots_for(both.effects))
        v_cond, v_uncond = v.chunk(2)
        return guided_velocity(v_cond, v_uncond, guidance, "norm" if rescale == "norm" else "none")

    return velocity


@dataclass(frozen=True)
class Sampling:
    """How images are sampled. consistency: noise afresh to every next sigma; euler: follow the velocity.

    guidance 1 is none; above, the stock pipeline's (unconditional branch of `negative_prompt`, each token
    rescaled to the norm of the conditional branch).
    """

    sampler: Literal["consistency", "euler"]
    num_steps: int
    shift: float
    guidance: float = 1.0
    negative_prompt: str = " "


def default_sampling(base: str, catalogue: Catalogue | None) -> Sampling:
    """The catalogue's schedule; without a catalogue what the base's preset says of making targets."""
    if catalogue is not None:
        return Sampling(catalogue.sampler, catalogue.schedule.num_steps, catalogue.schedule.shift)
    preset = build_config({"base": base, "output_dir": "."})
    targets, negative = preset.targets, preset.objective.negative_prompt
    return Sampling("euler", targets.num_steps, preset.schedule.shift, targets.guidance, negative)


SlotsFor = Callable[[Sequence[str | None]], Sequence[Any]]


@dataclass(frozen=True)
class Method:
    """How one method samples. `num_loras` is what must be kept ready to serve all effects."""

    name: str
    num_loras: int
    num_steps: int
    guidance: float  # 1: one forward a step
    consistency: bool
    role: str  # which prompt it reads
    slots_for: SlotsFor

    @property
    def nfe(self) -> int:
        """Forwards of the transformer per image."""
        return self.num_steps * (1 if self.guidance == 1.0 else 2)


@torch.no_grad()
def sample_method(
    backbone: Backbone,
    config: Config,
    method: Method,
    batch: Sequence[Example],
    seeds: Sequence[int],
) -> Tensor:
    """Images (B, 3, H, W) in [0, 1] of one batch of examples (equal sizes), one seed per sample."""
    shape = (batch[0].num_tokens, backbone.token_channels)
    cond = collate(batch, method.role, backbone.device)
    if method.consistency:
        sigmas = few_step_sigmas(method.num_steps, config.schedule.shift)
        slots = method.slots_for(cond.effects)

        def velocity(x_BTC: Tensor, sigma_B: Tensor, given: Cond) -> Tensor:
            return backbone.velocity(x_BTC, sigma_B, given, slots)

        x0 = few_step_sample(velocity, cond, shape, sigmas, seeds, backbone.device)
    else:
        guided = guided_teacher_velocity(backbone, method.slots_for, method.guidance, config.objective.guidance_rescale)
        both = (cond, collate(batch, "negative", backbone.device))
        shift = config.schedule.shift
        x0 = ode_sample(guided, both, shape, method.num_steps, shift, seeds, backbone.device)
    return backbone.decode(x0, batch[0].grid)

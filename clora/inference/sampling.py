"""How images are sampled: the settings, and the one way to do it that editing, targets, previews and evaluation share.

Shape legend: B batch, T tokens, C latent channels per token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from clora.backbones.base import Backbone
from clora.backbones.cond import Cond, cat_conds
from clora.config import Config, Sampler
from clora.lora.slots import Slot
from clora.method.flow import Velocity, few_step_sigmas
from clora.method.losses import GuidanceRescale, guided_velocity
from clora.method.samplers import few_step_sample, ode_sample

SlotsFor = Callable[[Sequence[str | None]], Sequence[Slot]]
"""The slots of a batch's effects: one per sample, or a single one for all."""


@dataclass(frozen=True)
class Sampling:
    """How images are sampled. consistency: noise afresh to every next sigma; euler: follow the velocity.

    shift: of `few_step_sigmas`; None takes the noise levels of the base's own pipeline, which may depend on the size of
    the image. guidance 1 is none; above, `negative_prompt` is the unconditional branch, and with rescale "norm" each
    token gets the norm of the conditional branch, as in the stock pipeline.
    """

    sampler: Sampler
    num_steps: int
    shift: float | None
    guidance: float = 1.0
    rescale: GuidanceRescale = "norm"
    negative_prompt: str = " "

    @property
    def is_guided(self) -> bool:
        return self.guidance != 1.0

    @property
    def num_forwards(self) -> int:
        """Forwards of the transformer per image."""
        return self.num_steps * (2 if self.is_guided else 1)

    def changed(self, steps: int | None, guidance: float | None) -> Sampling:
        """The same with another number of steps or another guidance, where one is given."""
        return replace(
            self,
            num_steps=self.num_steps if steps is None else steps,
            guidance=self.guidance if guidance is None else guidance,
        )


def few_step_sampling(num_steps: int, shift: float, sampler: Sampler = "consistency") -> Sampling:
    """How a distilled LoRA is sampled: its own schedule and sampler, no guidance."""
    return Sampling(sampler, num_steps, shift)


def teacher_sampling(config: Config) -> Sampling:
    """How a teacher is sampled: what `targets` says, by default as the base's own pipeline does it."""
    targets = config.targets
    return Sampling(
        "euler",
        targets.num_steps,
        targets.shift,
        targets.guidance,
        targets.guidance_rescale,
        config.objective.negative_prompt,
    )


def sampling_sigmas(backbone: Backbone, sampling: Sampling, num_tokens: int) -> Tensor:
    """The noise levels of one sampling, fp32 (num_steps,), without the final 0."""
    if sampling.shift is None:
        return backbone.own_sigmas(sampling.num_steps, num_tokens)
    return few_step_sigmas(sampling.num_steps, sampling.shift)


@torch.no_grad()
def sample(
    backbone: Backbone,
    cond: Cond,
    slots: Sequence[Slot],
    sampling: Sampling,
    seeds: Sequence[int],
    uncond: Cond | None = None,
    *,
    pipeline_noise: bool = False,
) -> Tensor:
    """Latents x0 (B, T, C), fp32, of one batch: `cond` holds its prompts, references and the size of the result.

    slots: one per sample or a single one, as in `Adapters.use`. seeds: one per sample, which alone decides its noise.
    uncond: the same with the negative prompt, needed where `sampling` is guided; both branches go through the model in
    one forward. pipeline_noise: the initial noise in the stock pipeline's order, so that a seed means one image here
    and there.

    Raises ValueError for guidance without `uncond`, FloatingPointError where the model's output is not finite.
    """
    if not sampling.is_guided:
        return follow(backbone, partial(backbone.velocity, slots=slots), cond, sampling, seeds, pipeline_noise)
    if uncond is None:
        raise ValueError(f"guidance {sampling.guidance} needs the condition of the negative prompt")
    both, both_slots = cat_conds([cond, uncond]), list(slots) if len(slots) == 1 else [*slots, *slots]

    def guided(x_BTC: Tensor, sigma_B: Tensor, _: Cond) -> Tensor:
        v = backbone.velocity(x_BTC.repeat(2, 1, 1), sigma_B.repeat(2), both, both_slots)
        v_cond, v_uncond = v.chunk(2)
        return guided_velocity(v_cond, v_uncond, sampling.guidance, sampling.rescale)

    return follow(backbone, guided, cond, sampling, seeds, pipeline_noise)


@torch.no_grad()
def follow(
    backbone: Backbone,
    velocity: Velocity,
    cond: Cond,
    sampling: Sampling,
    seeds: Sequence[int],
    pipeline_noise: bool = False,
) -> Tensor:
    """`sample` for a velocity that is at hand, guided already where guidance is wanted."""
    height, width = cond.grid
    shape_TC = (height * width, backbone.token_channels)
    sigmas = sampling_sigmas(backbone, sampling, height * width)
    sampler = few_step_sample if sampling.sampler == "consistency" else ode_sample
    grid = cond.grid if pipeline_noise else None
    return sampler(velocity, cond, shape_TC, sigmas, seeds, backbone.device, grid=grid)

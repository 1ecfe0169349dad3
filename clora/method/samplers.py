"""Sampling: the few-step consistency loop (compiled, with its Python reference) and the ordinary ODE sampler.

Shape legend: B batch, T tokens, C latent channels per token, S steps.

Noise comes from one CPU generator per sample, seeded with that sample's seed: the first draw is the initial
noise, then one draw per step follows. A sample therefore depends on its seed alone, not on the batch it is in
or the device it runs on, and equals what diffusers' FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
computes with the same generators.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from clora import _C
from clora.method.flow import Velocity, consistency_step, euler_step, x0_from_velocity

OnStep = Callable[[int, float, Tensor], None]
"""on_step(step, sigma, x0_BTC), called at each step with the data predicted there; raising ends the loop."""


def noise_generators(seeds: Sequence[int]) -> list[torch.Generator]:
    """One generator per sample, on the CPU so that a seed means the same noise on every device."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def draw_noise(generators: Sequence[torch.Generator], shape_TC: tuple[int, int]) -> Tensor:
    """The next draw of every sample, N(0, 1): fp32 (B, T, C) on the CPU."""
    return torch.stack([torch.randn(shape_TC, generator=generator) for generator in generators])


def sample_noise(seeds: Sequence[int], num_draws: int, shape_TC: tuple[int, int]) -> Iterator[Tensor]:
    """Yield `num_draws` draws of fp32 (B, T, C), one at a time: the initial noise, then one for each step."""
    generators = noise_generators(seeds)
    for _ in range(num_draws):
        yield draw_noise(generators, shape_TC)


def pipeline_order(noise_BTC: Tensor, grid: tuple[int, int]) -> Tensor:
    """Reorder an initial draw as the stock Qwen-Image pipelines do, so that one seed gives one image in both.

    They draw the initial noise as an unpacked latent (C/4, 2h, 2w) and pack its 2x2 patches into tokens;
    later draws are packed already. `grid` is (h, w) in tokens. Raises ValueError unless T = h w and 4
    divides C.
    """
    batch, tokens, channels = noise_BTC.shape
    h, w = grid
    if tokens != h * w or channels % 4:
        raise ValueError(f"{tokens} tokens of {channels} channels are no {h}x{w} grid of 2x2 latent patches")
    patches = noise_BTC.reshape(batch, channels // 4, h, 2, w, 2)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(batch, tokens, channels)


def _initial_noise(
    generators: Sequence[torch.Generator], shape_TC: tuple[int, int], grid: tuple[int, int] | None
) -> Tensor:
    noise_BTC = draw_noise(generators, shape_TC)
    return noise_BTC if grid is None else pipeline_order(noise_BTC, grid)


def few_step_sample(
    velocity: Velocity,
    cond: Any,
    shape_TC: tuple[int, int],
    sigmas: Tensor | Sequence[float],
    seeds: Sequence[int],
    device: torch.device | str = "cpu",
    on_step: OnStep | None = None,
    *,
    grid: tuple[int, int] | None = None,
) -> Tensor:
    """Draw len(seeds) samples in len(sigmas) forwards: predict x0, noise it afresh to the next sigma, repeat.

    velocity: (x (B, T, C) fp32, sigma_B fp32, cond) -> (B, T, C), any float dtype. x is a buffer that the
        loop writes again after the call: clone it to keep it.
    sigmas: (S,), strictly falling within (0, 1], without the final 0: see `flow.few_step_sigmas`.
    grid: (h, w) in tokens to order the initial noise as the stock pipelines do (`pipeline_order`), so that an
        fp32 pipeline given the same seed makes the same sample; None leaves it as drawn.
    Returns x0 (B, T, C) fp32 on `device`. The loop is compiled and equals `few_step_sample_ref` bit for bit
    on the CPU. Raises ValueError (shapes, sigmas, no seeds) and FloatingPointError naming step and sample
    when the velocity is not finite.
    """
    if not seeds:
        raise ValueError("seeds is empty; give one seed per sample")
    generators = noise_generators(seeds)
    noise_BTC = _initial_noise(generators, shape_TC, grid).to(device)

    def velocity_of(x_BTC: Tensor, sigma_B: Tensor) -> Tensor:
        return velocity(x_BTC, sigma_B, cond)

    levels = torch.as_tensor(sigmas, dtype=torch.float32)
    return _C.sample(velocity_of, noise_BTC, generators, levels, on_step)


@torch.no_grad()
def few_step_sample_ref(
    velocity: Velocity,
    cond: Any,
    shape_TC: tuple[int, int],
    sigmas: Tensor | Sequence[float],
    seeds: Sequence[int],
    device: torch.device | str = "cpu",
    on_step: OnStep | None = None,
    *,
    grid: tuple[int, int] | None = None,
) -> Tensor:
    """What `few_step_sample` computes, as a plain loop over `flow.consistency_step`."""
    generators = noise_generators(seeds)
    x = _initial_noise(generators, shape_TC, grid).to(device)
    for step, sigma, sigma_next in _steps(torch.as_tensor(sigmas, dtype=torch.float32), x):
        v = _checked_velocity(velocity(x, sigma, cond), x, step, sigma)
        if on_step is not None:
            on_step(step, sigma[0].item(), x0_from_velocity(x, v, sigma))
        eps = draw_noise(generators, shape_TC).to(device) if sigma_next.any() else None
        x = consistency_step(x, v, sigma, sigma_next, eps)
    return x


@torch.no_grad()
def ode_sample(
    velocity: Velocity,
    cond: Any,
    shape_TC: tuple[int, int],
    sigmas: Tensor | Sequence[float],
    seeds: Sequence[int],
    device: torch.device | str = "cpu",
    on_step: OnStep | None = None,
    *,
    grid: tuple[int, int] | None = None,
) -> Tensor:
    """The ordinary sampler of an undistilled model: len(sigmas) Euler steps of dx/dsigma = velocity, down to 0.

    velocity is already guided where guidance is wanted. `few_step_sigmas(num_steps, shift)` are the levels of
    diffusers' FlowMatchEulerDiscreteScheduler(shift=shift) given sigmas 1, (n-1)/n, ..., 1/n by a pipeline.
    Noise is drawn once per sample, as `few_step_sample` draws its first. Returns x0 (B, T, C) fp32 on
    `device`. Raises as `few_step_sample` does.
    """
    if not seeds:
        raise ValueError("seeds is empty; give one seed per sample")
    x = _initial_noise(noise_generators(seeds), shape_TC, grid).to(device)
    for step, sigma, sigma_next in _steps(torch.as_tensor(sigmas, dtype=torch.float32), x):
        v = _checked_velocity(velocity(x, sigma, cond), x, step, sigma)
        if on_step is not None:
            on_step(step, sigma[0].item(), x0_from_velocity(x, v, sigma))
        x = euler_step(x, v, sigma, sigma_next)
    return x


def _steps(sigmas: Tensor, x: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield (step, sigma_B, sigma_next_B) down to 0 for the batch of x, on its device."""
    levels_SB = torch.cat([sigmas, sigmas.new_zeros(1)]).to(x.device)[:, None].expand(-1, x.shape[0])
    for step in range(len(sigmas)):
        yield step, levels_SB[step], levels_SB[step + 1]


def _checked_velocity(v: Tensor, x: Tensor, step: int, sigma_B: Tensor) -> Tensor:
    """v in the dtype of x; raises the errors of the compiled loop, in its words."""
    if v.shape != x.shape:
        raise ValueError(
            f"velocity returned shape {list(v.shape)} for x of shape {list(x.shape)} at step {step}; "
            "the two must be equal"
        )
    v = v.to(x.dtype)
    finite_B = torch.isfinite(v).flatten(1).all(1)
    if not finite_B.all():
        sample = finite_B.tolist().index(False)
        sigma = sigma_B[sample].item()
        raise FloatingPointError(f"velocity is not finite at step {step} (sigma {sigma:.6f}), sample {sample}")
    return v

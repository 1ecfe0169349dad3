"""The noise convention of the whole package: straight paths between data and noise (rectified flow).

sigma is fp32 in [0, 1]: 1 is pure noise, 0 is data. With data x0 and eps ~ N(0, I):

    x_sigma  = (1 - sigma) x0 + sigma eps
    velocity = eps - x0                       (d x_sigma / d sigma)
    x0       = x_sigma - sigma velocity

Shape legend: B batch; `x` stands for any (B, ...), usually packed latents (B, T, C). A sigma argument is
(B,), or 0-d for the whole batch, and broadcasts over the trailing dimensions. Results follow torch's type
promotion, so half-precision latents with sigmas (B,) in fp32 give fp32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from clora.kernels.renoise import renoise

Velocity = Callable[[Tensor, Tensor, Any], Tensor]
"""velocity(x_sigma, sigma_B, cond) -> predicted velocity, shaped like x_sigma."""


def _over(sigma: Tensor, x: Tensor) -> Tensor:
    """sigma (B,) or () with the trailing dimensions of x appended, each of size 1."""
    if sigma.dim() == 0:
        return sigma
    if sigma.dim() != 1 or sigma.shape[0] != x.shape[0]:
        raise ValueError(
            f"sigma has shape {tuple(sigma.shape)} for x of shape {tuple(x.shape)}; "
            f"give one per sample, shape ({x.shape[0]},)"
        )
    return sigma.reshape(-1, *(1 for _ in x.shape[1:]))


def add_noise(x0: Tensor, eps: Tensor, sigma: Tensor) -> Tensor:
    """x_sigma = (1 - sigma) x0 + sigma eps, shaped like x0 (the paper's Eq. 2 with t = 1 - sigma)."""
    s = _over(sigma, x0)
    return (1.0 - s) * x0 + s * eps


def velocity_target(x0: Tensor, eps: Tensor) -> Tensor:
    """velocity = eps - x0, shaped like x0: what a model regresses to (Eq. 2 and 6 with the sign turned)."""
    return eps - x0


def x0_from_velocity(x_sigma: Tensor, velocity: Tensor, sigma: Tensor) -> Tensor:
    """x0 = x_sigma - sigma velocity, shaped like x_sigma: the data that a velocity points back to."""
    return x_sigma - _over(sigma, x_sigma) * velocity


def velocity_from_x0(x_sigma: Tensor, x0: Tensor, sigma: Tensor) -> Tensor:
    """velocity = (x_sigma - x0) / sigma, shaped like x_sigma, for sigma > 0 (0 holds no noise to infer)."""
    return (x_sigma - x0) / _over(sigma, x_sigma)


def shift_sigma(u: Tensor, shift: float) -> Tensor:
    """shift u / (1 + (shift - 1) u): moves u in [0, 1] toward noise for shift > 1. Apply it once."""
    return shift * u / (1.0 + (shift - 1.0) * u)


def few_step_sigmas(num_steps: int = 8, shift: float = 3.0) -> Tensor:
    """The noise levels of a sampler, fp32 (num_steps,): u = 1, (n-1)/n, ..., 1/n through `shift_sigma`.

    For 8 steps and shift 3: 1, .9545, .9, .8333, .75, .6429, .5, .3. They stay floats and are never rounded
    to integer timesteps. The final 0 is left out; samplers add it. Raises ValueError for num_steps < 1 or
    shift <= 0.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps is {num_steps}; at least 1 is needed")
    if not shift > 0:
        raise ValueError(f"shift is {shift}; it must be positive")
    u = torch.arange(num_steps, 0, -1, dtype=torch.float64) / num_steps
    return shift_sigma(u, shift).float()


def euler_step(x_sigma: Tensor, velocity: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
    """x at sigma_next = x_sigma + (sigma_next - sigma) velocity: one Euler step of dx/dsigma = velocity."""
    return x_sigma + _over(sigma_next - sigma, x_sigma) * velocity


def consistency_step(
    x_sigma: Tensor, velocity: Tensor, sigma: Tensor, sigma_next: Tensor, eps: Tensor | None
) -> Tensor:
    """x at sigma_next: predict the data, then noise it afresh (stochastic sampling in diffusers' scheduler).

    x0 = x_sigma - sigma velocity; returns (1 - sigma_next) x0 + sigma_next eps, which is x0 where sigma_next
    is 0. eps is fresh N(0, I) shaped like x_sigma; None is right for a step to 0 only, else ValueError.
    """
    if eps is not None:
        batch = x_sigma.shape[:1]
        return renoise(x_sigma, velocity, sigma.expand(batch), sigma_next.expand(batch), eps)[1]
    if bool((sigma_next != 0).any()):
        raise ValueError(f"eps is None, but sigma_next is {sigma_next.tolist()}; only a step to 0 needs none")
    return x0_from_velocity(x_sigma, velocity, sigma)

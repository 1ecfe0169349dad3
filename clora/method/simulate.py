"""How the student's samples are made for distribution matching: from noise, or from a target image.

Shapes: latents (B, T, C), sigma (B,) fp32 with 1 = noise and 0 = data (`clora.method.flow`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from clora.method.flow import Velocity, add_noise, consistency_step, euler_step, x0_from_velocity


@torch.no_grad()
def rollout_state(
    velocity: Velocity,
    cond: Any,
    eps_first: Tensor,
    step: int,
    sigmas: Tensor,
    fresh_noise: Callable[[int], Tensor] | None,
) -> Tensor:
    """The state x (B, T, C) at sigmas[step] at which few-step inference arrives: `step` forwards, without grad.

    Args:
        eps_first: (B, T, C) standard normal, the state at sigmas[0] == 1.
        step: 0 .. num_steps - 1, shared by the batch.
        sigmas: (num_steps,) fp32, falling, without the closing 0 (`flow.few_step_sigmas`).
        fresh_noise: `fresh_noise(k)` gives the (B, T, C) noise of the move from step k to step k + 1, before which x0
            is predicted (`flow.consistency_step`); None moves by deterministic Euler steps.

    Raises:
        ValueError: step is outside the schedule.
    """
    if not 0 <= step < len(sigmas):
        raise ValueError(f"step {step} is outside a schedule of {len(sigmas)} steps")
    x_sigma = eps_first
    for k in range(step):
        sigma, sigma_next = _level(sigmas, k, x_sigma), _level(sigmas, k + 1, x_sigma)
        noise = None if fresh_noise is None else partial(fresh_noise, k)
        x_sigma = _next_state(x_sigma, velocity(x_sigma, sigma, cond), sigma, sigma_next, noise)
    return x_sigma


def backward_simulate(
    velocity: Velocity,
    cond: Any,
    eps_first: Tensor,
    step: int,
    sigmas: Tensor,
    fresh_noise: Callable[[int], Tensor] | None,
) -> tuple[Tensor, Tensor]:
    """The sample that few-step inference would have at `step` (Sec. 3; Eq. 1's x_g): noise in, x0 out.

    Leaves the sampler at `step`: step + 1 forwards. Only the last one carries grad; the state it starts from is a
    constant (`rollout_state`, whose arguments these are), as in DMD2.

    Returns:
        x0 (B, T, C) predicted at `step`, and that step's sigma (B,).
    """
    x_sigma = rollout_state(velocity, cond, eps_first, step, sigmas, fresh_noise)
    sigma = _level(sigmas, step, x_sigma)
    return x0_from_velocity(x_sigma, velocity(x_sigma, sigma, cond), sigma), sigma


def backward_simulate_together(
    velocity: Velocity,
    conds: Sequence[Any],
    cat_conds: Callable[[Sequence[Any]], Any],
    eps_first: Sequence[Tensor],
    steps: Sequence[int],
    sigmas: Sequence[Tensor],
    fresh_noise: Callable[[int, int], Tensor] | None,
) -> list[Tensor]:
    """The x0 of `backward_simulate` for several batches, without grad, in one forward a sampler step for all.

    Args:
        conds, eps_first, steps, sigmas: each batch's own. `cat_conds` joins conditions along the batch.
        fresh_noise: `fresh_noise(i, k)` gives batch i's noise of the move from step k to step k + 1; None as there.

    Returns:
        Each batch's x0, predicted at its own step.
    """
    states = list(eps_first)
    with torch.no_grad():
        for k in range(max(steps) + 1):
            going = [i for i, step in enumerate(steps) if step >= k]
            x_sigma = torch.cat([states[i] for i in going])
            sigma = torch.cat([_level(sigmas[i], k, states[i]) for i in going])
            v = velocity(x_sigma, sigma, cat_conds([conds[i] for i in going]))
            for i, v_i in zip(going, v.split([len(states[i]) for i in going]), strict=True):
                if k == steps[i]:
                    states[i] = x0_from_velocity(states[i], v_i, _level(sigmas[i], k, v_i))
                else:
                    noise = None if fresh_noise is None else partial(fresh_noise, i, k)
                    ends = _level(sigmas[i], k, v_i), _level(sigmas[i], k + 1, v_i)
                    states[i] = _next_state(states[i], v_i, *ends, noise)
    return states


def _level(sigmas: Tensor, step: int, x: Tensor) -> Tensor:
    """Where `step` begins, for each sample of x: (B,)."""
    return sigmas[step].to(x.device).expand(len(x))


def _next_state(
    x_sigma: Tensor, v: Tensor, sigma: Tensor, sigma_next: Tensor, noise: Callable[[], Tensor] | None
) -> Tensor:
    if noise is None:
        return euler_step(x_sigma, v, sigma, sigma_next)
    return consistency_step(x_sigma, v, sigma, sigma_next, noise())


def target_simulate(velocity: Velocity, y: Tensor, cond: Any, sigma_gen_B: Tensor, eps: Tensor) -> Tensor:
    """The student's reconstruction of a target noised to `sigma_gen` (Eq. 7's y-hat): one forward, with grad.

    Args:
        y: (B, T, C), the teacher's image.
        sigma_gen_B: (B,), each below tau_max so that y-hat stays in the teacher's domain.
        eps: (B, T, C) standard normal.

    Returns:
        y-hat, (B, T, C).
    """
    y_sigma = add_noise(y, eps, sigma_gen_B)
    return x0_from_velocity(y_sigma, velocity(y_sigma, sigma_gen_B, cond), sigma_gen_B)

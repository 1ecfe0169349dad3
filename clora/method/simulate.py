"""How the student's samples are made for distribution matching: from noise, or from a target image.

Shapes: latents (B, T, C), sigma (B,) fp32 with 1 = noise and 0 = data (`clora.method.flow`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from clora.method.flow import Velocity, add_noise, consistency_step, x0_from_velocity


def backward_simulate(
    velocity: Velocity,
    cond: Any,
    eps_first: Tensor,
    step: int,
    sigmas: Tensor,
    fresh_noise: Callable[[int], Tensor],
) -> tuple[Tensor, Tensor]:
    """The sample that few-step inference would have at `step` (Sec. 3; Eq. 1's x_g): noise in, x0 out.

    Runs steps 0 .. step - 1 of the sampler without grad (predict x0, re-noise to the next sigma with fresh
    noise) and leaves at `step`: step + 1 forwards. Only the last one carries grad; the state it starts from
    is a constant, as in DMD2.

    Args:
        eps_first: (B, T, C) standard normal, the state at sigmas[0] == 1.
        step: 0 .. num_steps - 1, shared by the batch.
        sigmas: (num_steps,) fp32, falling, without the closing 0 (`flow.few_step_sigmas`).
        fresh_noise: `fresh_noise(k)` gives the (B, T, C) noise of the move from step k to step k + 1.

    Returns:
        x0 (B, T, C) predicted at `step`, and that step's sigma (B,).

    Raises:
        ValueError: step is outside the schedule.
    """
    if not 0 <= step < len(sigmas):
        raise ValueError(f"step {step} is outside a schedule of {len(sigmas)} steps")
    sigmas_SB = sigmas.to(eps_first.device)[:, None].expand(-1, eps_first.shape[0])
    x_sigma = eps_first
    with torch.no_grad():
        for k in range(step):
            v = velocity(x_sigma, sigmas_SB[k], cond)
            x_sigma = consistency_step(x_sigma, v, sigmas_SB[k], sigmas_SB[k + 1], fresh_noise(k))
    v = velocity(x_sigma, sigmas_SB[step], cond)
    return x0_from_velocity(x_sigma, v, sigmas_SB[step]), sigmas_SB[step]


def backward_simulate_together(
    velocity: Velocity,
    conds: Sequence[Any],
    cat_conds: Callable[[Sequence[Any]], Any],
    eps_first: Sequence[Tensor],
    steps: Sequence[int],
    sigmas: Tensor,
    fresh_noise: Callable[[int, int], Tensor],
) -> list[Tensor]:
    """The x0 of `backward_simulate` for several batches, without grad, in one forward a sampler step for all.

    Args:
        conds, eps_first, steps: each batch's own. `cat_conds` joins conditions along the batch.
        fresh_noise: `fresh_noise(i, k)` gives batch i's noise of the move from step k to step k + 1.

    Returns:
        Each batch's x0, predicted at its own step.
    """
    states = list(eps_first)
    sigmas = sigmas.to(states[0].device)
    with torch.no_grad():
        for k in range(max(steps) + 1):
            going = [i for i, step in enumerate(steps) if step >= k]
            x_sigma = torch.cat([states[i] for i in going])
            v = velocity(x_sigma, sigmas[k].expand(len(x_sigma)), cat_conds([conds[i] for i in going]))
            for i, v_i in zip(going, v.split([len(states[i]) for i in going]), strict=True):
                sigma = sigmas[k].expand(len(v_i))
                if k == steps[i]:
                    states[i] = x0_from_velocity(states[i], v_i, sigma)
                else:
                    sigma_next = sigmas[k + 1].expand(len(v_i))
                    states[i] = consistency_step(states[i], v_i, sigma, sigma_next, fresh_noise(i, k))
    return states


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

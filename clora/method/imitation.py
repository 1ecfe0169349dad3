"""Imitation: the student takes the routed teacher's velocity as its target at states of its own. No critic.

Flow matching on images (Eq. 6) has the instantaneous velocity as its optimum, which few Euler steps cannot follow where
an effect has several outcomes. Two targets whose optimum few steps can follow:

- **segment mean** (`segment_mean_loss`): the mean of the teacher's velocity along the straight path that the student
  itself takes in this step. The idea is pi-Flow's imitation (arXiv 2510.14974) with the trivial policy, one velocity a
  step. Sampled by deterministic Euler steps;
- **same step** (`same_step_loss`): a teacher that samples in few steps already, an effect's LoRA with an acceleration
  LoRA on top, asked at the same state and sigma (D-OPSD, arXiv 2605.05204, with a real teacher).

Both are 0 when solved, so that they measure what is still to learn of each effect.

Shapes: latents (B, T, C), sigma (B,) fp32 with 1 = noise and 0 = data (`clora.method.flow`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from clora.method.flow import Velocity, euler_step
from clora.method.losses import Figures

LEAST_SIGMA = 0.004  # below it the teacher's velocity is rounding noise


def step_interval(sigmas: Tensor, step_B: Tensor) -> tuple[Tensor, Tensor]:
    """Where each sample's step begins and ends: (sigma, sigma_next), (B,) each, sigma_next 0 for the last step.

    Args:
        sigmas: (num_steps,), falling, without the closing 0 (`flow.few_step_sigmas`).
        step_B: (B,) long, each 0 .. num_steps - 1.
    """
    levels = torch.cat([sigmas, sigmas.new_zeros(1)]).to(step_B.device)
    return levels[step_B], levels[step_B + 1]


@torch.no_grad()
def euler_rollout(velocity: Velocity, cond: Any, eps: Tensor, step: int, sigmas: Tensor) -> Tensor:
    """The state (B, T, C) at which deterministic sampling arrives before `step`: `step` forwards from noise eps."""
    levels_SB = sigmas.to(eps.device)[:, None].expand(-1, len(eps))
    x_sigma = eps
    for k in range(step):
        x_sigma = euler_step(x_sigma, velocity(x_sigma, levels_SB[k], cond), levels_SB[k], levels_SB[k + 1])
    return x_sigma


def segment_mean_loss(
    student: Callable[[Tensor, Tensor], Tensor],
    teacher: Callable[[Tensor, Tensor], Tensor],
    x_sigma: Tensor,
    sigma: Tensor,
    sigma_next: Tensor,
    u: Tensor,
) -> tuple[Tensor, Figures]:
    """|| v_S(x_s, s) - sg v_T(x_s + (t - s) sg v_S(x_s, s), t) ||^2 with t = s + u (s_next - s).

    Its optimum at x_s is the v that equals the mean over t of the teacher's velocity along the student's own chord.

    Args:
        student, teacher: velocities at (x, sigma), conditions bound; the teacher guided where guidance is wanted.
        x_sigma: (B, T, C), a state of the student's path or a noised image; a constant.
        sigma, sigma_next: (B,), the step's beginning and end.
        u: (B,) in [0, 1), uniform draws: where on the step the teacher is asked.

    Returns:
        The mean over all elements, and `{"per_sample": (B,)}`.
    """
    v_student = student(x_sigma, sigma)
    with torch.no_grad():
        t = (sigma + u * (sigma_next - sigma)).clamp_min(LEAST_SIGMA)
        v_teacher = teacher(euler_step(x_sigma, v_student.detach(), sigma, t), t)
    return _squared_error(v_student, v_teacher)


def same_step_loss(
    student: Callable[[Tensor, Tensor], Tensor],
    teacher: Callable[[Tensor, Tensor], Tensor],
    x_sigma: Tensor,
    sigma: Tensor,
) -> tuple[Tensor, Figures]:
    """|| v_S(x_s, s) - sg v_T(x_s, s) ||^2, the teacher being one of few steps. Arguments as in `segment_mean_loss`."""
    v_student = student(x_sigma, sigma)
    with torch.no_grad():
        v_teacher = teacher(x_sigma, sigma)
    return _squared_error(v_student, v_teacher)


def _squared_error(v_student: Tensor, v_teacher: Tensor) -> tuple[Tensor, Figures]:
    per_sample = (v_student.float() - v_teacher.float()).square().flatten(1).mean(1)
    return per_sample.mean(), {"per_sample": per_sample.detach()}

"""Imitation: the student takes the routed teacher's velocity as its target at states of its own. No critic.

Flow matching on images (Eq. 6) has the instantaneous velocity as its optimum, which few Euler steps cannot follow where
an effect has several outcomes. Two targets whose optimum few steps can follow:

- **segment mean** (`segment_mean_loss`): the mean of the teacher's velocity along the straight path that the student
  itself takes in this step. The idea is pi-Flow's imitation (arXiv 2510.14974) with the trivial policy, one velocity a
  step. Sampled by deterministic Euler steps;
- **same step** (`same_step_loss`): a teacher that samples in few steps already, an effect's LoRA with an acceleration
  LoRA on top, asked at the same state and sigma (D-OPSD, arXiv 2605.05204, with a real teacher).

Both are 0 when solved, so that they measure what is still to learn of each effect. `imitation_loss` draws the states:
those of the student's own rollout, or noised images.

Shapes: latents (B, T, C), sigma (B,) fp32 with 1 = noise and 0 = data (`clora.method.flow`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from clora.method.flow import add_noise, euler_step
from clora.method.given import Anchor, DistillBatch, Networks, anchor_of, ask_teacher
from clora.method.losses import Figures, velocity_loss
from clora.method.noise import (
    DistillConfig,
    Draws,
    chance,
    draw_schedule,
    exit_step,
    first_imitated,
    fresh_noise,
    normal,
    own_share,
    uniform,
)
from clora.method.simulate import rollout_state

LEAST_SIGMA = 0.004  # below it the teacher's velocity is rounding noise


def imitation_loss(nets: Networks, batch: DistillBatch, cfg: DistillConfig, draws: Draws) -> tuple[Tensor, Figures]:
    """The loss that `objective.imitation` names, at drawn steps of a schedule. Student 1 forward, teacher 1 (2 guided);
    a rollout has up to num_steps - 1 more.

    The states are images y noised to the step's sigma, or, with chance `objective.on_policy_share` and in the general
    stream always, those of the student's own rollout (one step for the whole batch). The steps are those below
    `objective.imitation_below`, where it is given.
    """
    asked, draws = anchor_of(batch), draws.anchors()
    sigmas = draw_schedule(cfg, draws, imitated=True)
    # The anchors' images may be of another size than those of distribution matching.
    shape = batch.latent_shape if asked.y is None else (asked.y.shape[1], asked.y.shape[2])
    x_sigma, sigma, sigma_next = _states(nets, asked, shape, sigmas, cfg, draws)

    def student(x_sigma: Tensor, sigma: Tensor) -> Tensor:
        return nets.student(x_sigma, sigma, asked.student_cond)

    if cfg.objective.imitation == "same_step":
        loss, figures = same_step_loss(student, partial(_ask_few_step_teacher, nets, asked), x_sigma, sigma)
    else:
        teacher = partial(ask_teacher, nets, asked, cfg.objective)
        u = uniform(0.0, 1.0, draws)
        loss, figures = segment_mean_loss(student, teacher, x_sigma, sigma, sigma_next, u)
    return own_share(loss, {"imitation_loss": loss.detach()}, draws)


def _states(
    nets: Networks,
    asked: Anchor,
    latent_shape: tuple[int, int],
    sigmas: Tensor,
    cfg: DistillConfig,
    draws: Draws,
) -> tuple[Tensor, Tensor, Tensor]:
    """Where the student is asked, (B, T, C), and where each sample's step begins and ends, (B,)."""
    device = draws.generator.device
    first = first_imitated(cfg, sigmas)
    if asked.y is None or chance(cfg.objective.on_policy_share, draws):
        step, eps = first + exit_step(len(sigmas) - first, draws), normal(latent_shape, draws)
        fresh = fresh_noise(latent_shape, cfg, draws)
        x_sigma = rollout_state(nets.student, asked.student_cond, eps, step, sigmas, fresh)
        return x_sigma, *step_interval(sigmas, torch.full((len(x_sigma),), step, device=device))
    steps = torch.randint(first, len(sigmas), (draws.rows.total,), generator=draws.generator, device=device)
    sigma, sigma_next = step_interval(sigmas, draws.own(steps))
    return add_noise(asked.y, normal(latent_shape, draws), sigma), sigma, sigma_next


def _ask_few_step_teacher(nets: Networks, asked: Anchor, x_sigma: Tensor, sigma: Tensor) -> Tensor:
    if nets.few_step_teacher is None:
        raise ValueError("objective.imitation is same_step, but the networks have no few_step_teacher")
    return nets.few_step_teacher(x_sigma, sigma, asked.teacher_cond)


def step_interval(sigmas: Tensor, step_B: Tensor) -> tuple[Tensor, Tensor]:
    """Where each sample's step begins and ends: (sigma, sigma_next), (B,) each, sigma_next 0 for the last step.

    Args:
        sigmas: (num_steps,), falling, without the closing 0 (`flow.few_step_sigmas`).
        step_B: (B,) long, each 0 .. num_steps - 1.
    """
    levels = torch.cat([sigmas, sigmas.new_zeros(1)]).to(step_B.device)
    return levels[step_B], levels[step_B + 1]


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
        v_teacher = teacher(euler_step(x_sigma, v_student, sigma, t), t)
    return velocity_loss(v_student, v_teacher)


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
    return velocity_loss(v_student, v_teacher)

"""Loss functions of the method, pure: samples, noise and velocities come in, a scalar and figures go out.

Shapes: latents are packed tokens (B, T, C), sigma is (B,) fp32 with 1 = noise and 0 = data (`clora.method.flow`).
Every loss is computed in fp32 or wider whatever the networks' dtype, and returns `(loss, figures)`: a 0-d
tensor and a small dict of detached tensors for the log.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from clora.kernels.dmd_score import LEAST_NORM, dmd_score
from clora.method.flow import velocity_target

Figures = dict[str, Tensor]
GuidanceRescale = Literal["none", "norm"]
DmdNorm = Literal["sample", "none"]


def flow_matching_loss(
    velocity_pred: Tensor, x0: Tensor, eps: Tensor, weight: Tensor | None = None
) -> tuple[Tensor, Figures]:
    """Mean squared error of the velocity (Eq. 2; Eq. 6 when the network is the student and x0 is y).

    The paper regresses `x0 - eps` over t = 1 - sigma; ours is `eps - x0` over sigma: the same squared error.

    Args:
        velocity_pred: (B, T, C), the network's velocity at `add_noise(x0, eps, sigma)`.
        x0, eps: (B, T, C), the clean sample and the noise that made the input.
        weight: as in `velocity_loss`.

    Returns:
        As `velocity_loss`.
    """
    return velocity_loss(velocity_pred, velocity_target(_at_least_fp32(x0), _at_least_fp32(eps)), weight)


def velocity_loss(velocity_pred: Tensor, target: Tensor, weight: Tensor | None = None) -> tuple[Tensor, Figures]:
    """Mean squared error between two velocities (B, T, C).

    Args:
        weight: (B,), what each sample counts beside the others in `mean(weight * error)`; None counts each once.

    Returns:
        The mean over all elements, and `{"per_sample": (B,)}`, the mean of each sample without its weight.
    """
    error = _at_least_fp32(velocity_pred) - _at_least_fp32(target)
    per_sample = error.square().flatten(1).mean(1)
    weighted = per_sample if weight is None else weight * per_sample
    return weighted.mean(), {"per_sample": per_sample.detach()}


def guided_velocity(v_cond: Tensor, v_uncond: Tensor, guidance: float, rescale: GuidanceRescale) -> Tensor:
    """Classifier-free guidance `v_uncond + guidance * (v_cond - v_uncond)`; guidance 1 is `v_cond`.

    `rescale="norm"` gives each token the norm that `v_cond` has there, as diffusers' Qwen-Image pipelines do
    for `true_cfg_scale`. Because x0 is affine in the velocity, guiding x0 predictions with "none" is the same
    as guiding velocities; the authors' `real_guidance_scale: 4`, added on top of cond, is `guidance=5`.

    Args:
        v_cond, v_uncond: (B, T, C); the norm is over C.

    Returns:
        (B, T, C), fp32 or wider.
    """
    v_cond, v_uncond = _at_least_fp32(v_cond), _at_least_fp32(v_uncond)
    guided = v_uncond + guidance * (v_cond - v_uncond)
    if rescale == "none":
        return guided
    norm_cond = torch.linalg.vector_norm(v_cond, dim=-1, keepdim=True)
    norm_guided = torch.linalg.vector_norm(guided, dim=-1, keepdim=True)
    scale: Tensor = norm_cond / norm_guided.clamp_min(LEAST_NORM)
    return guided * scale


def dmd_loss(
    x_sigma: Tensor,
    sigma: Tensor,
    x0_student: Tensor,
    v_critic: Tensor,
    v_teacher_cond: Tensor,
    v_teacher_uncond: Tensor | None = None,
    *,
    guidance: float = 1.0,
    rescale: GuidanceRescale = "none",
    norm: DmdNorm,
    norm_floor: float,
) -> tuple[Tensor, Figures]:
    """Distribution matching (Eq. 1 and 7): a surrogate whose gradient in x0_student is the DMD gradient.

    A score is `(a * x0 - x_sigma) / sigma^2` with a = 1 - sigma, so `s_fake - s_real` is the positive factor
    `a / sigma^2` times `x0_critic - x0_real`. Like DMD2 we drop the factor and, with `norm="sample"`, divide
    each sample's gradient by `max(mean |x0_student - x0_real|, norm_floor)`. Where student and teacher agree
    that mean is 0 and DMD2's 0/0 needs a NaN mask; the floor keeps the gradient finite and lets it go to 0.

    The surrogate is `0.5 * mean((x0_student - x0_student.detach() + grad)^2)`: `numel * dL/dx0 == grad`. (With
    `x0 - (x0 - grad)`, grad would be rounded to the precision of x0.) No gradient reaches the velocities or x_sigma.
    On a GPU this is one pass over the latents.

    Args:
        x_sigma: (B, T, C), the student's sample noised to `sigma` (B,).
        x0_student: (B, T, C) with grad, that sample.
        v_critic, v_teacher_cond: (B, T, C), velocities of the critic and of the teacher at x_sigma.
        v_teacher_uncond: the teacher's without its condition; the real score is `guided_velocity`'s. None at
            guidance 1.
        norm_floor: in latent units, > 0.

    Returns:
        The surrogate, and `{"grad_abs": mean |grad|, "normaliser": its mean over the samples}`.
    """
    floor = norm_floor if norm == "sample" else None
    return dmd_score(x_sigma, sigma, x0_student, v_critic, v_teacher_cond, v_teacher_uncond, guidance, rescale, floor)


def _at_least_fp32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))

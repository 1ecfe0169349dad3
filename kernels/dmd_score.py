"""The distribution-matching loss from velocities, in one pass over the latents.

    x0_critic  = x_sigma - sigma v_critic
    x0_real    = x_sigma - sigma v_real,   v_real = v_uncond + guidance (v_cond - v_uncond), or v_cond without uncond
    normaliser = max(mean |x0_student - x0_real|, floor)                             one per sample
    g          = (x0_critic - x0_real) / normaliser
    loss       = 0.5 mean((x0_student - x0_student.detach() + g)^2)                  so dloss/dx0_student = g / numel

with rescale "norm", v_real has the norm of v_cond at each token; with floor None the normaliser is 1. What the loss is
for says `clora.method.losses.dmd_loss`, which calls it.

Shapes: latents and velocities (B, T, C) in fp32, bf16 or fp16, C at most 4096; sigma (B,) fp32, 1 = noise. All is
computed in fp32. The forward kernel writes g's numerator, and a few sums per block of tokens that a second kernel
adds in a fixed order, so that equal inputs give equal bits. Gradients flow to x0_student alone.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from clora.kernels.shared import FLOATS, at_least_fp32

Figures = dict[str, Tensor]
Rescale = Literal["none", "norm"]

BLOCK = 2048  # elements of a block of tokens
MAX_C = 4096
FINISH_BLOCK = 1024
LEAST_NORM = 1e-12  # a token whose guided velocity is zero stays zero


def dmd_score(
    x_sigma: Tensor,
    sigma: Tensor,
    x0_student: Tensor,
    v_critic: Tensor,
    v_teacher_cond: Tensor,
    v_teacher_uncond: Tensor | None,
    guidance: float,
    rescale: Rescale,
    floor: float | None = 1e-3,
) -> tuple[Tensor, Figures]:
    """The 0-d loss in fp32, and the figures `{"grad_abs": mean |g|, "normaliser": its mean over the samples}`.

    v_teacher_uncond may be None where guidance is 1. Raises ValueError where it is None and guidance is not 1, for
    shapes that differ, and for another rescale.
    """
    _check(x_sigma, sigma, (x0_student, v_critic, v_teacher_cond, v_teacher_uncond), guidance, rescale)
    if not x_sigma.is_cuda or torch.compiler.is_exporting():
        return dmd_score_ref(
            x_sigma, sigma, x0_student, v_critic, v_teacher_cond, v_teacher_uncond, guidance, rescale, floor
        )
    figures, _, _ = dmd_score_op(
        x_sigma, sigma, x0_student, v_critic, v_teacher_cond, v_teacher_uncond, guidance, rescale, floor
    )
    return figures[0], {"grad_abs": figures[1].detach(), "normaliser": figures[2].detach()}


def dmd_score_ref(
    x_sigma: Tensor,
    sigma: Tensor,
    x0_student: Tensor,
    v_critic: Tensor,
    v_teacher_cond: Tensor,
    v_teacher_uncond: Tensor | None,
    guidance: float,
    rescale: Rescale,
    floor: float | None = 1e-3,
) -> tuple[Tensor, Figures]:
    """`dmd_score` in plain torch."""
    with torch.no_grad():
        x, v_cond, level = at_least_fp32(x_sigma), at_least_fp32(v_teacher_cond), sigma.reshape(-1, 1, 1)
        v_real = v_cond
        if v_teacher_uncond is not None:
            v_uncond = at_least_fp32(v_teacher_uncond)
            v_real = v_uncond + guidance * (v_cond - v_uncond)
            if rescale == "norm":
                norm_cond, norm_real = (torch.linalg.vector_norm(v, dim=-1, keepdim=True) for v in (v_cond, v_real))
                v_real = v_real * (norm_cond / norm_real.clamp_min(LEAST_NORM))
        x0_real = x - level * v_real
        distance = (at_least_fp32(x0_student) - x0_real).abs().flatten(1).mean(1)
        normaliser = torch.ones_like(distance) if floor is None else distance.clamp_min(floor)
        grad = (x - level * at_least_fp32(v_critic) - x0_real) / normaliser.reshape(-1, 1, 1)
    x0 = at_least_fp32(x0_student)
    loss = 0.5 * (x0 - x0.detach() + grad).square().mean()
    return loss, {"grad_abs": grad.abs().mean(), "normaliser": normaliser.mean()}


def _check(x_sigma: Tensor, sigma: Tensor, others: tuple[Tensor | None, ...], guidance: float, rescale: str) -> None:
    if x_sigma.dim() != 3 or any(x is not None and x.shape != x_sigma.shape for x in others):
        raise ValueError(f"latents and velocities must share one shape (B, T, C); x_sigma's is {tuple(x_sigma.shape)}")
    if sigma.shape != x_sigma.shape[:1]:
        raise ValueError(f"sigma has shape {tuple(sigma.shape)}; one per sample, ({x_sigma.shape[0]},), is needed")
    if others[-1] is None and guidance != 1.0:
        raise ValueError(f"guidance is {guidance:g}, but v_teacher_uncond is None")
    if rescale not in ("none", "norm"):
        raise ValueError(f"rescale is {rescale!r}; 'none' or 'norm' is needed")


@triton.jit
def dmd_score_kernel(
    x_ptr: tl.tensor,
    sigma_ptr: tl.tensor,
    student_ptr: tl.tensor,
    critic_ptr: tl.tensor,
    cond_ptr: tl.tensor,
    uncond_ptr: tl.tensor,
    surrogate_ptr: tl.tensor,
    sums_ptr: tl.tensor,
    guidance: tl.float32,
    T: tl.int64,
    C: tl.int64,
    LEAST_NORM: tl.constexpr,
    GUIDED: tl.constexpr,
    RESCALED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
) -> None:
    """A block of one sample's tokens: g's numerator, and the sums of |x0_student - x0_real|, its |.|, its square."""
    block = tl.program_id(0).to(tl.int64)
    sample = tl.program_id(1).to(tl.int64)
    token = block * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]
    channel = tl.arange(0, BLOCK_C)[None, :]
    inside = (token < T) & (channel < C)
    at = (sample * T + token) * C + channel
    sigma = tl.load(sigma_ptr + sample)
    real = tl.load(cond_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if GUIDED:
        cond = real
        uncond = tl.load(uncond_ptr + at, mask=inside, other=0.0).to(tl.float32)
        real = uncond + guidance * (cond - uncond)
        if RESCALED:
            norm_cond = tl.sqrt(tl.sum(cond * cond, 1))
            norm_real = tl.sqrt(tl.sum(real * real, 1))
            bounded = tl.maximum(norm_real, LEAST_NORM, propagate_nan=tl.PropagateNan.ALL)
            real *= (norm_cond / bounded)[:, None]
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    critic = tl.load(critic_ptr + at, mask=inside, other=0.0).to(tl.float32)
    student = tl.load(student_ptr + at, mask=inside, other=0.0).to(tl.float32)
    x0_real = x - sigma * real
    difference = x - sigma * critic - x0_real
    # student - student is 0, or NaN where the student is not finite, as in the loss's equation.
    surrogate = difference + (student - student)
    tl.store(surrogate_ptr + at, surrogate, mask=inside)
    to_next = tl.num_programs(1).to(tl.int64) * tl.num_programs(0)  # sums is (3, B, blocks)
    sums_at = sums_ptr + sample * tl.num_programs(0) + block
    tl.store(sums_at, tl.sum(tl.sum(tl.where(inside, tl.abs(student - x0_real), 0.0), 1), 0))
    tl.store(sums_at + to_next, tl.sum(tl.sum(tl.where(inside, tl.abs(difference), 0.0), 1), 0))
    tl.store(sums_at + 2 * to_next, tl.sum(tl.sum(tl.where(inside, surrogate * surrogate, 0.0), 1), 0))


@triton.jit
def dmd_score_finish_kernel(
    sums_ptr: tl.tensor,
    figures_ptr: tl.tensor,
    normaliser_ptr: tl.tensor,
    floor: tl.float32,
    B: tl.int64,
    blocks: tl.int64,
    numel_of_sample: tl.float32,
    NORMALISED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One program for the batch: each sample's normaliser, then loss, mean |g| and mean normaliser."""
    lane = tl.arange(0, BLOCK)
    loss = 0.0
    grad_abs = 0.0
    normalisers = 0.0
    for sample in range(B):
        distances = tl.zeros([BLOCK], tl.float32)
        absolutes = tl.zeros([BLOCK], tl.float32)
        squares = tl.zeros([BLOCK], tl.float32)
        for start in range(0, blocks, BLOCK):
            at = sums_ptr + sample * blocks + start + lane
            inside = start + lane < blocks
            distances += tl.load(at, mask=inside, other=0.0)
            absolutes += tl.load(at + B * blocks, mask=inside, other=0.0)
            squares += tl.load(at + 2 * B * blocks, mask=inside, other=0.0)
        distance = tl.sum(distances, 0) / numel_of_sample
        normaliser = 1.0
        if NORMALISED:
            normaliser = tl.maximum(distance, floor, propagate_nan=tl.PropagateNan.ALL)
        tl.store(normaliser_ptr + sample, normaliser)
        loss += 0.5 * (tl.sum(squares, 0) / normaliser / normaliser / numel_of_sample / B)
        grad_abs += tl.sum(absolutes, 0) / normaliser / numel_of_sample / B
        normalisers += normaliser / B
    tl.store(figures_ptr, loss)
    tl.store(figures_ptr + 1, grad_abs)
    tl.store(figures_ptr + 2, normalisers)


def launch(
    x_sigma: Tensor,
    sigma: Tensor,
    x0_student: Tensor,
    v_critic: Tensor,
    v_teacher_cond: Tensor,
    v_teacher_uncond: Tensor | None,
    guidance: float,
    rescale: str,
    floor: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(figures, g's numerator, normaliser) of both kernels: (3,) loss, grad_abs, mean normaliser; (B, T, C); (B,)."""
    B, T, C = x_sigma.shape
    latents = [x_sigma, x0_student, v_critic, v_teacher_cond, v_teacher_uncond]
    if C > MAX_C or any(x is not None and x.dtype not in FLOATS for x in latents):
        raise ValueError(f"x_sigma is {x_sigma.dtype} {B, T, C}; fp32, bf16 or fp16 with C at most {MAX_C} is needed")
    x, student, critic, cond, uncond = (x if x is None else x.contiguous() for x in latents)
    block_c = triton.next_power_of_2(C)
    block_t = max(BLOCK // block_c, 1)
    blocks = triton.cdiv(T, block_t)
    figures, normaliser, sums, surrogate = (
        torch.empty(shape, dtype=torch.float32, device=x_sigma.device)
        for shape in ((3,), (B,), (3, B, blocks), (B, T, C))
    )
    with torch.cuda.device_of(x_sigma):
        dmd_score_kernel[(blocks, B)](
            x, sigma.float().contiguous(), student, critic, cond, cond if uncond is None else uncond, surrogate, sums,
            guidance, T, C, LEAST_NORM=LEAST_NORM, GUIDED=uncond is not None, RESCALED=rescale == "norm",
            BLOCK_T=block_t, BLOCK_C=block_c, num_warps=min(max(block_t * block_c // 512, 1), 16),
        )  # fmt: skip
        dmd_score_finish_kernel[(1,)](
            sums, figures, normaliser, 0.0 if floor is None else floor, B, blocks, T * C,
            NORMALISED=floor is not None, BLOCK=FINISH_BLOCK,
        )  # fmt: skip
    return figures, surrogate, normaliser


@torch.library.custom_op("clora::dmd_score", mutates_args=())
def dmd_score_op(
    x_sigma: Tensor,
    sigma: Tensor,
    x0_student: Tensor,
    v_critic: Tensor,
    v_teacher_cond: Tensor,
    v_teacher_uncond: Tensor | None,
    guidance: float,
    rescale: str,
    floor: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    return launch(x_sigma, sigma, x0_student, v_critic, v_teacher_cond, v_teacher_uncond, guidance, rescale, floor)


dmd_score_op.register_fake(
    lambda x_sigma, *_: tuple(
        x_sigma.new_empty(shape, dtype=torch.float32) for shape in ((3,), x_sigma.shape, x_sigma.shape[:1])
    )
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, surrogate, normaliser = output
    ctx.save_for_backward(surrogate, normaliser)
    ctx.dtype = inputs[2].dtype


def _backward(ctx: Any, grad_figures: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    surrogate, normaliser = ctx.saved_tensors
    factor = grad_figures[0] / (surrogate.numel() * normaliser)
    return None, None, (surrogate * factor[:, None, None]).to(ctx.dtype), None, None, None, None, None, None


dmd_score_op.register_autograd(_backward, setup_context=_setup)

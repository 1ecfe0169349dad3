"""One step of the few-step sampler: the data that a velocity points back to, noised afresh to the next level.

    x0     = x_sigma - sigma velocity
    x_next = (1 - sigma_next) x0 + sigma_next eps

Shapes: x_sigma, velocity, eps and both results (B, ...), in fp32, bf16 or fp16; sigma, sigma_next (B,) fp32, with
1 = noise and 0 = data. The results are fp32, as torch's promotion with such sigmas gives, and equal
`clora.method.flow.consistency_step`. Gradients flow to x_sigma and velocity alone.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from clora.kernels.shared import FLOATS

BLOCK = 1024


def renoise(x_sigma: Tensor, velocity: Tensor, sigma: Tensor, sigma_next: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
    """(x0, x_next), shaped like x_sigma, in fp32. Raises ValueError for shapes that do not fit."""
    _check(x_sigma, velocity, sigma, sigma_next, eps)
    if not x_sigma.is_cuda or torch.compiler.is_exporting():
        return renoise_ref(x_sigma, velocity, sigma, sigma_next, eps)
    return renoise_op(x_sigma, velocity, sigma, sigma_next, eps)


def renoise_ref(
    x_sigma: Tensor, velocity: Tensor, sigma: Tensor, sigma_next: Tensor, eps: Tensor
) -> tuple[Tensor, Tensor]:
    """`renoise` in plain torch."""
    per_sample = (-1, *(1 for _ in x_sigma.shape[1:]))
    level, next_level = sigma.detach().reshape(per_sample), sigma_next.detach().reshape(per_sample)
    x0 = x_sigma - level * velocity
    return x0, (1.0 - next_level) * x0 + next_level * eps.detach()


def _check(x_sigma: Tensor, velocity: Tensor, sigma: Tensor, sigma_next: Tensor, eps: Tensor) -> None:
    batch = (x_sigma.shape[0],)
    if velocity.shape != x_sigma.shape or eps.shape != x_sigma.shape:
        raise ValueError(f"velocity and eps must have the shape of x_sigma, {tuple(x_sigma.shape)}")
    if sigma.shape != batch or sigma_next.shape != batch:
        raise ValueError(f"sigma and sigma_next must be one per sample, shape {batch}")


@triton.jit
def renoise_kernel(
    x_ptr: tl.tensor,
    velocity_ptr: tl.tensor,
    sigma_ptr: tl.tensor,
    sigma_next_ptr: tl.tensor,
    eps_ptr: tl.tensor,
    x0_ptr: tl.tensor,
    x_next_ptr: tl.tensor,
    N: tl.int64,
    BLOCK: tl.constexpr,
) -> None:
    """A block of one sample's N elements."""
    sample = tl.program_id(1).to(tl.int64)
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < N
    at = sample * N + place
    sigma = tl.load(sigma_ptr + sample)
    sigma_next = tl.load(sigma_next_ptr + sample)
    eps = tl.load(eps_ptr + at, mask=inside, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    velocity = tl.load(velocity_ptr + at, mask=inside, other=0.0).to(tl.float32)
    x0 = x - sigma * velocity
    tl.store(x0_ptr + at, x0, mask=inside)
    tl.store(x_next_ptr + at, (1.0 - sigma_next) * x0 + sigma_next * eps, mask=inside)


@triton.jit
def renoise_backward_kernel(
    grad_x0_ptr: tl.tensor,
    grad_next_ptr: tl.tensor,
    sigma_ptr: tl.tensor,
    sigma_next_ptr: tl.tensor,
    dx_ptr: tl.tensor,
    dvelocity_ptr: tl.tensor,
    N: tl.int64,
    BLOCK: tl.constexpr,
) -> None:
    """dx = grad_x0 + (1 - sigma_next) grad_next; dvelocity = -sigma dx."""
    sample = tl.program_id(1).to(tl.int64)
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < N
    at = sample * N + place
    grad_x0 = tl.load(grad_x0_ptr + at, mask=inside, other=0.0).to(tl.float32)
    grad_next = tl.load(grad_next_ptr + at, mask=inside, other=0.0).to(tl.float32)
    dx = grad_x0 + (1.0 - tl.load(sigma_next_ptr + sample)) * grad_next
    tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=inside)
    dvelocity = -tl.load(sigma_ptr + sample) * dx
    tl.store(dvelocity_ptr + at, dvelocity.to(dvelocity_ptr.dtype.element_ty), mask=inside)


def launch_forward(
    x_sigma: Tensor, velocity: Tensor, sigma: Tensor, sigma_next: Tensor, eps: Tensor
) -> tuple[Tensor, Tensor]:
    """(x0, x_next) of the forward kernel."""
    if any(x.dtype not in FLOATS for x in (x_sigma, velocity, eps)):
        raise ValueError(f"x_sigma, velocity and eps must be fp32, bf16 or fp16; x_sigma is {x_sigma.dtype}")
    x0, x_next = (x_sigma.new_empty(x_sigma.shape, dtype=torch.float32) for _ in range(2))
    grid, N = _grid(x_sigma)
    x_sigma, velocity = x_sigma.contiguous(), velocity.contiguous()
    sigma, sigma_next = sigma.float().contiguous(), sigma_next.float().contiguous()
    with torch.cuda.device_of(x_sigma):
        renoise_kernel[grid](
            x_sigma,
            velocity,
            sigma,
            sigma_next,
            eps.contiguous(),
            x0,
            x_next,
            N,
            BLOCK=BLOCK,
            enable_fp_fusion=False,  # rounds where torch does
        )
    return x0, x_next


def launch_backward(
    grad_x0: Tensor, grad_next: Tensor, sigma: Tensor, sigma_next: Tensor, dtypes: tuple[torch.dtype, torch.dtype]
) -> tuple[Tensor, Tensor]:
    """(dx, dvelocity) in the dtypes given."""
    grid, N = _grid(grad_x0)
    dx, dvelocity = (grad_x0.new_empty(grad_x0.shape, dtype=dtype) for dtype in dtypes)
    grad_x0, grad_next = grad_x0.contiguous(), grad_next.contiguous()
    sigma, sigma_next = sigma.float().contiguous(), sigma_next.float().contiguous()
    with torch.cuda.device_of(grad_x0):
        renoise_backward_kernel[grid](grad_x0, grad_next, sigma, sigma_next, dx, dvelocity, N, BLOCK=BLOCK)
    return dx, dvelocity


def _grid(x: Tensor) -> tuple[tuple[int, int], int]:
    """Blocks by samples, and the elements of a sample."""
    N = math.prod(x.shape[1:])
    return (triton.cdiv(N, BLOCK), x.shape[0]), N


@torch.library.custom_op("clora::renoise", mutates_args=())
def renoise_op(
    x_sigma: Tensor, velocity: Tensor, sigma: Tensor, sigma_next: Tensor, eps: Tensor
) -> tuple[Tensor, Tensor]:
    return launch_forward(x_sigma, velocity, sigma, sigma_next, eps)


@torch.library.custom_op("clora::renoise_backward", mutates_args=())
def renoise_backward_op(
    grad_x0: Tensor,
    grad_next: Tensor,
    sigma: Tensor,
    sigma_next: Tensor,
    x_dtype: torch.dtype,
    velocity_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    return launch_backward(grad_x0, grad_next, sigma, sigma_next, (x_dtype, velocity_dtype))


renoise_op.register_fake(
    lambda x_sigma, *_: (
        x_sigma.new_empty(x_sigma.shape, dtype=torch.float32),
        x_sigma.new_empty(x_sigma.shape, dtype=torch.float32),
    )
)
renoise_backward_op.register_fake(
    lambda grad_x0, grad_next, sigma, sigma_next, x_dtype, velocity_dtype: (
        grad_x0.new_empty(grad_x0.shape, dtype=x_dtype),
        grad_x0.new_empty(grad_x0.shape, dtype=velocity_dtype),
    )
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x_sigma, velocity, sigma, sigma_next, *_ = inputs
    ctx.save_for_backward(sigma, sigma_next)
    ctx.dtypes = x_sigma.dtype, velocity.dtype


def _backward(ctx: Any, grad_x0: Tensor, grad_next: Tensor) -> tuple[Tensor | None, ...]:
    return *renoise_backward_op(grad_x0, grad_next, *ctx.saved_tensors, *ctx.dtypes), None, None, None


renoise_op.register_autograd(_backward, setup_context=_setup)

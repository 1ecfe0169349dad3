"""One step of the few-step sampler: the data that a velocity points back to, noised afresh to the next level.

    x0     = x_sigma - sigma velocity
    x_next = (1 - sigma_next) x0 + sigma_next eps

Shapes: x_sigma, velocity, eps and both results (B, ...), in fp32, bf16 or fp16; sigma, sigma_next (B,) fp32, with
1 = noise and 0 = data. The results are fp32, as torch's promotion with such sigmas gives, and equal
`clora.method.flow.consistency_step`. Gradients flow to x_sigma and velocity alone.

eps is given, or drawn in the kernel: N(0, 1) as a function of the sample's seed, the step, and the element's place
in its sample, so that a sample's noise does not depend on the batch or on how the work is divided:

    a, b, _, _ = philox4x32-10(key = seed, counter = (place mod 2^32, place div 2^32, step, 0))
    eps        = sqrt(-2 log(max(u(a), 1e-7))) cos(2 pi u(b))        with u: 32 bits -> [0, 1)

which is `tl.randn`'s transform with the step as a further counter. It is not torch's noise of the same seed.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
LOW_BITS = 0xFFFFFFFF
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def renoise(
    x_sigma: Tensor,
    velocity: Tensor,
    sigma: Tensor,
    sigma_next: Tensor,
    eps: Tensor | None = None,
    seeds: Tensor | None = None,
    step: int = 0,
) -> tuple[Tensor, Tensor]:
    """(x0, x_next), shaped like x_sigma, in fp32.

    Give eps, or seeds (B,) int64 and the step, 0 to 2^31 - 1. Raises ValueError for anything else, and for shapes
    that do not fit.
    """
    _check(x_sigma, velocity, sigma, sigma_next, eps, seeds, step)
    if not x_sigma.is_cuda or torch.compiler.is_exporting():
        return renoise_ref(x_sigma, velocity, sigma, sigma_next, eps, seeds, step)
    return renoise_op(x_sigma, velocity, sigma, sigma_next, eps, seeds, step)


def renoise_ref(
    x_sigma: Tensor,
    velocity: Tensor,
    sigma: Tensor,
    sigma_next: Tensor,
    eps: Tensor | None = None,
    seeds: Tensor | None = None,
    step: int = 0,
) -> tuple[Tensor, Tensor]:
    """`renoise` in plain torch."""
    if eps is None:
        assert seeds is not None
        eps = noise_ref(seeds, step, x_sigma.shape[1:])
    per_sample = (-1, *(1 for _ in x_sigma.shape[1:]))
    level, next_level = sigma.detach().reshape(per_sample), sigma_next.detach().reshape(per_sample)
    x0 = x_sigma - level * velocity
    return x0, (1.0 - next_level) * x0 + next_level * eps.detach()


def noise_ref(seeds: Tensor, step: int, shape: tuple[int, ...]) -> Tensor:
    """The noise of `renoise` for seeds (B,): (B, *shape) fp32."""
    place = torch.arange(math.prod(shape), device=seeds.device)
    first, second = philox_ref(seeds[:, None], place, step)
    # 2^-31 (1 - 2^-23): the greatest scale that keeps all of [0, 2^31) below 1 in fp32.
    u1, u2 = (torch.where(u < 2**31, u, LOW_BITS - u).float() * 4.6566127342e-10 for u in (first, second))
    radius = torch.sqrt(-2.0 * torch.log(u1.clamp_min(1.0e-7)))
    return (radius * torch.cos(2.0 * math.pi * u2)).reshape(len(seeds), *shape)


def philox_ref(seeds: Tensor, place: Tensor, step: int) -> tuple[Tensor, Tensor]:
    """The first two words of philox4x32-10 for int64 seeds and places, which broadcast: int64 in [0, 2^32)."""
    key0, key1 = seeds & LOW_BITS, (seeds >> 32) & LOW_BITS
    zero = torch.zeros_like(seeds + place)
    c0, c1, c2, c3 = zero + (place & LOW_BITS), zero + (place >> 32), zero + step, zero
    for _ in range(10):
        high0, low0 = _multiply(0xD2511F53, c0)
        high2, low2 = _multiply(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high2 ^ c1 ^ key0, low2, high0 ^ c3 ^ key1, low0
        key0, key1 = (key0 + 0x9E3779B9) & LOW_BITS, (key1 + 0xBB67AE85) & LOW_BITS
    return c0, c1


def _multiply(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """The high and low 32 bits of a times b, both below 2^32, without passing 2^63."""
    upper, lower = a * (b >> 16), a * (b & 0xFFFF)
    return (upper + (lower >> 16)) >> 16, (lower + ((upper & 0xFFFF) << 16)) & LOW_BITS


def _check(
    x_sigma: Tensor,
    velocity: Tensor,
    sigma: Tensor,
    sigma_next: Tensor,
    eps: Tensor | None,
    seeds: Tensor | None,
    step: int,
) -> None:
    batch = (x_sigma.shape[0],)
    if (eps is None) == (seeds is None):
        raise ValueError("give either eps or seeds")
    if velocity.shape != x_sigma.shape or (eps is not None and eps.shape != x_sigma.shape):
        raise ValueError(f"velocity and eps must have the shape of x_sigma, {tuple(x_sigma.shape)}")
    if sigma.shape != batch or sigma_next.shape != batch or (seeds is not None and seeds.shape != batch):
        raise ValueError(f"sigma, sigma_next and seeds must be one per sample, shape {batch}")
    if seeds is not None and (seeds.dtype != torch.int64 or not 0 <= step < 2**31):
        raise ValueError(f"seeds are {seeds.dtype} and step is {step}; int64 and 0 to 2^31 - 1 are needed")


@triton.jit
def philox_bits(seed: tl.tensor, place: tl.tensor, step: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """The first two words for an int64 seed, a block of int64 places and an int32 step."""
    low = place.to(tl.uint32)
    zero = low * 0
    high = (place >> 32).to(tl.uint32)
    first, second, _, _ = tl.philox(seed, low, high, zero + step.to(tl.uint32), zero)
    return first, second


@triton.jit
def renoise_kernel(
    x_ptr: tl.tensor,
    velocity_ptr: tl.tensor,
    sigma_ptr: tl.tensor,
    sigma_next_ptr: tl.tensor,
    eps_ptr: tl.tensor,
    seeds_ptr: tl.tensor,
    x0_ptr: tl.tensor,
    x_next_ptr: tl.tensor,
    step: tl.int32,
    N: tl.int64,
    DRAWN: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """A block of one sample's N elements."""
    sample = tl.program_id(1).to(tl.int64)
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < N
    at = sample * N + place
    sigma = tl.load(sigma_ptr + sample)
    sigma_next = tl.load(sigma_next_ptr + sample)
    if DRAWN:
        first, second = philox_bits(tl.load(seeds_ptr + sample), place, step)
        u1, u2 = tl.uint_to_uniform_float(first), tl.uint_to_uniform_float(second)
        eps, _ = tl.pair_uniform_to_normal(u1, u2)
    else:
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
    x_sigma: Tensor,
    velocity: Tensor,
    sigma: Tensor,
    sigma_next: Tensor,
    eps: Tensor | None,
    seeds: Tensor | None,
    step: int,
) -> tuple[Tensor, Tensor]:
    """(x0, x_next) of the forward kernel."""
    if any(x is not None and x.dtype not in FLOATS for x in (x_sigma, velocity, eps)):
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
            x_sigma if eps is None else eps.contiguous(),
            sigma if seeds is None else seeds.contiguous(),
            x0,
            x_next,
            step,
            N,
            DRAWN=eps is None,
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
    x_sigma: Tensor,
    velocity: Tensor,
    sigma: Tensor,
    sigma_next: Tensor,
    eps: Tensor | None,
    seeds: Tensor | None,
    step: int,
) -> tuple[Tensor, Tensor]:
    return launch_forward(x_sigma, velocity, sigma, sigma_next, eps, seeds, step)


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
    return *renoise_backward_op(grad_x0, grad_next, *ctx.saved_tensors, *ctx.dtypes), None, None, None, None, None


renoise_op.register_autograd(_backward, setup_context=_setup)

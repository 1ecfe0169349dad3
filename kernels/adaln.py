"""LayerNorm with a modulation per sample, alone or after a gated residual: the borders of a transformer block.

    adaln(x)                   = norm(x) * (1 + scale) + shift
    gated_residual_adaln(x, y) = r, norm(r) * (1 + scale) + shift    with r = x + gate * y

    norm(x) = (x - mean(x)) / sqrt(var(x) + 1e-6) over the last dimension, without weight or bias

Shapes: x, y, r and the results (B, L, D), D at most 8192; scale, shift, gate (B, D). With `index` (B, L), an
integer or bool a token, they are (2B, D): token (b, l) takes row b where its index is 0, and row B + b elsewhere
(`zero_cond_t` of Qwen-Image-Edit-2511). x and y have one dtype (fp32, bf16 or fp16), which the results have too;
scale, shift and gate have one dtype, usually the same.

The kernels compute in fp32 and round once at the end, and r before it is normed. Each row is read once and
written once. The backward pass computes the statistics again instead of storing them, and sums the gradients of
scale, shift and gate in two stages of fixed order, so that equal inputs give equal bits.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from clora.kernels.shared import FLOATS, rows

EPS = 1e-6
MAX_D = 8192
TOKENS = 32  # summed by one program of the backward pass; fixed, so that the order of the sums is


def adaln(x: Tensor, scale: Tensor, shift: Tensor, index: Tensor | None = None) -> Tensor:
    """norm(x) * (1 + scale) + shift, shaped and typed like x. Raises ValueError for shapes or dtypes as above."""
    _check(x, None, (scale, shift), index)
    if not x.is_cuda or torch.compiler.is_exporting():
        return adaln_ref(x, scale, shift, index)
    return adaln_op(x, scale, shift, index)


def gated_residual_adaln(
    x: Tensor, y: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, index: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """r = x + gate * y and norm(r) * (1 + scale) + shift, both like x. Raises ValueError as `adaln` does."""
    _check(x, y, (scale, shift, gate), index)
    if not x.is_cuda or torch.compiler.is_exporting():
        return gated_residual_adaln_ref(x, y, gate, scale, shift, index)
    return gated_residual_adaln_op(x, y, gate, scale, shift, index)


def adaln_ref(x: Tensor, scale: Tensor, shift: Tensor, index: Tensor | None = None) -> Tensor:
    """`adaln` in plain torch, in the dtypes of its inputs: what diffusers' Qwen-Image block computes."""
    normed = F.layer_norm(x, x.shape[-1:], eps=EPS)
    return (normed * (1 + _per_token(scale, index)) + _per_token(shift, index)).to(x.dtype)


def gated_residual_adaln_ref(
    x: Tensor, y: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, index: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`gated_residual_adaln` in plain torch, likewise."""
    r = (x + _per_token(gate, index) * y).to(x.dtype)
    return r, adaln_ref(r, scale, shift, index)


def _per_token(parameter: Tensor, index: Tensor | None) -> Tensor:
    """(B, D) -> (B, 1, D); (2B, D) with an index -> (B, L, D)."""
    if index is None:
        return parameter.unsqueeze(1)
    first, second = parameter.unsqueeze(1).chunk(2)
    return torch.where(index.unsqueeze(-1) == 0, first, second)


def _check(x: Tensor, y: Tensor | None, parameters: tuple[Tensor, ...], index: Tensor | None) -> None:
    if x.dim() != 3 or (y is not None and (y.shape != x.shape or y.dtype != x.dtype)):
        other = "" if y is None else f" and y {y.dtype} {tuple(y.shape)}"
        raise ValueError(f"x is {x.dtype} {tuple(x.shape)}{other}; (B, L, D) is needed, y like x")
    rows = x.shape[0] if index is None else 2 * x.shape[0]
    for parameter in parameters:
        if parameter.shape != (rows, x.shape[2]) or parameter.dtype != parameters[0].dtype:
            raise ValueError(
                f"scale, shift or gate is {parameter.dtype} {tuple(parameter.shape)} for x of shape {tuple(x.shape)}"
                f"{'' if index is None else ' with index'}; ({rows}, {x.shape[2]}) in one dtype is needed"
            )
    if index is not None and (index.shape != x.shape[:2] or index.is_floating_point()):
        raise ValueError(
            f"index is {index.dtype} {tuple(index.shape)}; integers or bools {tuple(x.shape[:2])} are needed"
        )


@triton.jit
def adaln_forward_kernel(
    x_ptr: tl.tensor,
    y_ptr: tl.tensor,
    gate_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    shift_ptr: tl.tensor,
    index_ptr: tl.tensor,
    r_ptr: tl.tensor,
    out_ptr: tl.tensor,
    B: tl.int64,
    L: tl.int64,
    D: tl.constexpr,
    x_stride_b: tl.int64,
    x_stride_l: tl.int64,
    y_stride_b: tl.int64,
    y_stride_l: tl.int64,
    gate_stride: tl.int64,
    scale_stride: tl.int64,
    shift_stride: tl.int64,
    EPS: tl.constexpr,
    GATED: tl.constexpr,
    INDEXED: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """One token a program."""
    row = tl.program_id(0).to(tl.int64)
    b = row // L
    token = row - b * L
    group = b
    if INDEXED:
        group += B * (tl.load(index_ptr + row) != 0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    inside = d < D
    x = tl.load(x_ptr + b * x_stride_b + token * x_stride_l + d, mask=inside, other=0.0).to(tl.float32)
    if GATED:
        y = tl.load(y_ptr + b * y_stride_b + token * y_stride_l + d, mask=inside, other=0.0).to(tl.float32)
        gate = tl.load(gate_ptr + group * gate_stride + d, mask=inside, other=0.0).to(tl.float32)
        r = (x + gate * y).to(r_ptr.dtype.element_ty)
        tl.store(r_ptr + row * D + d, r, mask=inside)
        x = r.to(tl.float32)
    centred = tl.where(inside, x - tl.sum(x, 0) / D, 0.0)
    normed = centred * tl.rsqrt(tl.sum(centred * centred, 0) / D + EPS)
    scale = tl.load(scale_ptr + group * scale_stride + d, mask=inside, other=0.0).to(tl.float32)
    shift = tl.load(shift_ptr + group * shift_stride + d, mask=inside, other=0.0).to(tl.float32)
    out = normed * (1.0 + scale) + shift
    tl.store(out_ptr + row * D + d, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def adaln_backward_kernel(
    grad_r_ptr: tl.tensor,
    grad_out_ptr: tl.tensor,
    x_ptr: tl.tensor,
    y_ptr: tl.tensor,
    gate_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    index_ptr: tl.tensor,
    dx_ptr: tl.tensor,
    dy_ptr: tl.tensor,
    sums_ptr: tl.tensor,
    B: tl.int64,
    L: tl.int64,
    D: tl.constexpr,
    x_stride_b: tl.int64,
    x_stride_l: tl.int64,
    y_stride_b: tl.int64,
    y_stride_l: tl.int64,
    gate_stride: tl.int64,
    scale_stride: tl.int64,
    EPS: tl.constexpr,
    GATED: tl.constexpr,
    INDEXED: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """A chunk of one sample's tokens, those of one row of the parameters; x is r where there is a gate.

    With g = grad_out (1 + scale) and n = norm(x):  dx = (g - mean(g) - n mean(g n)) / sqrt(var + eps) + grad_r.
    Sums over the chunk's tokens, for the second stage: shift's grad_out, scale's grad_out n, gate's dx y.
    """
    chunk = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1).to(tl.int64)
    b = group % B
    d = tl.arange(0, BLOCK_D)
    inside = d < D
    shift_sum = tl.zeros([BLOCK_D], tl.float32)
    scale_sum = tl.zeros([BLOCK_D], tl.float32)
    gate_sum = tl.zeros([BLOCK_D], tl.float32)
    # Hoisted out of the loop, the addresses of wide rows would not fit into the registers.
    for token in tl.range(chunk * TOKENS, tl.minimum(chunk * TOKENS + TOKENS, L), disable_licm=True):
        row = b * L + token
        mine = True
        if INDEXED:
            mine = (tl.load(index_ptr + row) != 0) == (group >= B)
        if mine:
            x = tl.load(x_ptr + b * x_stride_b + token * x_stride_l + d, mask=inside, other=0.0).to(tl.float32)
            grad_out = tl.load(grad_out_ptr + row * D + d, mask=inside, other=0.0).to(tl.float32)
            centred = tl.where(inside, x - tl.sum(x, 0) / D, 0.0)
            rstd = tl.rsqrt(tl.sum(centred * centred, 0) / D + EPS)
            normed = centred * rstd
            shift_sum += grad_out
            scale_sum += grad_out * normed
            # scale and gate are read again for each token, from the cache: kept, they would take half the registers.
            g = grad_out * (1.0 + tl.load(scale_ptr + group * scale_stride + d, mask=inside, other=0.0).to(tl.float32))
            dx = (g - tl.sum(g, 0) / D - normed * (tl.sum(g * normed, 0) / D)) * rstd
            if GATED:
                dx += tl.load(grad_r_ptr + row * D + d, mask=inside, other=0.0).to(tl.float32)
            tl.store(dx_ptr + row * D + d, dx.to(dx_ptr.dtype.element_ty), mask=inside)
            if GATED:
                gate = tl.load(gate_ptr + group * gate_stride + d, mask=inside, other=0.0).to(tl.float32)
                tl.store(dy_ptr + row * D + d, (dx * gate).to(dy_ptr.dtype.element_ty), mask=inside)
                y = tl.load(y_ptr + b * y_stride_b + token * y_stride_l + d, mask=inside, other=0.0).to(tl.float32)
                gate_sum += dx * y
    chunks = tl.num_programs(0).to(tl.int64)
    to_next = tl.num_programs(1).to(tl.int64) * chunks * D  # sums is (2 or 3, rows of the parameters, chunks, D)
    at = sums_ptr + (group * chunks + chunk) * D + d
    tl.store(at, scale_sum, mask=inside)
    tl.store(at + to_next, shift_sum, mask=inside)
    if GATED:
        tl.store(at + 2 * to_next, gate_sum, mask=inside)


def launch_forward(
    x: Tensor, y: Tensor | None, gate: Tensor | None, scale: Tensor, shift: Tensor, index: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(r, out) of the forward kernel; r is out where y and gate are None."""
    _check_for_kernel(x)
    B, L, D = x.shape
    x, scale, shift = rows(x), rows(scale), rows(shift)
    out = x.new_empty(B, L, D)
    r, y, gate = (out, x, scale) if y is None or gate is None else (x.new_empty(B, L, D), rows(y), rows(gate))
    block, warps = _block(D)
    with torch.cuda.device_of(x):
        adaln_forward_kernel[(B * L,)](
            x, y, gate, scale, shift, scale if index is None else index.contiguous(), r, out,
            B, L, D, *x.stride()[:2], *y.stride()[:2], gate.stride(0), scale.stride(0), shift.stride(0),
            EPS=EPS, GATED=r is not out, INDEXED=index is not None, BLOCK_D=block, num_warps=warps,
        )  # fmt: skip
    return r, out


def launch_backward(
    grad_r: Tensor | None,
    grad_out: Tensor,
    x: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    scale: Tensor,
    index: Tensor | None,
) -> list[Tensor]:
    """[dx, dscale, dshift], and [dx, dscale, dshift, dgate, dy] where grad_r, y and gate are given; x is r there."""
    _check_for_kernel(x)
    B, L, D = x.shape
    gated = grad_r is not None and y is not None and gate is not None
    x, scale, grad_out = rows(x), rows(scale), grad_out.contiguous()
    dx = x.new_empty(B, L, D)
    dy = torch.empty_like(dx) if gated else dx
    grad_r = grad_out if grad_r is None else grad_r.contiguous()
    y, gate = (x, scale) if y is None or gate is None else (rows(y), rows(gate))
    chunks = triton.cdiv(L, TOKENS)
    sums = torch.empty(3 if gated else 2, len(scale), chunks, D, dtype=torch.float32, device=x.device)
    block, warps = _block(D)
    with torch.cuda.device_of(x):
        adaln_backward_kernel[(chunks, len(scale))](
            grad_r, grad_out, x, y, gate, scale, scale if index is None else index.contiguous(), dx, dy, sums,
            B, L, D, *x.stride()[:2], *y.stride()[:2], gate.stride(0), scale.stride(0),
            EPS=EPS, GATED=gated, INDEXED=index is not None, TOKENS=TOKENS, BLOCK_D=block, num_warps=warps,
        )  # fmt: skip
    of_parameters = [parts.sum(1).to(scale.dtype) for parts in sums]
    return [dx, *of_parameters, dy] if gated else [dx, *of_parameters]


def _check_for_kernel(x: Tensor) -> None:
    if x.shape[2] > MAX_D or x.dtype not in FLOATS:
        raise ValueError(f"x is {x.dtype} {tuple(x.shape)}; fp32, bf16 or fp16 with D at most {MAX_D} is needed")


def _block(D: int) -> tuple[int, int]:
    """A row's block, a power of two, and the warps that share it: 16 elements a thread, 8 of the widest rows."""
    block = triton.next_power_of_2(D)
    return block, max(block // 512, 1) if block <= 4096 else 32


@torch.library.custom_op("clora::adaln", mutates_args=())
def adaln_op(x: Tensor, scale: Tensor, shift: Tensor, index: Tensor | None) -> Tensor:
    return launch_forward(x, None, None, scale, shift, index)[1]


@torch.library.custom_op("clora::adaln_backward", mutates_args=())
def adaln_backward_op(grad: Tensor, x: Tensor, scale: Tensor, index: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    dx, dscale, dshift = launch_backward(None, grad, x, None, None, scale, index)
    return dx, dscale, dshift


@torch.library.custom_op("clora::gated_residual_adaln", mutates_args=())
def gated_residual_adaln_op(
    x: Tensor, y: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, index: Tensor | None
) -> tuple[Tensor, Tensor]:
    return launch_forward(x, y, gate, scale, shift, index)


@torch.library.custom_op("clora::gated_residual_adaln_backward", mutates_args=())
def gated_residual_adaln_backward_op(
    grad_r: Tensor, grad_out: Tensor, r: Tensor, y: Tensor, gate: Tensor, scale: Tensor, index: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dx, dscale, dshift, dgate, dy = launch_backward(grad_r, grad_out, r, y, gate, scale, index)
    return dx, dy, dgate, dscale, dshift


adaln_op.register_fake(lambda x, scale, shift, index: x.new_empty(x.shape))
gated_residual_adaln_op.register_fake(
    lambda x, y, gate, scale, shift, index: (x.new_empty(x.shape), x.new_empty(x.shape))
)
adaln_backward_op.register_fake(
    lambda grad, x, scale, index: tuple(like.new_empty(like.shape) for like in (x, scale, scale))
)
gated_residual_adaln_backward_op.register_fake(
    lambda grad_r, grad_out, r, y, gate, scale, index: tuple(
        like.new_empty(like.shape) for like in (r, r, scale, scale, scale)
    )
)


def _adaln_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, scale, _, index = inputs
    ctx.save_for_backward(x, scale, index)


def _adaln_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *adaln_backward_op(grad, *ctx.saved_tensors), None


def _gated_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, y, gate, scale, _, index = inputs
    ctx.save_for_backward(output[0], y, gate, scale, index)


def _gated_backward(ctx: Any, grad_r: Tensor, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    return *gated_residual_adaln_backward_op(grad_r, grad_out, *ctx.saved_tensors), None


adaln_op.register_autograd(_adaln_backward, setup_context=_adaln_setup)
gated_residual_adaln_op.register_autograd(_gated_backward, setup_context=_gated_setup)

"""The wide product of a linear with adapter slots, in two ways.

    y = f(x W^T + bias + down stack[slot]^T)      x (B, L, K), W (N, K), down (B, L, r), stack (S, N, r), y (B, L, N)

or, for the gradient of x, with both matrices the other way round, W (K, N) and stack (S, r, N); and over three parts

    y = sum of x_p W_p^T + down_p stack_p[slot]^T

**fused**: `gemm_kernel`, one persistent product whose loop runs over K and then over the rank, so that the update
costs no pass over y: x, W, down and stack are read, y is written, rounded once. Tiles of 128 x 256, each of one
sample, are loaded and stored by TMA, which fills with zeros what lies outside a tensor; so the slot -1, a place
before the first slot of the stack, adds zeros.

**in_place**: the products with W are torch's; `up_kernel` adds the other to what they wrote, a second pass over y,
and leaves alone the samples of slot -1.

`best_way` chooses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from clora.kernels.shared import three

Way = Literal["fused", "in_place"]

MIN_TOKENS = 1024
TMA_BYTES = 16  # TMA takes rows that start at multiples of these
MULTIPROCESSORS = 132  # of an H100 or H200, where no GPU says
BLOCK_L, BLOCK_N, BLOCK_K = 128, 256, 64  # 192 KiB of shared memory in four stages, and 32 for the store of half a tile
STAGES, WARPS = 4, 8
GROUP = 8  # rows of tiles that are worked on together, so that their x and the weight stay in the L2 cache


def best_way(x: Tensor, weight: Tensor, A: Tensor, B: Tensor) -> Way:
    """The way to take, by dtype, shapes, strides and kind of GPU alone. By reckoning: no GPU has judged it yet.

    Fused where the tensor cores multiply x's dtype (Triton's fp32 products, exact to fp32, are slow), where a sample
    fills many tiles, where TMA takes all rows, and where the GPU is of the kind that the kernel was compiled for.
    """
    half = x.dtype in (torch.bfloat16, torch.float16)
    row_steps = (*x.stride()[:2], weight.stride(0), *A.shape[1:], B.shape[1])
    row_starts = [step * x.itemsize for step in row_steps] + [tensor.data_ptr() for tensor in (x, weight, A, B)]
    tma_takes = x.stride(2) == weight.stride(1) == 1 and all(start % TMA_BYTES == 0 for start in row_starts)
    on_hopper = not x.is_cuda or torch.cuda.get_device_capability(x.device)[0] == 9
    fused = half and x.shape[0] > 0 and x.shape[1] >= MIN_TOKENS and tma_takes and on_hopper
    return "fused" if fused else "in_place"


@triton.jit
def gelu_tanh(h: tl.tensor) -> tl.tensor:
    """0.5 (1 + tanh(u)) = sigmoid(2 u) with u = sqrt(2 / pi) (h + 0.044715 h^3)"""
    return h * tl.sigmoid(1.5957691216057308 * (h + 0.044715 * h * h * h))


@triton.jit
def store_block(
    acc: tl.tensor,
    y_desc: tl.tensor_descriptor,
    h_desc: tl.tensor_descriptor,
    bias_ptr: tl.tensor,
    b: tl.tensor,
    token: tl.tensor,
    n: tl.tensor,
    N: tl.constexpr,
    BIAS: tl.constexpr,
    GELU: tl.constexpr,
    KEEP_H: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """A block of acc, finished and written from token and column n of sample b on."""
    if BIAS:
        at = n + tl.arange(0, BLOCK_N)
        acc += tl.load(bias_ptr + at, mask=at < N, other=0.0).to(tl.float32)[None, :]
    if KEEP_H:
        h_desc.store([b, token, n], tl.reshape(acc.to(h_desc.dtype), [1, BLOCK_L, BLOCK_N]))
    if GELU:
        acc = gelu_tanh(acc)
    y_desc.store([b, token, n], tl.reshape(acc.to(y_desc.dtype), [1, BLOCK_L, BLOCK_N]))


@triton.jit
def gemm_kernel(
    x0_desc: tl.tensor_descriptor,
    x1_desc: tl.tensor_descriptor,
    x2_desc: tl.tensor_descriptor,
    weight0_desc: tl.tensor_descriptor,
    weight1_desc: tl.tensor_descriptor,
    weight2_desc: tl.tensor_descriptor,
    down0_desc: tl.tensor_descriptor,
    down1_desc: tl.tensor_descriptor,
    down2_desc: tl.tensor_descriptor,
    stack0_desc: tl.tensor_descriptor,
    stack1_desc: tl.tensor_descriptor,
    stack2_desc: tl.tensor_descriptor,
    y_desc: tl.tensor_descriptor,
    h_desc: tl.tensor_descriptor,
    bias_ptr: tl.tensor,
    slot_ptr: tl.tensor,
    B: tl.int32,
    L: tl.int32,
    N: tl.constexpr,
    K: tl.constexpr,
    RANK: tl.constexpr,
    PARTS: tl.constexpr,
    OUT_FIRST: tl.constexpr,
    BIAS: tl.constexpr,
    GELU: tl.constexpr,
    KEEP_H: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
) -> None:
    """y = f(sum over 1 or 3 parts of x W^T + down stack[slot]^T, + bias); the tiles are dealt out to the programs.

    All tensors are three-dimensional, the weights of one layer. They lie as (N, K) where OUT_FIRST, else as (K, N).
    With GELU, y = gelu(h), and h is written beside it where KEEP_H.
    """
    TILES_N: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    K_STEPS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    STEPS: tl.constexpr = K_STEPS + (RANK + BLOCK_K - 1) // BLOCK_K  # of one part
    tiles_l = tl.cdiv(L, BLOCK_L)
    # Flattened, the two loops are one, and a tile's first loads overlap with the end of the tile before. For that all
    # tiles take the same number of steps, those without a slot too.
    for tile in tl.range(tl.program_id(0), B * tiles_l * TILES_N, tl.num_programs(0), flatten=True):
        first = tile // (GROUP * TILES_N) * GROUP
        group = tl.minimum(B * tiles_l - first, GROUP)
        within = tile % (GROUP * TILES_N)
        row = first + within % group
        n = within // group * BLOCK_N
        b = row // tiles_l
        token = row % tiles_l * BLOCK_L
        slot = tl.load(slot_ptr + b).to(tl.int32)
        acc = tl.zeros([BLOCK_L, BLOCK_N], tl.float32)
        for step in range(PARTS * STEPS):
            k = step % STEPS * BLOCK_K
            layer = 0
            left_desc = x0_desc
            right_desc = weight0_desc
            if PARTS == 3:
                if step >= 2 * STEPS:
                    left_desc = x2_desc
                    right_desc = weight2_desc
                elif step >= STEPS:
                    left_desc = x1_desc
                    right_desc = weight1_desc
            if step % STEPS >= K_STEPS:
                k -= K_STEPS * BLOCK_K
                layer = slot
                left_desc = down0_desc
                right_desc = stack0_desc
                if PARTS == 3:
                    if step >= 2 * STEPS:
                        left_desc = down2_desc
                        right_desc = stack2_desc
                    elif step >= STEPS:
                        left_desc = down1_desc
                        right_desc = stack1_desc
            left = tl.reshape(left_desc.load([b, token, k]), [BLOCK_L, BLOCK_K])
            if OUT_FIRST:
                right = tl.trans(tl.reshape(right_desc.load([layer, n, k]), [BLOCK_N, BLOCK_K]))
            else:
                right = tl.reshape(right_desc.load([layer, k, n]), [BLOCK_K, BLOCK_N])
            acc = tl.dot(left, right, acc)
        # By halves, which need half the shared memory.
        near, far = tl.split(tl.permute(tl.reshape(acc, [BLOCK_L, 2, BLOCK_N // 2]), [0, 2, 1]))
        HALF: tl.constexpr = BLOCK_N // 2
        store_block(near, y_desc, h_desc, bias_ptr, b, token, n, N, BIAS, GELU, KEEP_H, BLOCK_L, HALF)
        store_block(far, y_desc, h_desc, bias_ptr, b, token, n + HALF, N, BIAS, GELU, KEEP_H, BLOCK_L, HALF)


@triton.jit
def up_kernel(
    h_ptr: tl.tensor,
    out_ptr: tl.tensor,
    down_ptr: tl.tensor,
    stack_ptr: tl.tensor,
    slot_ptr: tl.tensor,
    L: tl.int64,
    N: tl.constexpr,
    RANK: tl.constexpr,
    OUT_FIRST: tl.constexpr,
    GELU: tl.constexpr,
    KEEP_H: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
) -> None:
    """h (L, N) += down (L, r) times the slot's matrix, one tile of one sample; out may be h.

    With GELU, out = gelu(h), and the new h is written beside it where KEEP_H. A slot's matrix as in `gemm_kernel`.
    """
    b = tl.program_id(1).to(tl.int64)
    slot = tl.load(slot_ptr + b).to(tl.int64)
    if not GELU:
        if slot < 0:
            return
    token = tl.program_id(0).to(tl.int64) * BLOCK_L + tl.arange(0, BLOCK_L)
    n = tl.program_id(2).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = b * L + token[:, None]
    inside = (token[:, None] < L) & (n[None, :] < N)
    acc = tl.zeros([BLOCK_L, BLOCK_N], tl.float32)
    if slot >= 0:
        stack_at = stack_ptr + slot * N * RANK
        for start in range(0, RANK, BLOCK_R):
            r = start + tl.arange(0, BLOCK_R)
            down_mask = (token[:, None] < L) & (r[None, :] < RANK)
            down = tl.load(down_ptr + row * RANK + r[None, :], mask=down_mask, other=0.0)
            if OUT_FIRST:
                places = r[:, None] + n[None, :] * RANK
            else:
                places = r[:, None] * N + n[None, :]
            matrix = tl.load(stack_at + places, mask=(r[:, None] < RANK) & (n[None, :] < N), other=0.0)
            acc = tl.dot(down, matrix, acc, input_precision="ieee")
    h = acc + tl.load(h_ptr + row * N + n[None, :], mask=inside, other=0.0).to(tl.float32)
    if KEEP_H:
        tl.store(h_ptr + row * N + n[None, :], h.to(h_ptr.dtype.element_ty), mask=inside)
    if GELU:
        h = gelu_tanh(h)
    tl.store(out_ptr + row * N + n[None, :], h.to(out_ptr.dtype.element_ty), mask=inside)


def multiply(
    xs: Sequence[Tensor],
    weights: Sequence[Tensor],
    bias: Tensor | None,
    downs: Sequence[Tensor],
    stacks: Sequence[Tensor],
    slot: Tensor,
    way: str,
    *,
    out_first: bool,
    gelu: bool = False,
    keep_h: bool = False,
) -> tuple[Tensor, Tensor]:
    """(y, h) of 1 or 3 parts, typed like x; h, what gelu was taken of, is empty unless it is to be kept.

    The weights lie as (N, K) and the stacks as (S, N, r) where out_first, else as (K, N) and (S, r, N).
    """
    stacks = [stack.to(xs[0].dtype).contiguous() for stack in stacks]
    bias = None if bias is None else bias.contiguous()
    launch = {"fused": _fused, "in_place": _in_place}[way]
    y, h = launch(xs, weights, bias, downs, stacks, slot, out_first, gelu, gelu and keep_h)
    return y, xs[0].new_empty(0) if h is None else h


def _fused(
    xs: Sequence[Tensor],
    weights: Sequence[Tensor],
    bias: Tensor | None,
    downs: Sequence[Tensor],
    stacks: Sequence[Tensor],
    slot: Tensor,
    out_first: bool,
    gelu: bool,
    keep_h: bool,
) -> tuple[Tensor, Tensor | None]:
    samples, L, K = xs[0].shape
    N, rank = weights[0].shape[0 if out_first else 1], downs[0].shape[2]
    y = xs[0].new_empty(samples, L, N)
    h = torch.empty_like(y) if keep_h else None
    left_block = [1, BLOCK_L, BLOCK_K]
    right_block = [1, BLOCK_N, BLOCK_K] if out_first else [1, BLOCK_K, BLOCK_N]
    y_desc, h_desc, _ = _described([y, h, None], [1, BLOCK_L, BLOCK_N // 2])
    programs = MULTIPROCESSORS
    if y.is_cuda:
        programs = torch.cuda.get_device_properties(y.device).multi_processor_count
    tiles = samples * triton.cdiv(L, BLOCK_L) * triton.cdiv(N, BLOCK_N)
    with torch.cuda.device_of(y):
        gemm_kernel[(min(tiles, programs),)](
            *_described(xs, left_block), *_described([weight.unsqueeze(0) for weight in weights], right_block),
            *_described(downs, left_block), *_described(stacks, right_block),
            y_desc, h_desc, bias, slot, samples, L, N, K, rank,
            PARTS=len(xs), OUT_FIRST=out_first, BIAS=bias is not None, GELU=gelu, KEEP_H=keep_h,
            BLOCK_L=BLOCK_L, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K, GROUP=GROUP, num_warps=WARPS, num_stages=STAGES,
        )  # fmt: skip
    return y, h


def _described(tensors: Sequence[Tensor | None], block: list[int]) -> tuple[Any, Any, Any]:
    """What TMA needs to know of 1 or 3 tensors, in the places of three."""
    return three([None if tensor is None else TensorDescriptor.from_tensor(tensor, block) for tensor in tensors])


def _in_place(
    xs: Sequence[Tensor],
    weights: Sequence[Tensor],
    bias: Tensor | None,
    downs: Sequence[Tensor],
    stacks: Sequence[Tensor],
    slot: Tensor,
    out_first: bool,
    gelu: bool,
    keep_h: bool,
) -> tuple[Tensor, Tensor | None]:
    weights = [weight if out_first else weight.mT for weight in weights]
    h = F.linear(xs[0], weights[0], bias).contiguous()
    for x, weight in zip(xs[1:], weights[1:], strict=True):
        h.flatten(0, 1).addmm_(x.flatten(0, 1), weight.mT)
    y = torch.empty_like(h) if keep_h else h
    samples, L, N = h.shape
    rank = downs[0].shape[2]
    most_r, block_l, block_n, warps = (64, 128, 128, 8) if h.dtype != torch.float32 else (16, 64, 64, 8)
    block_r = min(max(triton.next_power_of_2(rank), 16), most_r)
    for down, stack in zip(downs, stacks, strict=True):
        with torch.cuda.device_of(h):
            up_kernel[(triton.cdiv(L, block_l), samples, triton.cdiv(N, block_n))](
                h, y, down, stack, slot, L, N, rank, OUT_FIRST=out_first, GELU=gelu, KEEP_H=keep_h,
                BLOCK_L=block_l, BLOCK_N=block_n, BLOCK_R=block_r, num_warps=warps, num_stages=2,
            )  # fmt: skip
    return y, h if keep_h else None

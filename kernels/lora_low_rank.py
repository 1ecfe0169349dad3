"""The thin products of a linear's adapters: from the width down to the rank, and the gradients of both matrices.

    down = scale[slot] x stack[slot]        x (B, L, C), down (B, L, r)
    gradient of the stack = sum over a slot's samples of down^T x

A slot's matrix lies as (r, C), which A does with C = K, or as (C, r), which B does with C = N. x is read
once, for one stack or for three. Products are summed in fp32 and rounded once, to x's dtype. The gradients' sums over
a slot's samples go through two stages of fixed order, so that equal inputs give equal bits. A slot of -1 reads and
adds nothing: its down is zero.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from clora.kernels.shared import FLOATS, rows, three

MAX_RANK = 256
MAX_SHARED_BYTES = 227 * 1024  # of one block on sm_90
TOKENS = 2048  # summed by one program of the gradients' first stage; fixed, so that the order of the sums is
SUM_BLOCK = 1024


@triton.jit
def down_kernel(
    x_ptr: tl.tensor,
    stack0_ptr: tl.tensor,
    stack1_ptr: tl.tensor,
    stack2_ptr: tl.tensor,
    scale0_ptr: tl.tensor,
    scale1_ptr: tl.tensor,
    scale2_ptr: tl.tensor,
    slot_ptr: tl.tensor,
    down_ptr: tl.tensor,
    L: tl.int64,
    C: tl.constexpr,
    RANK: tl.constexpr,
    x_stride_b: tl.int64,
    x_stride_l: tl.int64,
    PARTS: tl.constexpr,
    STACK_IS_CR: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
) -> None:
    """All ranks of a block of one sample's tokens, of 1 or 3 stacks; down is (PARTS, B, L, r)."""
    b = tl.program_id(1).to(tl.int64)
    slot = tl.load(slot_ptr + b).to(tl.int64)
    token = tl.program_id(0).to(tl.int64) * BLOCK_L + tl.arange(0, BLOCK_L)
    r = tl.arange(0, BLOCK_R)
    acc0 = tl.zeros([BLOCK_L, BLOCK_R], tl.float32)
    acc1 = acc0
    acc2 = acc0
    if slot >= 0:
        x_at = x_ptr + b * x_stride_b + token[:, None] * x_stride_l
        matrix = slot * C * RANK
        for start in range(0, C, BLOCK_C):
            c = start + tl.arange(0, BLOCK_C)
            x = tl.load(x_at + c[None, :], mask=(token[:, None] < L) & (c[None, :] < C), other=0.0)
            if STACK_IS_CR:
                places = c[:, None] * RANK + r[None, :]
            else:
                places = c[:, None] + r[None, :] * C
            inside = (c[:, None] < C) & (r[None, :] < RANK)
            block = tl.load(stack0_ptr + matrix + places, mask=inside, other=0.0)
            acc0 = tl.dot(x, block, acc0, input_precision="ieee")
            if PARTS == 3:
                block = tl.load(stack1_ptr + matrix + places, mask=inside, other=0.0)
                acc1 = tl.dot(x, block, acc1, input_precision="ieee")
                block = tl.load(stack2_ptr + matrix + places, mask=inside, other=0.0)
                acc2 = tl.dot(x, block, acc2, input_precision="ieee")
        acc0 *= tl.load(scale0_ptr + slot)
        if PARTS == 3:
            acc1 *= tl.load(scale1_ptr + slot)
            acc2 *= tl.load(scale2_ptr + slot)
    down_at = down_ptr + (b * L + token[:, None]) * RANK + r[None, :]
    inside = (token[:, None] < L) & (r[None, :] < RANK)
    tl.store(down_at, acc0.to(down_ptr.dtype.element_ty), mask=inside)
    if PARTS == 3:
        to_next = tl.num_programs(1).to(tl.int64) * L * RANK
        tl.store(down_at + to_next, acc1.to(down_ptr.dtype.element_ty), mask=inside)
        tl.store(down_at + 2 * to_next, acc2.to(down_ptr.dtype.element_ty), mask=inside)


@triton.jit
def gradient_kernel(
    down_ptr: tl.tensor,
    wide_ptr: tl.tensor,
    slot_ptr: tl.tensor,
    parts_ptr: tl.tensor,
    L: tl.int64,
    C: tl.constexpr,
    RANK: tl.constexpr,
    wide_stride_b: tl.int64,
    wide_stride_l: tl.int64,
    STACK_IS_CR: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
) -> None:
    """First stage: down^T wide over TOKENS of one sample's tokens, all ranks of a block of the C columns of wide.

    parts is (B, chunks of tokens, C, r) or (B, chunks of tokens, r, C); a sample without a slot leaves its own unset.
    """
    b = tl.program_id(1).to(tl.int64)
    if tl.load(slot_ptr + b) < 0:
        return
    chunk = tl.program_id(2).to(tl.int64)
    c = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    r = tl.arange(0, BLOCK_R)
    acc = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for start in range(chunk * TOKENS, tl.minimum(chunk * TOKENS + TOKENS, L), BLOCK_L):
        token = start + tl.arange(0, BLOCK_L)
        wide_at = wide_ptr + b * wide_stride_b + token[:, None] * wide_stride_l + c[None, :]
        wide = tl.load(wide_at, mask=(token[:, None] < L) & (c[None, :] < C), other=0.0)
        down_at = down_ptr + (b * L + token[:, None]) * RANK + r[None, :]
        down = tl.load(down_at, mask=(token[:, None] < L) & (r[None, :] < RANK), other=0.0)
        acc = tl.dot(tl.trans(down), wide, acc, input_precision="ieee")
    parts_at = parts_ptr + (b * tl.num_programs(2) + chunk) * C * RANK
    if STACK_IS_CR:
        places = r[:, None] + c[None, :] * RANK
    else:
        places = r[:, None] * C + c[None, :]
    tl.store(parts_at + places, acc, mask=(r[:, None] < RANK) & (c[None, :] < C))


@triton.jit
def gradient_sum_kernel(
    parts_ptr: tl.tensor,
    slot_ptr: tl.tensor,
    out_ptr: tl.tensor,
    samples: tl.int64,
    chunks: tl.int64,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Second stage: a block of one slot's SIZE numbers, summed over the chunks of its samples; zeros without any."""
    slot = tl.program_id(1)
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < SIZE
    acc = tl.zeros([BLOCK], tl.float32)
    for b in range(samples):
        if tl.load(slot_ptr + b) == slot:
            for chunk in range(chunks):
                acc += tl.load(parts_ptr + (b * chunks + chunk) * SIZE + place, mask=inside, other=0.0)
    out_at = out_ptr + slot.to(tl.int64) * SIZE + place
    tl.store(out_at, acc.to(out_ptr.dtype.element_ty), mask=inside)


def down_products(
    x: Tensor, stacks: Sequence[Tensor], scales: Sequence[Tensor], slot: Tensor, *, stack_is_cr: bool
) -> Tensor:
    """Scaled products of x (B, L, C) with 1 or 3 stacks of one shape: (number of stacks, B, L, r), typed like x."""
    samples, L, C = x.shape
    parts, rank = len(stacks), stacks[0].shape[2 if stack_is_cr else 1]
    x, stacks = rows(x), [stack.to(x.dtype).contiguous() for stack in stacks]
    out = x.new_empty(parts, samples, L, rank)
    block_r = max(triton.next_power_of_2(rank), 16)
    if x.dtype == torch.float32:
        block_l, block_c, warps, stages = 32, 16, 8, 2
    else:
        block_l, block_c, warps = 64, 64, 4 if parts == 1 else 8
        # What is in flight decides how fast x is read.
        stages = min(5, MAX_SHARED_BYTES // ((block_l + parts * block_r) * block_c * x.itemsize))
    with torch.cuda.device_of(x):
        down_kernel[(triton.cdiv(L, block_l), samples)](
            x, *three(stacks), *three(scales), slot, out, L, C, rank, *x.stride()[:2],
            PARTS=parts, STACK_IS_CR=stack_is_cr,
            BLOCK_L=block_l, BLOCK_C=block_c, BLOCK_R=block_r, num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return out


def stack_gradient(down: Tensor, wide: Tensor, stack: Tensor, slot: Tensor, *, stack_is_cr: bool) -> Tensor:
    """The sums of down^T wide over each slot's samples: shaped and typed like the stack. down (B, L, r) is dense."""
    samples, L, C = wide.shape
    rank = down.shape[2]
    wide = rows(wide)
    chunks = triton.cdiv(L, TOKENS)
    parts = torch.empty(samples, chunks, C * rank, dtype=torch.float32, device=wide.device)
    out = stack.new_empty(stack.shape)
    block_r = max(triton.next_power_of_2(rank), 16)
    block_l, block_c, warps, stages = (64, 64, 4, 3) if wide.dtype != torch.float32 else (16, 32, 8, 2)
    with torch.cuda.device_of(wide):
        gradient_kernel[(triton.cdiv(C, block_c), samples, chunks)](
            down, wide, slot, parts, L, C, rank, *wide.stride()[:2], STACK_IS_CR=stack_is_cr, TOKENS=TOKENS,
            BLOCK_L=block_l, BLOCK_C=block_c, BLOCK_R=block_r, num_warps=warps, num_stages=stages,
        )  # fmt: skip
        gradient_sum_kernel[(triton.cdiv(C * rank, SUM_BLOCK), len(stack))](
            parts, slot, out, samples, chunks, SIZE=C * rank, BLOCK=SUM_BLOCK
        )
    return out


def check_for_kernel(x: Tensor, A: Tensor) -> None:
    """Raise ValueError for what the kernels cannot take though the reference can."""
    if A.shape[1] > MAX_RANK or x.dtype not in FLOATS:
        raise ValueError(
            f"x is {x.dtype} and the stacks' rank {A.shape[1]}; fp32, bf16 or fp16 and at most {MAX_RANK} are needed"
        )

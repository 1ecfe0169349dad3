"""A frozen linear with one adapter slot per sample, and optionally the GELU after it.

    y = f(x W^T + b + scale[slot] (x A[slot]^T) B[slot]^T)        f(h) = h, or gelu(h) in its tanh form

Shapes: x (B, L, K) and y (B, L, N); W (N, K), b (N,) or None; A (S, r, K) and B (S, N, r), the stacks of S slots, r at
most 256, lower ranks padded with zeros; scale (S,) fp32; slot (B,) int32 or int64, 0 to S - 1, or -1 for no adapter,
which leaves such a sample's y the bits of the linear alone. On a GPU slots are not looked at before they are used. x,
W and b have one dtype (fp32, bf16 or fp16), which y has too; A and B may have another, such as fp32 masters: they are
rounded to x's dtype for the products, and their gradients have theirs. Gradients flow to x, A and B alone.

    down   = x A^T                           d_down = scale dh B            dh = dy f'(h)
    h      = (x W^T + b) + scale down B^T    dx     = dh W + d_down A
                                             dA     = sum of d_down^T x,    dB = scale * sum of dh^T down

The products with W are torch's. `down_kernel` makes down and d_down, rounded to x's dtype; `up_kernel` adds the other
product of an adapter to what torch's wrote, in place. Both multiply and sum in fp32 and round once. The sums of dA
and dB over a slot's samples go through two stages of fixed order, so that equal inputs give equal bits.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

Epilogue = Literal["none", "gelu_tanh"]

MAX_RANK = 256
TOKENS = 2048  # summed by one program of the gradients' first stage; fixed, so that the order of the sums is
SUM_BLOCK = 1024
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def lora_linear(
    x_BLK: Tensor,
    weight_NK: Tensor,
    bias_N: Tensor | None,
    A_SrK: Tensor,
    B_SNr: Tensor,
    scale_S: Tensor,
    slot_B: Tensor,
    epilogue: Epilogue = "none",
) -> Tensor:
    """y (B, L, N), typed like x. Raises ValueError for shapes and dtypes other than above, and for another epilogue."""
    _check(x_BLK, weight_NK, bias_N, A_SrK, B_SNr, scale_S, slot_B, epilogue)
    if not x_BLK.is_cuda or torch.compiler.is_exporting():
        return lora_linear_ref(x_BLK, weight_NK, bias_N, A_SrK, B_SNr, scale_S, slot_B, epilogue)
    # Only a backward pass wants h, which without one is never written.
    keep_h = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x_BLK, A_SrK, B_SNr))
    weight_NK, bias_N = weight_NK.detach(), None if bias_N is None else bias_N.detach()
    return lora_linear_op(x_BLK, weight_NK, bias_N, A_SrK, B_SNr, scale_S.detach(), slot_B, epilogue, keep_h)[0]


def lora_linear_ref(
    x_BLK: Tensor,
    weight_NK: Tensor,
    bias_N: Tensor | None,
    A_SrK: Tensor,
    B_SNr: Tensor,
    scale_S: Tensor,
    slot_B: Tensor,
    epilogue: Epilogue = "none",
) -> Tensor:
    """`lora_linear` in plain torch."""
    h = F.linear(x_BLK, weight_NK.detach(), None if bias_N is None else bias_N.detach())
    active = (slot_B >= 0)[:, None, None]
    slot = slot_B.clamp_min(0)
    # Slot 0 stands in where there is none: zeroed before the products and left out after them, so that not even what
    # is not finite in it, or in x, passes.
    A, B = (torch.where(active, stack[slot], 0.0).to(x_BLK.dtype) for stack in (A_SrK, B_SNr))
    scale = torch.where(active, scale_S.detach()[slot, None, None], 0.0)
    update = torch.bmm(torch.bmm(x_BLK, A.mT), B.mT)
    h = torch.where(active, (h + scale * update).to(x_BLK.dtype), h)
    return F.gelu(h, approximate="tanh") if epilogue == "gelu_tanh" else h


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scale: Tensor,
    slot: Tensor,
    epilogue: str,
) -> None:
    if epilogue not in get_args(Epilogue):
        raise ValueError(f"epilogue is {epilogue!r}; one of {', '.join(get_args(Epilogue))} is needed")
    if x.dim() != 3 or weight.dim() != 2 or weight.shape[1] != x.shape[2]:
        raise ValueError(f"x is {tuple(x.shape)} and weight {tuple(weight.shape)}; (B, L, K) and (N, K) are needed")
    N, K = weight.shape
    if bias is not None and bias.shape != (N,):
        raise ValueError(f"bias is {tuple(bias.shape)}; ({N},) is needed")
    if weight.dtype != x.dtype or (bias is not None and bias.dtype != x.dtype):
        raise ValueError(f"x is {x.dtype} and weight {weight.dtype}; x, weight and bias must have one dtype")
    slots, rank = A.shape[:2] if A.dim() == 3 else (0, 0)
    if min(slots, rank) < 1 or A.shape != (slots, rank, K) or B.shape != (slots, N, rank):
        raise ValueError(
            f"A is {tuple(A.shape)} and B {tuple(B.shape)}; (S, r, {K}) and (S, {N}, r) are needed, S and r at least 1"
        )
    if not (A.is_floating_point() and B.is_floating_point()):
        raise ValueError(f"A is {A.dtype} and B {B.dtype}; floating-point numbers are needed")
    if scale.shape != (slots,) or scale.dtype != torch.float32:
        raise ValueError(f"scale is {scale.dtype} {tuple(scale.shape)}; one fp32 number a slot, ({slots},), is needed")
    if slot.shape != x.shape[:1] or slot.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"slot is {slot.dtype} {tuple(slot.shape)}; one integer a sample, ({x.shape[0]},), is needed")


@triton.jit
def down_kernel(
    x_ptr: tl.tensor,
    stack_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    slot_ptr: tl.tensor,
    down_ptr: tl.tensor,
    L: tl.int64,
    C: tl.constexpr,
    RANK: tl.constexpr,
    x_stride_b: tl.int64,
    x_stride_l: tl.int64,
    SCALED: tl.constexpr,
    STACK_IS_CR: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
) -> None:
    """All ranks of a block of one sample's tokens: x (L, C) times the slot's matrix, zeros where there is no slot.

    A slot's matrix lies as (C, r) or as (r, C).
    """
    b = tl.program_id(1).to(tl.int64)
    slot = tl.load(slot_ptr + b).to(tl.int64)
    token = tl.program_id(0).to(tl.int64) * BLOCK_L + tl.arange(0, BLOCK_L)
    r = tl.arange(0, BLOCK_R)
    c = tl.arange(0, BLOCK_C)
    acc = tl.zeros([BLOCK_L, BLOCK_R], tl.float32)
    if slot >= 0:
        x_at = x_ptr + b * x_stride_b + token[:, None] * x_stride_l
        stack_at = stack_ptr + slot * C * RANK
        for start in range(0, C, BLOCK_C):
            at = start + c
            x = tl.load(x_at + at[None, :], mask=(token[:, None] < L) & (at[None, :] < C), other=0.0)
            if STACK_IS_CR:
                places = at[:, None] * RANK + r[None, :]
            else:
                places = at[:, None] + r[None, :] * C
            matrix = tl.load(stack_at + places, mask=(at[:, None] < C) & (r[None, :] < RANK), other=0.0)
            acc = tl.dot(x, matrix, acc, input_precision="ieee")
        if SCALED:
            acc *= tl.load(scale_ptr + slot)
    down_at = down_ptr + (b * L + token[:, None]) * RANK + r[None, :]
    tl.store(down_at, acc.to(down_ptr.dtype.element_ty), mask=(token[:, None] < L) & (r[None, :] < RANK))


@triton.jit
def up_kernel(
    h_ptr: tl.tensor,
    out_ptr: tl.tensor,
    down_ptr: tl.tensor,
    stack_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    slot_ptr: tl.tensor,
    L: tl.int64,
    C: tl.constexpr,
    RANK: tl.constexpr,
    SCALED: tl.constexpr,
    STACK_IS_CR: tl.constexpr,
    GELU: tl.constexpr,
    KEEP_H: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
) -> None:
    """h (L, C) += down (L, r) times the slot's matrix, one tile of one sample; out may be h.

    With GELU, out = gelu(h), and the new h is written beside it where KEEP_H. A slot's matrix as in `down_kernel`.
    """
    b = tl.program_id(1).to(tl.int64)
    slot = tl.load(slot_ptr + b).to(tl.int64)
    if not GELU:
        if slot < 0:
            return
    token = tl.program_id(0).to(tl.int64) * BLOCK_L + tl.arange(0, BLOCK_L)
    c = tl.program_id(2).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    row = b * L + token[:, None]
    inside = (token[:, None] < L) & (c[None, :] < C)
    acc = tl.zeros([BLOCK_L, BLOCK_C], tl.float32)
    if slot >= 0:
        stack_at = stack_ptr + slot * C * RANK
        for start in range(0, RANK, BLOCK_R):
            r = start + tl.arange(0, BLOCK_R)
            down_mask = (token[:, None] < L) & (r[None, :] < RANK)
            down = tl.load(down_ptr + row * RANK + r[None, :], mask=down_mask, other=0.0)
            if STACK_IS_CR:
                places = r[:, None] + c[None, :] * RANK
            else:
                places = r[:, None] * C + c[None, :]
            matrix = tl.load(stack_at + places, mask=(r[:, None] < RANK) & (c[None, :] < C), other=0.0)
            acc = tl.dot(down, matrix, acc, input_precision="ieee")
        if SCALED:
            acc *= tl.load(scale_ptr + slot)
    h = acc + tl.load(h_ptr + row * C + c[None, :], mask=inside, other=0.0).to(tl.float32)
    if KEEP_H:
        tl.store(h_ptr + row * C + c[None, :], h.to(h_ptr.dtype.element_ty), mask=inside)
    if GELU:
        # 0.5 (1 + tanh(u)) = sigmoid(2 u) with u = sqrt(2 / pi) (h + 0.044715 h^3)
        h *= tl.sigmoid(1.5957691216057308 * (h + 0.044715 * h * h * h))
    tl.store(out_ptr + row * C + c[None, :], h.to(out_ptr.dtype.element_ty), mask=inside)


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
    scale_ptr: tl.tensor,
    slot_ptr: tl.tensor,
    out_ptr: tl.tensor,
    samples: tl.int64,
    chunks: tl.int64,
    SIZE: tl.constexpr,
    SCALED: tl.constexpr,
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
                part = tl.load(parts_ptr + (b * chunks + chunk) * SIZE + place, mask=inside, other=0.0)
                if SCALED:
                    part *= tl.load(scale_ptr + slot)
                acc += part
    out_at = out_ptr + slot.to(tl.int64) * SIZE + place
    tl.store(out_at, acc.to(out_ptr.dtype.element_ty), mask=inside)


def launch_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scale: Tensor,
    slot: Tensor,
    epilogue: str,
    keep_h: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, down, h); h is empty unless it is to be kept and there is an epilogue, for else it is y."""
    _check_for_kernel(x, A)
    slot, scale = slot.contiguous(), scale.contiguous()
    down = _down(x, A, None, slot, stack_is_cr=False)
    h = F.linear(x, weight, bias).contiguous()
    gelu = epilogue == "gelu_tanh"
    keep_h = keep_h and gelu
    y = torch.empty_like(h) if keep_h else h
    _add_up(h, y, down, B, scale, slot, stack_is_cr=True, gelu=gelu)
    return y, down, h if keep_h else x.new_empty(0)


def launch_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    scale: Tensor,
    slot: Tensor,
    down: Tensor,
    h: Tensor,
    epilogue: str,
    wanted: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dA, dB), empty where not wanted."""
    _check_for_kernel(x, A)
    slot, scale = slot.contiguous(), scale.contiguous()
    if epilogue == "gelu_tanh":
        grad = torch.ops.aten.gelu_backward(grad, h, approximate="tanh")
    grad = grad.contiguous()
    dx, dA, dB = (x.new_empty(0, dtype=like.dtype) for like in (x, A, B))
    if wanted[0] or wanted[1]:
        d_down = _down(grad, B, scale, slot, stack_is_cr=True)
        if wanted[0]:
            dx = grad @ weight
            _add_up(dx, dx, d_down, A, None, slot, stack_is_cr=False, gelu=False)
        if wanted[1]:
            dA = _gradient(d_down, x, A, None, slot, stack_is_cr=False)
    if wanted[2]:
        dB = _gradient(down, grad, B, scale, slot, stack_is_cr=True)
    return dx, dA, dB


def _down(x: Tensor, stack: Tensor, scale: Tensor | None, slot: Tensor, stack_is_cr: bool) -> Tensor:
    """x (B, L, C) times each sample's matrix, and its scale if given: (B, L, r) like x."""
    samples, L, C = x.shape
    rank = stack.shape[2 if stack_is_cr else 1]
    x, stack = _rows(x), stack.to(x.dtype).contiguous()
    down = x.new_empty(samples, L, rank)
    block_r = max(triton.next_power_of_2(rank), 16)
    block_l, block_c, warps, stages = (64, 64, 4, 3) if x.dtype != torch.float32 else (32, 16, 8, 2)
    with torch.cuda.device_of(x):
        down_kernel[(triton.cdiv(L, block_l), samples)](
            x, stack, stack if scale is None else scale, slot, down, L, C, rank, *x.stride()[:2],
            SCALED=scale is not None, STACK_IS_CR=stack_is_cr,
            BLOCK_L=block_l, BLOCK_C=block_c, BLOCK_R=block_r, num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return down


def _add_up(
    h: Tensor,
    out: Tensor,
    down: Tensor,
    stack: Tensor,
    scale: Tensor | None,
    slot: Tensor,
    stack_is_cr: bool,
    gelu: bool,
) -> None:
    """out = h + down times each sample's matrix, and its scale if given, or gelu of that; h is kept if it is not out.

    h and out are (B, L, C) and contiguous.
    """
    samples, L, C = h.shape
    rank = down.shape[2]
    stack = stack.to(h.dtype).contiguous()
    most_r, block_l, block_c, warps = (64, 128, 128, 8) if h.dtype != torch.float32 else (16, 64, 64, 8)
    block_r = min(max(triton.next_power_of_2(rank), 16), most_r)
    with torch.cuda.device_of(h):
        up_kernel[(triton.cdiv(L, block_l), samples, triton.cdiv(C, block_c))](
            h, out, down, stack, stack if scale is None else scale, slot, L, C, rank,
            SCALED=scale is not None, STACK_IS_CR=stack_is_cr, GELU=gelu, KEEP_H=out is not h,
            BLOCK_L=block_l, BLOCK_C=block_c, BLOCK_R=block_r, num_warps=warps, num_stages=2,
        )  # fmt: skip


def _gradient(
    down: Tensor, wide: Tensor, stack: Tensor, scale: Tensor | None, slot: Tensor, stack_is_cr: bool
) -> Tensor:
    """The sums of down^T wide over each slot's samples, times its scale if given: shaped and typed like the stack."""
    samples, L, C = wide.shape
    rank = down.shape[2]
    wide = _rows(wide)
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
            parts, parts if scale is None else scale, slot, out, samples, chunks,
            SIZE=C * rank, SCALED=scale is not None, BLOCK=SUM_BLOCK,
        )  # fmt: skip
    return out


def _check_for_kernel(x: Tensor, A: Tensor) -> None:
    if A.shape[1] > MAX_RANK or x.dtype not in FLOATS:
        raise ValueError(
            f"x is {x.dtype} and the stacks' rank {A.shape[1]}; fp32, bf16 or fp16 and at most {MAX_RANK} are needed"
        )


def _rows(x: Tensor) -> Tensor:
    """x, copied only if its last dimension is not dense."""
    return x if x.stride(-1) == 1 else x.contiguous()


@torch.library.custom_op("clora::lora_linear", mutates_args=())
def lora_linear_op(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scale: Tensor,
    slot: Tensor,
    epilogue: str,
    keep_h: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return launch_forward(x, weight, bias, A, B, scale, slot, epilogue, keep_h)


@torch.library.custom_op("clora::lora_linear_backward", mutates_args=())
def lora_linear_backward_op(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    scale: Tensor,
    slot: Tensor,
    down: Tensor,
    h: Tensor,
    epilogue: str,
    want_x: bool,
    want_A: bool,
    want_B: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    wanted = (want_x, want_A, want_B)
    return launch_backward(grad, x, weight, A, B, scale, slot, down, h, epilogue, wanted)


@lora_linear_op.register_fake
def _lora_linear_fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: Tensor, slot: Tensor,
    epilogue: str, keep_h: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    y = x.new_empty(*x.shape[:2], weight.shape[0])
    h = torch.empty_like(y) if keep_h and epilogue == "gelu_tanh" else x.new_empty(0)
    return y, x.new_empty(*x.shape[:2], A.shape[1]), h


lora_linear_backward_op.register_fake(
    lambda grad, x, weight, A, B, scale, slot, down, h, epilogue, *wanted: tuple(
        like.new_empty(like.shape if want else 0) for like, want in zip((x, A, B), wanted, strict=True)
    )
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, _, A, B, scale, slot, ctx.epilogue, _ = inputs
    _, down, h = output
    ctx.mark_non_differentiable(down, h)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, A, B, scale, slot, down, h)


def _backward(ctx: Any, grad: Tensor, grad_down: None, grad_h: None) -> tuple[Tensor | None, ...]:
    wanted = [ctx.needs_input_grad[place] for place in (0, 3, 4)]
    gradients = lora_linear_backward_op(grad, *ctx.saved_tensors, ctx.epilogue, *wanted)
    dx, dA, dB = (gradient if want else None for gradient, want in zip(gradients, wanted, strict=True))
    return dx, None, None, dA, dB, None, None, None, None


lora_linear_op.register_autograd(_backward, setup_context=_setup)

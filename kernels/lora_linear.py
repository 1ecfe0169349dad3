"""A frozen linear with one adapter slot per sample, and optionally the GELU after it.

    y = f(x W^T + b + scale[slot] (x A[slot]^T) B[slot]^T)        f(h) = h, or gelu(h) in its tanh form

Shapes: x (B, L, K) and y (B, L, N); W (N, K), b (N,) or None; A (S, r, K) and B (S, N, r), the stacks of S slots, r at
most 256, lower ranks padded with zeros; scale (S,) fp32; slot (B,) int32 or int64, 0 to S - 1, or -1 for no adapter.
On a GPU slots are not looked at before they are used. x, W and b have one dtype (fp32, bf16 or fp16), which y has too;
A and B may have another, such as fp32 masters: they are rounded to x's dtype for the products, and their gradients
have theirs. Gradients flow to x, A and B alone.

    down = scale x A^T              d_down = scale dh B           dh = dy f'(h)
    h    = x W^T + b + down B^T     dx     = dh W + d_down A
                                    dA     = sum of d_down^T x    dB = sum of dh^T down

down and d_down are rounded to x's dtype (`lora_low_rank`). h and dx are made in one of two ways (`lora_gemm`), which
`best_way` chooses by dtype, shapes, strides and kind of GPU; no GPU has judged its choice yet:

fused     One product whose loop runs over K and then over the rank. It sums in fp32 and rounds once, with or without
          an adapter; without, y is the linear rounded once, but not always with the bits of torch's.
in_place  torch's product, to which the other is added, a second pass over y. Without an adapter y has the bits of
          torch's linear.

Equal inputs give equal bits in either way.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from clora.kernels.lora_gemm import best_way, multiply
from clora.kernels.lora_low_rank import check_for_kernel, down_products, stack_gradient

Epilogue = Literal["none", "gelu_tanh"]


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
    if epilogue not in get_args(Epilogue):
        raise ValueError(f"epilogue is {epilogue!r}; one of {', '.join(get_args(Epilogue))} is needed")
    check_inputs(x_BLK, weight_NK, bias_N, A_SrK, B_SNr, scale_S, slot_B)
    if not x_BLK.is_cuda or torch.compiler.is_exporting():
        return lora_linear_ref(x_BLK, weight_NK, bias_N, A_SrK, B_SNr, scale_S, slot_B, epilogue)
    # Only a backward pass wants h, which without one is never written.
    keep_h = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x_BLK, A_SrK, B_SNr))
    weight_NK, bias_N = weight_NK.detach(), None if bias_N is None else bias_N.detach()
    return lora_linear_op(x_BLK, weight_NK, bias_N, A_SrK, B_SNr, scale_S.detach(), slot_B, epilogue, keep_h, None)[0]


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


def check_inputs(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: Tensor, slot: Tensor
) -> None:
    """Raise ValueError for shapes and dtypes other than above."""
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
    way: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, down, h); h is empty unless it is to be kept and there is an epilogue, for else it is y. Way: see above."""
    check_for_kernel(x, A)
    slot = slot.contiguous()
    (down,) = down_products(x, (A,), (scale.contiguous(),), slot, stack_is_cr=False)
    y, h = multiply(
        (x,), (weight,), bias, (down,), (B,), slot, way or best_way(x, weight, A, B),
        out_first=True, gelu=epilogue == "gelu_tanh", keep_h=keep_h,
    )  # fmt: skip
    return y, down, h


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
    way: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dA, dB), empty where not wanted."""
    check_for_kernel(x, A)
    slot = slot.contiguous()
    if epilogue == "gelu_tanh":
        grad = torch.ops.aten.gelu_backward(grad, h, approximate="tanh")
    grad = grad.contiguous()
    dx, dA, dB = (x.new_empty(0, dtype=like.dtype) for like in (x, A, B))
    if wanted[0] or wanted[1]:
        (d_down,) = down_products(grad, (B,), (scale.contiguous(),), slot, stack_is_cr=True)
        if wanted[0]:
            way = way or best_way(x, weight, A, B)
            dx, _ = multiply((grad,), (weight,), None, (d_down,), (A,), slot, way, out_first=False)
        if wanted[1]:
            dA = stack_gradient(d_down, x, A, slot, stack_is_cr=False)
    if wanted[2]:
        dB = stack_gradient(down, grad, B, slot, stack_is_cr=True)
    return dx, dA, dB


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
    way: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    return launch_forward(x, weight, bias, A, B, scale, slot, epilogue, keep_h, way)


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
    way: str | None,
    want_x: bool,
    want_A: bool,
    want_B: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    wanted = (want_x, want_A, want_B)
    return launch_backward(grad, x, weight, A, B, scale, slot, down, h, epilogue, wanted, way)


@lora_linear_op.register_fake
def _lora_linear_fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: Tensor, slot: Tensor,
    epilogue: str, keep_h: bool, way: str | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    y = x.new_empty(*x.shape[:2], weight.shape[0])
    h = torch.empty_like(y) if keep_h and epilogue == "gelu_tanh" else x.new_empty(0)
    return y, x.new_empty(*x.shape[:2], A.shape[1]), h


lora_linear_backward_op.register_fake(
    lambda grad, x, weight, A, B, scale, slot, down, h, epilogue, way, *wanted: tuple(
        like.new_empty(like.shape if want else 0) for like, want in zip((x, A, B), wanted, strict=True)
    )
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, _, A, B, scale, slot, ctx.epilogue, _, ctx.way = inputs
    _, down, h = output
    ctx.mark_non_differentiable(down, h)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, A, B, scale, slot, down, h)


def _backward(ctx: Any, grad: Tensor, grad_down: None, grad_h: None) -> tuple[Tensor | None, ...]:
    wanted = [ctx.needs_input_grad[place] for place in (0, 3, 4)]
    gradients = lora_linear_backward_op(grad, *ctx.saved_tensors, ctx.epilogue, ctx.way, *wanted)
    dx, dA, dB = (gradient if want else None for gradient, want in zip(gradients, wanted, strict=True))
    return dx, None, None, dA, dB, None, None, None, None, None


lora_linear_op.register_autograd(_backward, setup_context=_setup)

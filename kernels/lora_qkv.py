"""The three projections of one stream's attention, each a frozen linear with one adapter slot per sample.

    q, k, v = x W_p^T + b_p + scale_p[slot] (x A_p[slot]^T) B_p[slot]^T        for p = q, k, v

Each is `lora_linear` of its own weight, bias, stacks and scale, whose shapes, dtypes and slots are described there; the
three weights have one shape (N, K), and the stacks S and r in common. Gradients flow to x, the As and the Bs alone.

    down_p = scale_p x A_p^T                 d_down_p = scale_p dp B_p
    p      = x W_p^T + b_p + down_p B_p^T    dx       = sum over p of dp W_p + d_down_p A_p
    dA_p   = sum of d_down_p^T x             dB_p     = sum of dp^T down_p

One pass over x makes the three downs, rounded to x's dtype (`lora_low_rank`). The wide products go one of two ways
(`lora_gemm`). Fused, dx is one product whose loop runs over the three parts, summed in fp32 and rounded once. In place,
torch's products are added up in x's dtype. Equal inputs give equal bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from clora.kernels.lora_gemm import best_way, multiply
from clora.kernels.lora_linear import check_inputs, lora_linear_ref
from clora.kernels.lora_low_rank import check_for_kernel, down_products, stack_gradient

# Of q, k and v.
Three = tuple[Tensor, Tensor, Tensor]


def lora_qkv(
    x_BLK: Tensor,
    weights: Three,
    biases: tuple[Tensor | None, Tensor | None, Tensor | None],
    A: Three,
    B: Three,
    scale: Three,
    slot_B: Tensor,
) -> Three:
    """(q, k, v), each (B, L, N) and typed like x, of weights (N, K), biases (N,) or None, A (S, r, K), B (S, N, r) and
    fp32 scales (S,), three of each. Raises ValueError for other shapes and dtypes, and names the projection."""
    _check(x_BLK, weights, biases, A, B, scale, slot_B)
    if not x_BLK.is_cuda or torch.compiler.is_exporting():
        return lora_qkv_ref(x_BLK, weights, biases, A, B, scale, slot_B)
    frozen_weights, frozen_scale = ([tensor.detach() for tensor in tensors] for tensors in (weights, scale))
    frozen_biases = [None if bias is None else bias.detach() for bias in biases]
    q, k, v, _ = lora_qkv_op(x_BLK, frozen_weights, *frozen_biases, list(A), list(B), frozen_scale, slot_B, None)
    return q, k, v


def lora_qkv_ref(
    x_BLK: Tensor,
    weights: Three,
    biases: tuple[Tensor | None, Tensor | None, Tensor | None],
    A: Three,
    B: Three,
    scale: Three,
    slot_B: Tensor,
) -> Three:
    """`lora_qkv` in plain torch."""
    q, k, v = (lora_linear_ref(x_BLK, *of_one, slot_B) for of_one in zip(weights, biases, A, B, scale, strict=True))
    return q, k, v


def _check(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    scale: Sequence[Tensor],
    slot: Tensor,
) -> None:
    counts = [len(tensors) for tensors in (weights, biases, A, B, scale)]
    if counts != [3] * 5:
        raise ValueError(f"weights, biases, A, B and scale hold {counts}; three each, of q, k and v, are needed")
    for name, weight, bias, its_A, its_B, its_scale in zip("qkv", weights, biases, A, B, scale, strict=True):
        try:
            check_inputs(x, weight, bias, its_A, its_B, its_scale, slot)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    for name, tensors in (("weights", weights), ("A", A)):
        if len({tensor.shape for tensor in tensors}) > 1 or len({tensor.dtype for tensor in tensors}) > 1:
            each = ", ".join(f"{tensor.dtype} {tuple(tensor.shape)}" for tensor in tensors)
            raise ValueError(f"{name} of q, k and v are {each}; one dtype and shape is needed")


def launch_forward(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    scale: Sequence[Tensor],
    slot: Tensor,
    way: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(q, k, v, down); down is (3, B, L, r)."""
    check_for_kernel(x, A[0])
    slot, way = slot.contiguous(), way or _best_way(x, weights, A, B)
    down = down_products(x, A, [s.contiguous() for s in scale], slot, stack_is_cr=False)
    q, k, v = (
        multiply((x,), (weight,), bias, (its_down,), (stack,), slot, way, out_first=True)[0]
        for weight, bias, its_down, stack in zip(weights, biases, down, B, strict=True)
    )
    return q, k, v, down


def launch_backward(
    grads: Sequence[Tensor],
    x: Tensor,
    weights: Sequence[Tensor],
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    scale: Sequence[Tensor],
    slot: Tensor,
    down: Tensor,
    wanted: Sequence[bool],
    way: str | None = None,
) -> list[Tensor]:
    """[dx, dA of q, k and v, dB of q, k and v]; empty where x, the As or the Bs are not wanted."""
    check_for_kernel(x, A[0])
    slot, way = slot.contiguous(), way or _best_way(x, weights, A, B)
    grads = [grad.contiguous() for grad in grads]
    dx, *stacks = (x.new_empty(0, dtype=like.dtype) for like in (x, *A, *B))
    if wanted[0] or wanted[1]:
        d_downs = [
            down_products(grad, (stack,), (s.contiguous(),), slot, stack_is_cr=True)[0]
            for grad, stack, s in zip(grads, B, scale, strict=True)
        ]
        if wanted[0]:
            dx, _ = multiply(grads, weights, None, d_downs, A, slot, way, out_first=False)
        if wanted[1]:
            stacks[:3] = [stack_gradient(d, x, a, slot, stack_is_cr=False) for d, a in zip(d_downs, A, strict=True)]
    if wanted[2]:
        of_each = zip(down, grads, B, strict=True)
        stacks[3:] = [stack_gradient(d, grad, b, slot, stack_is_cr=True) for d, grad, b in of_each]
    return [dx, *stacks]


def _best_way(x: Tensor, weights: Sequence[Tensor], A: Sequence[Tensor], B: Sequence[Tensor]) -> str:
    """Fused where `best_way` says so of all three."""
    ways = {best_way(x, *of_one) for of_one in zip(weights, A, B, strict=True)}
    return "fused" if ways == {"fused"} else "in_place"


@torch.library.custom_op("clora::lora_qkv", mutates_args=())
def lora_qkv_op(
    x: Tensor,
    weights: Sequence[Tensor],
    bias_q: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    scale: Sequence[Tensor],
    slot: Tensor,
    way: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return launch_forward(x, weights, (bias_q, bias_k, bias_v), A, B, scale, slot, way)


@torch.library.custom_op("clora::lora_qkv_backward", mutates_args=())
def lora_qkv_backward_op(
    grads: Sequence[Tensor],
    x: Tensor,
    weights: Sequence[Tensor],
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    scale: Sequence[Tensor],
    slot: Tensor,
    down: Tensor,
    wanted: Sequence[bool],
    way: str | None,
) -> list[Tensor]:
    return launch_backward(grads, x, weights, A, B, scale, slot, down, wanted, way)


@lora_qkv_op.register_fake
def _lora_qkv_fake(x: Tensor, weights: Sequence[Tensor], *others: Any) -> tuple[Tensor, ...]:
    q, k, v = (x.new_empty(*x.shape[:2], weight.shape[0]) for weight in weights)
    rank = others[3][0].shape[1]  # after the biases come the As
    return q, k, v, x.new_empty(3, *x.shape[:2], rank)


@lora_qkv_backward_op.register_fake
def _lora_qkv_backward_fake(
    grads: Sequence[Tensor], x: Tensor, weights: Sequence[Tensor], A: Sequence[Tensor], B: Sequence[Tensor],
    scale: Sequence[Tensor], slot: Tensor, down: Tensor, wanted: Sequence[bool], way: str | None,
) -> list[Tensor]:  # fmt: skip
    wants = (wanted[0], *[wanted[1]] * 3, *[wanted[2]] * 3)
    return [like.new_empty(like.shape if want else 0) for like, want in zip((x, *A, *B), wants, strict=True)]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weights, _, _, _, A, B, scale, slot, ctx.way = inputs
    ctx.mark_non_differentiable(output[3])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, *weights, *A, *B, *scale, slot, output[3])


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    x, *threes, slot, down = ctx.saved_tensors
    weights, A, B, scale = (threes[place : place + 3] for place in range(0, 12, 3))
    need_x, need_A, need_B = (ctx.needs_input_grad[place] for place in (0, 5, 6))
    # A projection that nothing depends on has no gradient.
    filled = [x.new_zeros(*x.shape[:2], weights[0].shape[0]) if grad is None else grad for grad in grads[:3]]
    wanted = [need_x, any(need_A), any(need_B)]
    dx, *stacks = lora_qkv_backward_op(filled, x, weights, A, B, scale, slot, down, wanted, ctx.way)
    stacks = [stack if need else None for stack, need in zip(stacks, [*need_A, *need_B], strict=True)]
    none = [None] * 3
    return dx if need_x else None, none, None, None, None, stacks[:3], stacks[3:], none, None, None


lora_qkv_op.register_autograd(_backward, setup_context=_setup)

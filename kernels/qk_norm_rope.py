"""What joint attention takes of the projections: q and k normed and rotated, q, k and v of text and image in one row.

    q = [rope(norm(q_img) norm_q), rope(norm(q_txt) norm_added_q)]    the image's tokens first, then the text's
    k = [rope(norm(k_img) norm_k), rope(norm(k_txt) norm_added_k)]
    v = [v_img, v_txt]

    norm(x)   = x / sqrt(mean(x^2) + 1e-6) over a head
    rope(y)_j = y_j (cos_j + i sin_j), where y_j is the head's j-th pair of neighbours as a complex number

Text that is padded on the right thus ends each row, so that a sample's real tokens are the first of its row and
attention needs no mask.

Shapes: q_txt, k_txt, v_txt (B, L_txt, H D) and q_img, k_img, v_img (B, L_img, H D), which may be parts of wider rows;
the four norm weights (D,), D even and at most 256; cos, sin (L_img + L_txt, D / 2) fp32, in the order of the result.
q, k and v are (B, L_img + L_txt, H, D), which FlashAttention takes as they are and torch's attention transposed.
Either stream may be empty. The projections have one dtype (fp32, bf16 or fp16), which the results have too; the norm
weights may be of others.

The kernels compute in fp32 and round once at the end, and read and write each tensor once. The backward pass
computes the statistics again instead of storing them; the gradients of v_txt and v_img are parts of v's. Every row
is reduced by itself, so that equal inputs give equal bits. Gradients flow to the projections alone.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from clora.kernels.shared import FLOATS, at_least_fp32, rows

EPS = 1e-6
MAX_D = 256
BLOCK = 1024  # elements of the heads that one program takes


def qk_norm_rope(
    q_img: Tensor,
    k_img: Tensor,
    v_img: Tensor,
    q_txt: Tensor,
    k_txt: Tensor,
    v_txt: Tensor,
    norm_q: Tensor,
    norm_k: Tensor,
    norm_added_q: Tensor,
    norm_added_k: Tensor,
    cos: Tensor,
    sin: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """(q, k, v), each (B, L_img + L_txt, H, D). Raises ValueError for shapes or dtypes other than above.

    The weights have the names that diffusers' `Attention` gives them; `rotary_tables` makes cos and sin.
    """
    _check((q_img, k_img, v_img), (q_txt, k_txt, v_txt), (norm_q, norm_k, norm_added_q, norm_added_k), cos, sin)
    if not q_img.is_cuda or torch.compiler.is_exporting():
        return qk_norm_rope_ref(
            q_img, k_img, v_img, q_txt, k_txt, v_txt, norm_q, norm_k, norm_added_q, norm_added_k, cos, sin
        )
    return qk_norm_rope_op(
        q_img, k_img, v_img, q_txt, k_txt, v_txt, norm_q, norm_k, norm_added_q, norm_added_k, cos, sin
    )


def rotary_tables(freqs_img: Tensor, freqs_txt: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin for `qk_norm_rope` of diffusers' complex `image_rotary_emb`: to be made once, not in every block."""
    if not (freqs_img.is_complex() and freqs_txt.is_complex()):
        raise ValueError(f"freqs_img is {freqs_img.dtype} and freqs_txt {freqs_txt.dtype}; complex numbers are needed")
    freqs = torch.cat([freqs_img, freqs_txt])
    return freqs.real.float().contiguous(), freqs.imag.float().contiguous()


def qk_norm_rope_ref(
    q_img: Tensor,
    k_img: Tensor,
    v_img: Tensor,
    q_txt: Tensor,
    k_txt: Tensor,
    v_txt: Tensor,
    norm_q: Tensor,
    norm_k: Tensor,
    norm_added_q: Tensor,
    norm_added_k: Tensor,
    cos: Tensor,
    sin: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """`qk_norm_rope` in plain torch: what diffusers' Qwen-Image attention computes, rounding where that rounds."""
    L_img, D = q_img.shape[1], norm_q.shape[0]
    q, k = (
        torch.cat(
            [
                _rotated(_normed(_heads(img, D), norm_img), cos[:L_img], sin[:L_img]),
                _rotated(_normed(_heads(txt, D), norm_txt), cos[L_img:], sin[L_img:]),
            ],
            dim=1,
        ).to(img.dtype)
        for img, txt, norm_img, norm_txt in ((q_img, q_txt, norm_q, norm_added_q), (k_img, k_txt, norm_k, norm_added_k))
    )
    return q, k, torch.cat([_heads(v_img, D), _heads(v_txt, D)], dim=1)


def _heads(x: Tensor, D: int) -> Tensor:
    """(B, L, H D) -> (B, L, H, D)."""
    return x.unflatten(-1, (x.shape[-1] // D, D))


def _normed(x: Tensor, weight: Tensor) -> Tensor:
    """diffusers' RMSNorm: before the product with a weight of half precision, x is rounded to that."""
    variance = at_least_fp32(x).square().mean(-1, keepdim=True)
    normed = x * torch.rsqrt(variance + EPS)
    if weight.dtype in (torch.bfloat16, torch.float16):
        normed = normed.to(weight.dtype)
    return normed * weight.detach()


def _rotated(y: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Each pair of neighbours in the last dimension of (B, L, H, D), turned by its token's angle; at least fp32."""
    a, b = at_least_fp32(y).unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos.detach().unsqueeze(1), sin.detach().unsqueeze(1)
    return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)


def _check(
    image: tuple[Tensor, ...], text: tuple[Tensor, ...], norms: tuple[Tensor, ...], cos: Tensor, sin: Tensor
) -> None:
    D = norms[0].shape[-1] if norms[0].dim() else 0
    if D == 0 or D % 2 or any(norm.shape != (D,) for norm in norms):
        raise ValueError(f"norm weights are {_shapes(norms)}; four of one shape (D,), D even, are needed")
    q = image[0]
    if q.dim() != 3 or q.shape[2] % D:
        raise ValueError(f"q_img has shape {tuple(q.shape)}; (B, L_img, H D) is needed, with D = {D}")
    for name, stream in (("img", image), ("txt", text)):
        like = (q.shape[0], stream[0].shape[1] if stream[0].dim() == 3 else -1, q.shape[2])
        if any(x.shape != like or x.dtype != q.dtype for x in stream):
            dtypes = sorted({str(x.dtype) for x in stream})
            raise ValueError(
                f"q_{name}, k_{name} and v_{name} are {_shapes(stream)} in {' and '.join(dtypes)}; one shape "
                f"({q.shape[0]}, L_{name}, {q.shape[2]}) and q_img's {q.dtype} are needed"
            )
    table = (q.shape[1] + text[0].shape[1], D // 2)
    if any(x.shape != table or x.dtype != torch.float32 for x in (cos, sin)):
        raise ValueError(
            f"cos is {cos.dtype} {tuple(cos.shape)} and sin {sin.dtype} {tuple(sin.shape)}; fp32 {table}, the "
            "image's rows first, is needed"
        )


def _shapes(tensors: tuple[Tensor, ...]) -> str:
    return ", ".join(str(tuple(tensor.shape)) for tensor in tensors)


@triton.jit
def rotate_pairs(
    x: tl.tensor, cos: tl.tensor, sin: tl.tensor, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr
) -> tl.tensor:
    """Each pair (a, b) of a row of x, as a + i b, times cos + i sin."""
    a, b = tl.split(tl.reshape(x, (BLOCK_H, BLOCK_D // 2, 2)))
    return tl.reshape(tl.join(a * cos - b * sin, a * sin + b * cos), (BLOCK_H, BLOCK_D))


@triton.jit
def qk_norm_rope_kernel(
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    norm_q_ptr: tl.tensor,
    norm_k_ptr: tl.tensor,
    cos_ptr: tl.tensor,
    sin_ptr: tl.tensor,
    out_q_ptr: tl.tensor,
    out_k_ptr: tl.tensor,
    out_v_ptr: tl.tensor,
    START: tl.int64,
    L: tl.int64,
    L_JOINT: tl.int64,
    H: tl.int64,
    D: tl.constexpr,
    q_stride_b: tl.int64,
    q_stride_l: tl.int64,
    k_stride_b: tl.int64,
    k_stride_l: tl.int64,
    v_stride_b: tl.int64,
    v_stride_l: tl.int64,
    EPS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """A block of heads of one token, of the stream whose first token is number START of the joint sequence."""
    row = tl.program_id(0).to(tl.int64)
    b = row // L
    token = row - b * L
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    d = tl.arange(0, BLOCK_D)
    pair = tl.arange(0, BLOCK_D // 2)
    inside = (head < H)[:, None] & (d < D)[None, :]
    at = head[:, None] * D + d[None, :]
    q = tl.load(q_ptr + b * q_stride_b + token * q_stride_l + at, mask=inside, other=0.0).to(tl.float32)
    k = tl.load(k_ptr + b * k_stride_b + token * k_stride_l + at, mask=inside, other=0.0).to(tl.float32)
    v = tl.load(v_ptr + b * v_stride_b + token * v_stride_l + at, mask=inside, other=0.0)
    norm_q = tl.load(norm_q_ptr + d, mask=d < D, other=0.0).to(tl.float32)
    norm_k = tl.load(norm_k_ptr + d, mask=d < D, other=0.0).to(tl.float32)
    angle = (START + token) * (D // 2) + pair
    cos = tl.load(cos_ptr + angle, mask=pair < D // 2, other=0.0)
    sin = tl.load(sin_ptr + angle, mask=pair < D // 2, other=0.0)
    to = (b * L_JOINT + START + token) * H * D + at
    q *= tl.rsqrt(tl.sum(q * q, 1) / D + EPS)[:, None] * norm_q
    k *= tl.rsqrt(tl.sum(k * k, 1) / D + EPS)[:, None] * norm_k
    q = rotate_pairs(q, cos, sin, BLOCK_H, BLOCK_D)
    k = rotate_pairs(k, cos, sin, BLOCK_H, BLOCK_D)
    tl.store(out_q_ptr + to, q.to(out_q_ptr.dtype.element_ty), mask=inside)
    tl.store(out_k_ptr + to, k.to(out_k_ptr.dtype.element_ty), mask=inside)
    tl.store(out_v_ptr + to, v, mask=inside)


@triton.jit
def rms_norm_gradient(g: tl.tensor, x: tl.tensor, D: tl.constexpr, EPS: tl.constexpr) -> tl.tensor:
    """dx = (g - n mean(g n)) / sqrt(mean(x^2) + eps), where g is the gradient of n = norm(x), a row a head."""
    rstd = tl.rsqrt(tl.sum(x * x, 1) / D + EPS)[:, None]
    normed = x * rstd
    return (g - normed * (tl.sum(g * normed, 1) / D)[:, None]) * rstd


@triton.jit
def qk_norm_rope_backward_kernel(
    grad_q_ptr: tl.tensor,
    grad_k_ptr: tl.tensor,
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    norm_q_ptr: tl.tensor,
    norm_k_ptr: tl.tensor,
    cos_ptr: tl.tensor,
    sin_ptr: tl.tensor,
    dq_ptr: tl.tensor,
    dk_ptr: tl.tensor,
    START: tl.int64,
    L: tl.int64,
    L_JOINT: tl.int64,
    H: tl.int64,
    D: tl.constexpr,
    q_stride_b: tl.int64,
    q_stride_l: tl.int64,
    k_stride_b: tl.int64,
    k_stride_l: tl.int64,
    EPS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """The same block of heads. The rotation's gradient is the rotation by the opposite angle."""
    row = tl.program_id(0).to(tl.int64)
    b = row // L
    token = row - b * L
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    d = tl.arange(0, BLOCK_D)
    pair = tl.arange(0, BLOCK_D // 2)
    inside = (head < H)[:, None] & (d < D)[None, :]
    at = head[:, None] * D + d[None, :]
    joint = (b * L_JOINT + START + token) * H * D + at
    grad_q = tl.load(grad_q_ptr + joint, mask=inside, other=0.0).to(tl.float32)
    grad_k = tl.load(grad_k_ptr + joint, mask=inside, other=0.0).to(tl.float32)
    q = tl.load(q_ptr + b * q_stride_b + token * q_stride_l + at, mask=inside, other=0.0).to(tl.float32)
    k = tl.load(k_ptr + b * k_stride_b + token * k_stride_l + at, mask=inside, other=0.0).to(tl.float32)
    norm_q = tl.load(norm_q_ptr + d, mask=d < D, other=0.0).to(tl.float32)
    norm_k = tl.load(norm_k_ptr + d, mask=d < D, other=0.0).to(tl.float32)
    angle = (START + token) * (D // 2) + pair
    cos = tl.load(cos_ptr + angle, mask=pair < D // 2, other=0.0)
    sin = tl.load(sin_ptr + angle, mask=pair < D // 2, other=0.0)
    dq = rms_norm_gradient(rotate_pairs(grad_q, cos, -sin, BLOCK_H, BLOCK_D) * norm_q, q, D, EPS)
    dk = rms_norm_gradient(rotate_pairs(grad_k, cos, -sin, BLOCK_H, BLOCK_D) * norm_k, k, D, EPS)
    tl.store(dq_ptr + row * H * D + at, dq.to(dq_ptr.dtype.element_ty), mask=inside)
    tl.store(dk_ptr + row * H * D + at, dk.to(dk_ptr.dtype.element_ty), mask=inside)


def launch_forward(
    q_img: Tensor,
    k_img: Tensor,
    v_img: Tensor,
    q_txt: Tensor,
    k_txt: Tensor,
    v_txt: Tensor,
    norm_q: Tensor,
    norm_k: Tensor,
    norm_added_q: Tensor,
    norm_added_k: Tensor,
    cos: Tensor,
    sin: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """(q, k, v): the forward kernel for each stream, into its part of the joint sequence."""
    B, L_joint, H, D = _joint_shape(q_img, q_txt, norm_q)
    out_q, out_k, out_v = (q_img.new_empty(B, L_joint, H, D) for _ in range(3))
    block_h, block_d, warps = _blocks(H, D)
    cos, sin = cos.contiguous(), sin.contiguous()
    image = (q_img, k_img, v_img, norm_q, norm_k, 0)
    text = (q_txt, k_txt, v_txt, norm_added_q, norm_added_k, q_img.shape[1])
    with torch.cuda.device_of(q_img):
        for q, k, v, weight_q, weight_k, start in (image, text):
            L, q, k, v = q.shape[1], rows(q), rows(k), rows(v)
            qk_norm_rope_kernel[(B * L, triton.cdiv(H, block_h))](
                q, k, v, weight_q.contiguous(), weight_k.contiguous(), cos, sin, out_q, out_k, out_v,
                start, L, L_joint, H, D, *q.stride()[:2], *k.stride()[:2], *v.stride()[:2],
                EPS=EPS, BLOCK_H=block_h, BLOCK_D=block_d, num_warps=warps,
            )  # fmt: skip
    return out_q, out_k, out_v


def launch_backward(
    grad_q: Tensor,
    grad_k: Tensor,
    q_img: Tensor,
    k_img: Tensor,
    q_txt: Tensor,
    k_txt: Tensor,
    norm_q: Tensor,
    norm_k: Tensor,
    norm_added_q: Tensor,
    norm_added_k: Tensor,
    cos: Tensor,
    sin: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dq_img, dk_img, dq_txt, dk_txt): the backward kernel for each stream."""
    B, L_joint, H, D = _joint_shape(q_img, q_txt, norm_q)
    dq_img, dk_img, dq_txt, dk_txt = (x.new_empty(x.shape) for x in (q_img, k_img, q_txt, k_txt))
    block_h, block_d, warps = _blocks(H, D)
    grad_q, grad_k, cos, sin = grad_q.contiguous(), grad_k.contiguous(), cos.contiguous(), sin.contiguous()
    image = (q_img, k_img, norm_q, norm_k, dq_img, dk_img, 0)
    text = (q_txt, k_txt, norm_added_q, norm_added_k, dq_txt, dk_txt, q_img.shape[1])
    with torch.cuda.device_of(q_img):
        for q, k, weight_q, weight_k, dq, dk, start in (image, text):
            L, q, k = q.shape[1], rows(q), rows(k)
            qk_norm_rope_backward_kernel[(B * L, triton.cdiv(H, block_h))](
                grad_q, grad_k, q, k, weight_q.contiguous(), weight_k.contiguous(), cos, sin, dq, dk,
                start, L, L_joint, H, D, *q.stride()[:2], *k.stride()[:2],
                EPS=EPS, BLOCK_H=block_h, BLOCK_D=block_d, num_warps=warps,
            )  # fmt: skip
    return dq_img, dk_img, dq_txt, dk_txt


def _joint_shape(q_img: Tensor, q_txt: Tensor, norm_q: Tensor) -> tuple[int, int, int, int]:
    """(B, L_img + L_txt, H, D), where the kernels take it."""
    B, L_img, width = q_img.shape
    D = norm_q.shape[0]
    if D > MAX_D or q_img.dtype not in FLOATS:
        raise ValueError(f"q_img is {q_img.dtype} with heads of {D}; fp32, bf16 or fp16 and at most {MAX_D} are needed")
    return B, L_img + q_txt.shape[1], width // D, D


def _blocks(H: int, D: int) -> tuple[int, int, int]:
    """A program's heads and elements of a head, powers of two, and its warps: 8 elements a thread."""
    block_d = triton.next_power_of_2(D)
    block_h = min(triton.next_power_of_2(H), BLOCK // block_d)
    return block_h, block_d, max(block_h * block_d // 256, 1)


@torch.library.custom_op("clora::qk_norm_rope", mutates_args=())
def qk_norm_rope_op(
    q_img: Tensor,
    k_img: Tensor,
    v_img: Tensor,
    q_txt: Tensor,
    k_txt: Tensor,
    v_txt: Tensor,
    norm_q: Tensor,
    norm_k: Tensor,
    norm_added_q: Tensor,
    norm_added_k: Tensor,
    cos: Tensor,
    sin: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    return launch_forward(
        q_img, k_img, v_img, q_txt, k_txt, v_txt, norm_q, norm_k, norm_added_q, norm_added_k, cos, sin
    )


@torch.library.custom_op("clora::qk_norm_rope_backward", mutates_args=())
def qk_norm_rope_backward_op(
    grad_q: Tensor,
    grad_k: Tensor,
    q_img: Tensor,
    k_img: Tensor,
    q_txt: Tensor,
    k_txt: Tensor,
    norm_q: Tensor,
    norm_k: Tensor,
    norm_added_q: Tensor,
    norm_added_k: Tensor,
    cos: Tensor,
    sin: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return launch_backward(
        grad_q, grad_k, q_img, k_img, q_txt, k_txt, norm_q, norm_k, norm_added_q, norm_added_k, cos, sin
    )


@qk_norm_rope_op.register_fake
def _fake(q_img: Tensor, k_img: Tensor, v_img: Tensor, q_txt: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    D = others[2].shape[0]  # after k_txt and v_txt comes norm_q
    shape = (q_img.shape[0], q_img.shape[1] + q_txt.shape[1], q_img.shape[2] // D, D)
    return tuple(q_img.new_empty(shape) for _ in range(3))


qk_norm_rope_backward_op.register_fake(
    lambda grad_q, grad_k, q_img, k_img, q_txt, k_txt, *_: tuple(
        x.new_empty(x.shape) for x in (q_img, k_img, q_txt, k_txt)
    )
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q_img, k_img, _, q_txt, k_txt, _, *frozen = inputs
    ctx.save_for_backward(q_img, k_img, q_txt, k_txt, *frozen)


def _backward(ctx: Any, grad_q: Tensor, grad_k: Tensor, grad_v: Tensor) -> tuple[Tensor | None, ...]:
    dq_img, dk_img, dq_txt, dk_txt = qk_norm_rope_backward_op(grad_q, grad_k, *ctx.saved_tensors)
    dv_img, dv_txt = grad_v.flatten(2).split([dq_img.shape[1], dq_txt.shape[1]], dim=1)  # as torch.cat's gradients are
    return dq_img, dk_img, dv_img, dq_txt, dk_txt, dv_txt, None, None, None, None, None, None


qk_norm_rope_op.register_autograd(_backward, setup_context=_setup)

"""q, k and v made ready for joint attention, against torch: `python -m bench.qk_norm_rope [--json] [--rounds N]`.

RMSNorm and rotary of q and k, and the text's tokens joined to the image's, forward alone and forward with backward,
at the width of Qwen-Image-Edit: "ours", "compiled" (the reference under torch.compile) and "eager", which is what
diffusers does: RMSNorm modules, complex rotary, three torch.cat. The result is checked against fp64 first; bytes
count each tensor once. For shares, and for what is timed without a GPU, see `bench.timing`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bench.timing import Case, check_accuracy, run
from clora.kernels.qk_norm_rope import EPS, qk_norm_rope, qk_norm_rope_ref, rotary_tables

# Floating-point operations an element of q or k, counted in the equations: mean of squares 2, norm 1, weight 1,
# rotation 3. Backward: rotation 3, weight 1, statistics and norm again 3, mean of g n 2, dx 3.
FORWARD_FLOPS, BACKWARD_FLOPS = 7, 12
# Tensors (B, L_txt + L_img, H D) that are read and written: q, k, v; two gradients, q, k, and two gradients. The
# gradient of v is v's own.
FORWARD_TENSORS, BACKWARD_TENSORS = 6, 6

Outputs = tuple[Tensor, ...]
Op = Callable[..., Outputs]
Shape = tuple[int, int, int, int, int]


def stock_norm(x: Tensor, weight: Tensor) -> Tensor:
    """diffusers' RMSNorm with a weight of x's dtype."""
    variance = x.to(torch.float32).pow(2).mean(-1, keepdim=True)
    return (x * torch.rsqrt(variance + EPS)).to(weight.dtype) * weight


def stock_rotary(x: Tensor, freqs: Tensor) -> Tensor:
    """diffusers' `apply_rotary_emb_qwen(use_real=False)`."""
    turned = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2)) * freqs.unsqueeze(1)
    return torch.view_as_real(turned).flatten(3).type_as(x)


def make_cases(shape: Shape, dtype: torch.dtype, device: str) -> list[Case]:
    """Forward, and forward with backward, of (B, L_txt, L_img, H, D)."""
    B, L_txt, L_img, H, D = shape
    projections = [
        torch.randn(B, L, H * D, device=device, dtype=dtype).requires_grad_()
        for L in (L_img, L_img, L_img, L_txt, L_txt, L_txt)
    ]
    norms = [1 + 0.1 * torch.randn(D, device=device, dtype=dtype) for _ in range(4)]
    angles = 10 * torch.randn(L_txt + L_img, D // 2, device=device)
    freqs_txt, freqs_img = torch.polar(torch.ones_like(angles), angles).split([L_txt, L_img])
    tables = rotary_tables(freqs_img, freqs_txt)
    gradients = [torch.randn(B, L_txt + L_img, H, D, device=device, dtype=dtype) for _ in range(3)]

    def stock(*inputs: Tensor) -> Outputs:
        q_img, k_img, v_img, q_txt, k_txt, v_txt = (x.unflatten(-1, (-1, D)) for x in inputs[:6])
        norm_q, norm_k, norm_added_q, norm_added_k = inputs[6:10]
        q_img, k_img = (stock_rotary(stock_norm(x, w), freqs_img) for x, w in ((q_img, norm_q), (k_img, norm_k)))
        added = (q_txt, norm_added_q), (k_txt, norm_added_k)
        q_txt, k_txt = (stock_rotary(stock_norm(x, w), freqs_txt) for x, w in added)
        return tuple(torch.cat(pair, dim=1) for pair in ((q_txt, q_img), (k_txt, k_img), (v_txt, v_img)))

    def forward(f: Op) -> Callable[[], Outputs]:
        return lambda: f(*projections, *norms, *tables)

    def both(f: Op) -> Callable[[], Outputs]:
        return lambda: torch.autograd.grad(f(*projections, *norms, *tables), projections, gradients)

    def gate() -> None:
        exact_inputs = [x.detach().double().requires_grad_() for x in projections]
        exact = qk_norm_rope_ref(*exact_inputs, *(norm.double() for norm in norms), *tables)
        exact += torch.autograd.grad(exact, exact_inputs, [gradient.double() for gradient in gradients])
        ours, same_dtype = ((*forward(f)(), *both(f)()) for f in (qk_norm_rope, stock))
        for place, three in enumerate(zip(ours, same_dtype, exact, strict=True)):
            check_accuracy(f"qk_norm_rope, result {place}", *three)

    compiled = torch.compile(qk_norm_rope_ref, dynamic=False)
    ways: dict[str, Op] = {"ours": qk_norm_rope, "compiled": compiled, "eager": stock}
    what = f"qk_norm_rope {B}x({L_txt}+{L_img})x{H}x{D} {str(dtype).removeprefix('torch.')}"
    numel = B * (L_txt + L_img) * H * D
    table_bytes = 2 * tables[0].nbytes
    return [
        Case(
            f"{what} forward",
            gate,
            {way: forward(f) for way, f in ways.items()},
            FORWARD_TENSORS * numel * dtype.itemsize + table_bytes,
            FORWARD_FLOPS * 2 * numel,
        ),
        Case(
            f"{what} forward+backward",
            gate,
            {way: both(f) for way, f in ways.items()},
            (FORWARD_TENSORS + BACKWARD_TENSORS) * numel * dtype.itemsize + 2 * table_bytes,
            (FORWARD_FLOPS + BACKWARD_FLOPS) * 2 * numel,
        ),
    ]


def all_cases(device: str) -> list[Case]:
    shape = (1, 512, 8192, 24, 128) if device == "cuda" else (1, 16, 256, 3, 128)
    return make_cases(shape, torch.bfloat16, device)


if __name__ == "__main__":
    run("qk_norm_rope", __doc__, all_cases)

"""The modulated LayerNorm against torch, eager and compiled: `python -m bench.kernels.adaln [--json] [--rounds N]`.

Forward and backward of `adaln` and `gated_residual_adaln` at the width of Qwen-Image-Edit, with and without an index.
The result is checked against fp64 first; bytes count x, y, r, results and their gradients once. For shares, and for
what is timed without a GPU, see `bench.kernels.timing`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch._functorch.config
from torch import Tensor

from bench.kernels.timing import Case, check_accuracy, run
from clora.kernels.adaln import adaln, adaln_ref, gated_residual_adaln, gated_residual_adaln_ref

# Floating-point operations an element, counted in the equations: mean 1, variance 3, norm 1, modulation 3, gate 2.
FORWARD_FLOPS = {"adaln": 8, "gated_residual_adaln": 10}
# The statistics again 5, sums for scale and shift 3, g 2, its two means 3, dx 4; the gate's sum, dy and grad_r 4.
BACKWARD_FLOPS = {"adaln": 17, "gated_residual_adaln": 21}
# Tensors (B, L, D) that are read and written.
FORWARD_TENSORS = {"adaln": 2, "gated_residual_adaln": 4}
BACKWARD_TENSORS = {"adaln": 3, "gated_residual_adaln": 6}

Outputs = tuple[Tensor, ...]
Op = Callable[..., Outputs]


def plain(x: Tensor, scale: Tensor, shift: Tensor, index: Tensor | None) -> Outputs:
    return (adaln(x, scale, shift, index),)


def plain_ref(x: Tensor, scale: Tensor, shift: Tensor, index: Tensor | None) -> Outputs:
    return (adaln_ref(x, scale, shift, index),)


OPS: dict[str, tuple[Op, Op]] = {
    "adaln": (plain, plain_ref),
    "gated_residual_adaln": (gated_residual_adaln, gated_residual_adaln_ref),
}


def make_cases(name: str, shape: tuple[int, int, int], dtype: torch.dtype, indexed: bool, device: str) -> list[Case]:
    """Forward and backward of one op."""
    op, ref = OPS[name]
    B, L, D = shape
    tokens = [torch.randn(shape, device=device, dtype=dtype) for _ in range(1 if name == "adaln" else 2)]
    rows = [torch.randn(2 * B if indexed else B, D, device=device, dtype=dtype) for _ in range(1 + len(tokens))]
    inputs = [x.requires_grad_() for x in (*tokens, *rows)]
    # As in the model: the image to be made first, then the reference images.
    index = (torch.arange(L, device=device) >= L // 2).long().expand(B, L) if indexed else None
    gradients = [torch.randn(shape, device=device, dtype=dtype) for _ in tokens]

    def forward(f: Op) -> Callable[[], Outputs]:
        return lambda: f(*inputs, index)

    def backward(f: Op) -> Callable[[], Outputs]:
        outputs = f(*inputs, index)
        return lambda: torch.autograd.grad(outputs, inputs, gradients, retain_graph=True)

    def gate() -> None:
        exact_inputs = [x.detach().double().requires_grad_() for x in inputs]
        exact = ref(*exact_inputs, index)
        exact += torch.autograd.grad(exact, exact_inputs, [gradient.double() for gradient in gradients])
        ours, same_dtype = ((*f(*inputs, index), *backward(f)()) for f in (op, ref))
        for place, three in enumerate(zip(ours, same_dtype, exact, strict=True)):
            check_accuracy(f"{name}, result {place}", *three)

    ways: dict[str, Op] = {"ours": op, "eager": ref}
    if device == "cuda":
        ways["compiled"] = torch.compile(ref, dynamic=False)
    what = f"{name} {'index ' if indexed else ''}{B}x{L}x{D} {str(dtype).removeprefix('torch.')}"
    numel = B * L * D
    return [
        Case(
            f"{what} forward",
            gate,
            {way: forward(f) for way, f in ways.items()},
            FORWARD_TENSORS[name] * numel * dtype.itemsize,
            FORWARD_FLOPS[name] * numel,
        ),
        Case(
            f"{what} backward",
            gate,
            {way: backward(f) for way, f in ways.items()},
            BACKWARD_TENSORS[name] * numel * dtype.itemsize,
            BACKWARD_FLOPS[name] * numel,
        ),
    ]


def all_cases(device: str, size: str) -> list[Case]:
    torch._functorch.config.donated_buffer = False  # else a compiled backward runs only once a forward
    shape = (1, 8192, 3072) if size == "full" else (1, 256, 384)
    return [
        case
        for name in OPS
        for indexed in (False, True)
        for case in make_cases(name, shape, torch.bfloat16, indexed, device)
    ]


if __name__ == "__main__":
    run("adaln", __doc__, all_cases)

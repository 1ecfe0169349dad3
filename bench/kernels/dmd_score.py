"""The distribution-matching loss against torch, eager and compiled.

`python -m bench.kernels.dmd_score [--json] [--rounds N]`.

fp32 latents and bf16 velocities of one 1024x1024 image and of eight, guidance 4 with the norm of cond; forward, and
forward with backward. The result is checked against fp64 first; bytes count each tensor once. For shares, and for what
is timed without a GPU, see `bench.kernels.timing`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bench.kernels.timing import Case, check_accuracy, run
from clora.kernels.dmd_score import dmd_score, dmd_score_ref

# An element: guidance 3, two norms 4, rescaling 1, two x0 4, difference 1, distance 3, |.| 2, square 3.
FORWARD_FLOPS = 21
BACKWARD_FLOPS = 1
FORWARD_BYTES = 2 * 4 + 3 * 2  # x_sigma, x0_student in fp32; three velocities in bf16
BACKWARD_BYTES = 4  # the gradient

Loss = Callable[..., tuple[Tensor, dict[str, Tensor]]]


def make_cases(shape: tuple[int, int, int], device: str) -> list[Case]:
    """Forward, and forward with backward."""
    numel = shape[0] * shape[1] * shape[2]
    x, student = torch.randn(2, *shape, device=device)
    velocities = torch.randn(3, *shape, device=device, dtype=torch.bfloat16).unbind()
    sigma = torch.rand(shape[0], device=device)
    student.requires_grad_()

    def forward(f: Loss) -> Callable[[], object]:
        return lambda: f(x, sigma, student, *velocities, 4.0, "norm")

    def both(f: Loss) -> Callable[[], object]:
        return lambda: torch.autograd.grad(f(x, sigma, student, *velocities, 4.0, "norm")[0], student)

    def results(f: Loss, tensors: list[Tensor]) -> list[Tensor]:
        loss, figures = f(*tensors, 4.0, "norm")
        return [loss.detach(), *figures.values(), torch.autograd.grad(loss, tensors[2])[0]]

    def gate() -> None:
        inputs = [x, sigma, student, *velocities]
        exact_inputs = [tensor.detach().double() for tensor in inputs]
        exact_inputs[2].requires_grad_()
        three = (results(dmd_score, inputs), results(dmd_score_ref, inputs), results(dmd_score_ref, exact_inputs))
        for name, *values in zip(("loss", "grad_abs", "normaliser", "dx0_student"), *three, strict=True):
            check_accuracy(name, *values, floor=4.0)

    compiled = torch.compile(dmd_score_ref, dynamic=False)
    ways: dict[str, Loss] = {"ours": dmd_score, "compiled": compiled, "eager": dmd_score_ref}
    what = "x".join(map(str, shape))
    total_bytes, total_flops = FORWARD_BYTES + BACKWARD_BYTES, FORWARD_FLOPS + BACKWARD_FLOPS
    return [
        Case(
            f"{what} forward",
            gate,
            {way: forward(f) for way, f in ways.items()},
            FORWARD_BYTES * numel,
            FORWARD_FLOPS * numel,
        ),
        Case(
            f"{what} with backward",
            gate,
            {way: both(f) for way, f in ways.items()},
            total_bytes * numel,
            total_flops * numel,
        ),
    ]


def all_cases(device: str, size: str) -> list[Case]:
    shapes = [(1, 4096, 64), (8, 4096, 64)] if size == "full" else [(1, 256, 64)]
    return [case for shape in shapes for case in make_cases(shape, device)]


if __name__ == "__main__":
    run("dmd_score", __doc__, all_cases)

"""One step of the few-step sampler against torch, eager and compiled.

`python -m bench.kernels.renoise [--json] [--rounds N]`.

fp32 latents and bf16 velocities, as the sampler has them, of one 1024x1024 image and of eight. The result is checked
against fp64 first; bytes count each tensor once. For shares, and for what is timed without a GPU, see
`bench.kernels.timing`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bench.kernels.timing import Case, check_accuracy, run
from clora.kernels.renoise import renoise, renoise_ref

FLOPS = 5  # an element: sigma v, the difference, two products, their sum

Step = Callable[[], tuple[Tensor, Tensor]]


def make_case(shape: tuple[int, int, int], device: str) -> Case:
    """The forward step; its backward is as simple, and not used in sampling."""
    batch, numel = shape[0], shape[0] * shape[1] * shape[2]
    x, eps = torch.randn(2, *shape, device=device)
    velocity = torch.randn(shape, device=device, dtype=torch.bfloat16)
    sigma, sigma_next = torch.rand(2, batch, device=device)
    inputs = (x, velocity, sigma, sigma_next, eps)

    def step(f: Callable[..., tuple[Tensor, Tensor]]) -> Step:
        return lambda: f(*inputs)

    def gate() -> None:
        exact = renoise_ref(*(t.double() for t in inputs))
        for name, *three in zip(("x0", "x_next"), renoise(*inputs), renoise_ref(*inputs), exact, strict=True):
            check_accuracy(name, *three)

    compiled = torch.compile(renoise_ref, dynamic=False)
    ways: dict[str, Step] = {"ours": step(renoise), "compiled": step(compiled), "eager": step(renoise_ref)}
    return Case("x".join(map(str, shape)), gate, ways, numel * (4 + 2 + 4 + 8), numel * FLOPS)


def all_cases(device: str, size: str) -> list[Case]:
    shapes = [(1, 4096, 64), (8, 4096, 64)] if size == "full" else [(1, 256, 64)]
    return [make_case(shape, device) for shape in shapes]


if __name__ == "__main__":
    run("renoise", __doc__, all_cases)

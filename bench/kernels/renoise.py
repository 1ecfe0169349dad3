"""One step of the few-step sampler against torch, eager and compiled.

`python -m bench.kernels.renoise [--json] [--rounds N]`.

fp32 latents and bf16 velocities, as the sampler has them, of one 1024x1024 image and of eight; with noise given, and
drawn. The reference of the drawn noise is `torch.randn`, which draws other numbers. The result is checked against
fp64 first; bytes count each tensor once. For shares, and for what is timed without a GPU, see `bench.kernels.timing`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bench.kernels.timing import Case, check_accuracy, run
from clora.kernels.renoise import noise_ref, renoise, renoise_ref

FLOPS = 5  # an element: sigma v, the difference, two products, their sum
DRAWN_FLOPS = 8  # two uniforms 2, bound, logarithm, product, root, cosine of a product, product; no integer arithmetic

Step = Callable[[], tuple[Tensor, Tensor]]


def make_case(shape: tuple[int, int, int], drawn: bool, device: str) -> Case:
    """The forward step; its backward is as simple, and not used in sampling."""
    batch, numel = shape[0], shape[0] * shape[1] * shape[2]
    x, eps = torch.randn(2, *shape, device=device)
    velocity = torch.randn(shape, device=device, dtype=torch.bfloat16)
    sigma, sigma_next = torch.rand(2, batch, device=device)
    seeds = torch.arange(batch, device=device)

    def ours() -> tuple[Tensor, Tensor]:
        return renoise(x, velocity, sigma, sigma_next, None if drawn else eps, seeds if drawn else None, 3)

    def reference(x: Tensor, velocity: Tensor, sigma: Tensor, sigma_next: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
        return renoise_ref(x, velocity, sigma, sigma_next, torch.randn_like(x) if drawn else eps)

    def step(f: Callable[..., tuple[Tensor, Tensor]]) -> Step:
        return lambda: f(x, velocity, sigma, sigma_next, eps)

    def gate() -> None:
        noise = noise_ref(seeds, 3, shape[1:]) if drawn else eps
        same_dtype = renoise_ref(x, velocity, sigma, sigma_next, noise)
        exact = renoise_ref(*(t.double() for t in (x, velocity, sigma, sigma_next, noise)))
        for name, *three in zip(("x0", "x_next"), ours(), same_dtype, exact, strict=True):
            # The logarithm and cosine of the drawn noise differ by a few units between libraries.
            check_accuracy(name, *three, floor=8.0 if drawn else 1.0)

    compiled = torch.compile(reference, dynamic=False)
    ways: dict[str, Step] = {"ours": ours, "compiled": step(compiled), "eager": step(reference)}
    what = f"{'x'.join(map(str, shape))}, noise {'drawn' if drawn else 'given'}"
    read = 4 + 2 + (0 if drawn else 4)
    return Case(what, gate, ways, numel * (read + 8), numel * (FLOPS + (DRAWN_FLOPS if drawn else 0)))


def all_cases(device: str) -> list[Case]:
    shapes = [(1, 4096, 64), (8, 4096, 64)] if device == "cuda" else [(1, 256, 64)]
    return [make_case(shape, drawn, device) for shape in shapes for drawn in (False, True)]


if __name__ == "__main__":
    run("renoise", __doc__, all_cases)

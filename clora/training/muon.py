"""Muon: steps along the momentum, each matrix of which is made nearly orthogonal first.

After K. Jordan and others (kellerjordan.github.io/posts/muon), with the constants of `torch.optim.Muon`, which needs
whole matrices where ours lie in shards. A direction that few samples ask for moves as far in a step as one that all do.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

MOMENTUM = 0.95
_TOGETHER = 1 << 24  # numbers worked on at once: few launches, little memory
_ROUNDS = 5
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of a quintic that takes singular values from (0, 1] to about 1


def orthogonalised(matrices: Tensor) -> Tensor:
    """Matrices (..., M, N) with the same singular vectors, in fp32; singular values of more than about a hundredth of
    the norm come to lie between 0.6 and 1.3, smaller ones below. Zeros stay zeros."""
    tall = matrices.shape[-2] > matrices.shape[-1]
    x: Tensor = (matrices.mT if tall else matrices).float()
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp_min(1e-7)
    a, b, c = _COEFFICIENTS
    for _ in range(_ROUNDS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


def muon_steps(directions: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """What a learning rate of 1 takes from each parameter (S, M, N), S independent matrices: the orthogonalised
    direction, times sqrt(M / N) where that is above 1. Those of one shape are worked on together, in any order."""
    by_shape: dict[torch.Size, list[str]] = {}
    for name, direction in directions.items():
        by_shape.setdefault(direction.shape, []).append(name)
    for (*_, rows, columns), names in by_shape.items():
        scale = max(1.0, rows / columns) ** 0.5
        count = max(1, _TOGETHER // directions[names[0]].numel())
        for first in range(0, len(names), count):
            some = names[first : first + count]
            steps = orthogonalised(torch.stack([directions[name] for name in some])) * scale
            yield from zip(some, steps, strict=True)

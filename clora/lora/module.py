"""One linear's update B A, and joining two of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class LoraModule:
    """The update of one linear layer, `(alpha / rank) B A`: A (r, K) and B (N, r) in any floating dtype."""

    A: Tensor
    B: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def delta(self) -> Tensor:
        """The update of the weight in fp64, (N, K)."""
        return self.B.double() @ self.A.double() * self.scale


def join_modules(first: Mapping[str, LoraModule], second: Mapping[str, LoraModule]) -> dict[str, LoraModule]:
    """One LoRA with the updates of both, exactly: ranks add up, and scales go into B (alpha = rank)."""
    joined = {}
    for name in {**first, **second}:
        parts = [lora[name] for lora in (first, second) if name in lora]
        A = torch.cat([part.A for part in parts])
        B = torch.cat([part.B * part.scale for part in parts], dim=1)
        joined[name] = LoraModule(A, B, float(len(A)))
    return joined

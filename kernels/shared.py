"""What several ops ask of their tensors and arguments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)  # that the kernels take


def rows(x: Tensor) -> Tensor:
    """x, copied only if its last dimension is not dense."""
    return x if x.stride(-1) == 1 else x.contiguous()


def at_least_fp32(x: Tensor) -> Tensor:
    """x in fp32, or as it is in fp64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def three(items: Sequence[Any]) -> tuple[Any, Any, Any]:
    """1 or 3 arguments in the places of three, of which a kernel of one part takes the first alone."""
    return (items[0], None, None) if len(items) == 1 else (items[0], items[1], items[2])

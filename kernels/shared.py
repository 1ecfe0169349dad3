"""What several ops ask of their tensors."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)  # that the kernels take


def rows(x: Tensor) -> Tensor:
    """x, copied only if its last dimension is not dense."""
    return x if x.stride(-1) == 1 else x.contiguous()


def at_least_fp32(x: Tensor) -> Tensor:
    """x in fp32, or as it is in fp64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))

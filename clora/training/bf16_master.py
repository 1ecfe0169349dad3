"""fp32 numbers in sixteen bits: as bfloat16 and what is left of them, or rounded without bias."""

from __future__ import annotations

import torch
from torch import Tensor


def split_bf16_master(value: Tensor) -> tuple[Tensor, Tensor]:
    """An fp32 tensor as bfloat16 (to nearest, ties away from zero), and the int16 remainder from which
    `merge_bf16_master` restores it."""
    bits = value.contiguous().view(torch.int32)
    low = bits.to(torch.int16)  # the lower half as a signed number: what is above the nearest bfloat16, or below
    high = (bits - low).bitwise_right_shift_(16).to(torch.int16)
    return high.view(torch.bfloat16), low


def merge_bf16_master(high: Tensor, low: Tensor) -> Tensor:
    """The inverse of `split_bf16_master`, bit for bit."""
    bits = high.view(torch.int16).to(torch.int32).bitwise_left_shift_(16)
    return bits.add_(low).view(torch.float32)


def stochastic_round(value: Tensor, salt: int) -> Tensor:
    """An fp32 tensor as bfloat16, up or down with odds by the distance, so that changes too small for bfloat16 (of
    the second moment a thousandth of itself an update) are made on average.

    The odds are drawn by a hash of each number and `salt`, not by a generator: every number of processes draws the
    same, and so does a run that was resumed.
    """
    bits = value.view(torch.int32)
    noise = bits.bitwise_xor(salt * 0x9E3779B1 & 0x7FFFFFFF).mul_(0x2C1B3C6D)
    noise.bitwise_xor_(noise >> 15).mul_(0x297A2D39).bitwise_right_shift_(16).bitwise_and_(0xFFFF)
    return noise.add_(bits).bitwise_right_shift_(16).to(torch.int16).view(torch.bfloat16)

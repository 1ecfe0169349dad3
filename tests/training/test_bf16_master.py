"""Numbers in sixteen bits: exact together, right on average alone."""

from __future__ import annotations

import torch

from clora.training.bf16_master import merge_bf16_master, split_bf16_master, stochastic_round


def test_split_and_join_are_exact() -> None:
    """Every upper half with the lower halves around its ties, and numbers of all sizes."""
    high = torch.arange(-(2**15), 2**15, dtype=torch.int32)[:, None] << 16
    low = torch.tensor([0, 1, 2**15 - 1, 2**15, 2**15 + 1, 2**16 - 1], dtype=torch.int32)
    values = (high | low).view(torch.float32)
    # A number rounded up beyond the largest bfloat16 becomes infinite, and comes back all the same.
    values = torch.cat([values[values.isfinite()], torch.randn(10_000) * 10 ** torch.linspace(-37, 37, 10_000)])
    upper, lower = split_bf16_master(values)
    assert upper.dtype == torch.bfloat16 and lower.dtype == torch.int16
    assert torch.equal(merge_bf16_master(upper, lower).view(torch.int32), values.view(torch.int32))
    tie = (values.view(torch.int32) & 0xFFFF) == 2**15
    assert torch.equal(upper[~tie], values[~tie].bfloat16())
    finite = tie & upper.isfinite()
    assert torch.equal((upper.float() - values).abs()[finite], (values.bfloat16().float() - values).abs()[finite])


def test_round_either_way_is_right_on_average() -> None:
    """Over many updates, for numbers of all sizes between two neighbours; numbers of bfloat16 stay as they are."""
    torch.manual_seed(0)
    values = torch.rand(500) * 10 ** torch.linspace(-30, 3, 500)
    below = (values.view(torch.int32) & ~0xFFFF).view(torch.float32)
    step = (below.view(torch.int32) + 0x10000).view(torch.float32) - below
    rounds = 2000
    ups = torch.zeros(500)
    for salt in range(rounds):
        rounded = stochastic_round(values, salt).float()
        up = (rounded - below) / step
        assert ((up == 0) | (up == 1)).all()
        ups += up
    odds = (values - below) / step
    spread = (odds * (1 - odds) / rounds).sqrt() + 1e-3
    assert ((ups / rounds - odds).abs() < 5 * spread).all()
    assert ((ups / rounds - odds) / spread).square().mean() < 2
    assert torch.equal(stochastic_round(values.bfloat16().float(), 3), values.bfloat16())

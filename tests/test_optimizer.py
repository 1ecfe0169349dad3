"""Flat groups against torch's own optimizer; sharded ones are in tests/test_distributed.py."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from clora.optimizer import Group, NonFiniteError, apply_gradients, check_finite


def test_apply_gradients_equals_torch_bit_for_bit() -> None:
    """Odd sizes, accumulated gradients, and a parameter that has none at first: torch leaves that one alone."""
    torch.manual_seed(0)
    ours = {
        "a": nn.Parameter(torch.randn(7, 13)),
        "late": nn.Parameter(torch.randn(33)),
        "b": nn.Parameter(torch.ones(1)),
    }
    theirs = copy.deepcopy(ours)
    options = {"betas": (0.8, 0.95), "eps": 1e-7, "weight_decay": 0.1}
    group = Group(ours, 0.01, betas=(0.8, 0.95), weight_decay=0.1, epsilon=1e-7, max_grad_norm=0.5)
    stock = torch.optim.AdamW(list(theirs.values()), lr=0.0, **options)  # type: ignore[arg-type]
    for step in range(6):
        for part in range(2):
            torch.manual_seed(10 * step + part)
            for parameters in (ours, theirs):
                torch.manual_seed(10 * step + part)
                used = ["a", "b"] + ["late"] * (step >= 3)
                sum((parameters[n] * torch.randn(parameters[n].shape)).sin().sum() for n in used).backward()
        norm = torch.nn.utils.clip_grad_norm_(list(theirs.values()), 0.5)
        for settings in stock.param_groups:
            settings["lr"] = 0.01 * (step + 1)
        stock.step()
        stock.zero_grad()
        assert apply_gradients(group, step + 1, "here") == float(norm)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert group.steps == {"a": 6, "late": 3, "b": 6}


def test_group_restore_takes_over_everything() -> None:
    def make() -> Group:
        return Group({"a": nn.Parameter(torch.zeros(3)), "b": nn.Parameter(torch.zeros(70))}, 0.1, ema_decay=0.9)

    first, second = make(), make()

    def update(group: Group) -> None:
        loss = (group.parameters["a"] - 1).square().sum() + (group.parameters["b"].sin() - 0.5).square().sum()
        loss.backward()
        apply_gradients(group, 1.0, "here")

    for _ in range(3):
        update(first)
    second.restore(lambda kind, start, stop: first.state[kind][start:stop].clone(), first.steps, first.updates)
    for group in (first, second):
        update(group)
    assert all(torch.equal(first.state[kind], second.state[kind]) for kind in first.state)
    assert set(first.state) == {"param", "exp_avg", "exp_avg_sq", "ema"} and second.updates == 4


def test_check_finite_names_the_place() -> None:
    assert check_finite(torch.tensor(1.0), "here") == 1.0
    with pytest.raises(NonFiniteError, match="loss is nan at here; nothing was updated"):
        check_finite(torch.tensor(torch.nan), "here")

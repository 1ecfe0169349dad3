"""The laws of the noise levels that are drawn."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from clora.config import ObjectiveConfig, ScheduleConfig
from clora.method.flow import few_step_sigmas, shift_sigma
from clora.method.noise import (
    Draws,
    draw_dmd_sigma,
    draw_schedule,
    draw_ta_fm_sigma,
    draw_ts_critic_sigma,
    draw_ts_gen_sigma,
    imitated_counts,
    matched_steps,
    normal,
    split_rows,
    uniform,
)
from tests.support.mixture_world import config

N = 20_000


def draws(seed: int = 0, count: int = N) -> Draws:
    return Draws.alone(torch.Generator().manual_seed(seed), count)


def quantiles(sigma: Tensor) -> Tensor:
    return sigma.double().quantile(torch.tensor([0.0, 0.1, 0.5, 0.9, 1.0], dtype=torch.float64))


def shifted_uniform(low: float, high: float, shift: float) -> Tensor:
    u = torch.tensor([0.0, 0.1, 0.5, 0.9, 1.0], dtype=torch.float64)
    return shift_sigma(low + (high - low) * u, shift)


@pytest.mark.parametrize(
    ("preset", "law", "low", "high", "shift"),
    [
        ("paper", draw_dmd_sigma, 0.02, 0.98, 3.0),
        ("authors", draw_dmd_sigma, 0.0, 1.0, 3.0),
        ("paper", draw_ts_critic_sigma, 0.5, 0.98, 1.0),
        ("authors", draw_ts_critic_sigma, 0.5, 1.0, 3.0),
    ],
)
def test_draws_of_the_critics_sigma_follow_the_preset(
    preset: str, law: Any, low: float, high: float, shift: float
) -> None:
    sigma = law(config(preset).objective, draws())
    torch.testing.assert_close(quantiles(sigma), shifted_uniform(low, high, shift), rtol=0, atol=0.015)
    assert sigma.dtype == torch.float32
    if law is draw_ts_critic_sigma:
        assert sigma.min() >= (0.75 if preset == "authors" else 0.5)


def test_draw_ts_gen_sigma_stays_below_tau_max() -> None:
    sigma = draw_ts_gen_sigma(config("paper"), draws())
    torch.testing.assert_close(quantiles(sigma), shifted_uniform(0.0, 0.75, 1.0), rtol=0, atol=0.01)
    assert sigma.max() < 0.75


@pytest.mark.parametrize(
    ("tau_max", "steps"),
    [
        (0.75, [0.3, 0.5, 0.6429]),  # the paper's bound is strict: the step at 0.75 is out
        (0.84, [0.3, 0.5, 0.6429, 0.75, 0.8333]),  # the authors' last five
        (1.0, [0.3, 0.5, 0.6429, 0.75, 0.8333, 0.9, 0.9545]),  # never pure noise
    ],
)
def test_draw_ts_gen_sigma_of_the_schedule(tau_max: float, steps: list[float]) -> None:
    sigma = draw_ts_gen_sigma(config(ts_sigma="schedule", tau_max=tau_max), draws())
    values, number = sigma.unique(return_counts=True)
    torch.testing.assert_close(values, torch.tensor(steps), rtol=0, atol=1e-4)
    torch.testing.assert_close(number / N, torch.full((len(steps),), 1 / len(steps)), rtol=0, atol=0.02)


def several_counts(*others: int) -> Any:
    objective = ObjectiveConfig(ts_sigma="schedule", tau_max=1.0)
    return SimpleNamespace(objective=objective, schedule=ScheduleConfig(num_steps=8, step_counts=others or (4, 2)))


@pytest.mark.parametrize(("others", "shares"), [((4, 2), {8: 1, 4: 1, 2: 1}), ((8, 4, 2), {8: 2, 4: 1, 2: 1})])
def test_draw_schedule_takes_every_step_count_as_often_as_it_is_named(
    others: tuple[int, ...], shares: dict[int, int]
) -> None:
    found = [draw_schedule(several_counts(*others), draws(seed, 1)) for seed in range(900)]
    assert all(torch.equal(sigmas, few_step_sigmas(len(sigmas))) for sigmas in found)
    times, whole = Counter(map(len, found)), sum(shares.values())
    assert set(times) == set(shares)
    assert all(abs(times[count] / 900 - share / whole) < 0.05 for count, share in shares.items())
    alone, untouched = draws(3), draws(3)
    assert len(draw_schedule(config(), alone)) == 8  # a single count draws nothing
    assert torch.equal(torch.rand(1, generator=alone.generator), torch.rand(1, generator=untouched.generator))


def test_steps_below_a_bound_are_imitations_alone() -> None:
    """Of eight steps .3 and .5, of four .5, of two none; what is at the bound is distribution matching's."""
    bounded = several_counts()
    bounded.objective = bounded.objective.model_copy(update={"imitation_below": float(few_step_sigmas(8)[5])})
    assert [matched_steps(bounded, few_step_sigmas(n)) for n in (8, 4, 2)] == [6, 3, 2]
    assert imitated_counts(bounded) == [8, 4] and imitated_counts(several_counts()) == [8, 4, 2]
    assert {len(draw_schedule(bounded, draws(seed, 1), imitated=True)) for seed in range(40)} == {8, 4}
    assert {len(draw_schedule(bounded, draws(seed, 1))) for seed in range(40)} == {8, 4, 2}
    starts = [draw_ts_gen_sigma(bounded, draws(seed, 200)) for seed in range(30)]
    steps = {round(x, 4) for sigma in starts for x in sigma.tolist()}
    assert steps == {0.6429, 0.75, 0.8333, 0.9, 0.9545}
    anywhere = bounded.objective.model_copy(update={"ts_sigma": "continuous", "imitation_below": 0.4, "tau_max": 0.75})
    sigma = draw_ts_gen_sigma(SimpleNamespace(objective=anywhere, schedule=bounded.schedule), draws())
    torch.testing.assert_close(quantiles(sigma), shifted_uniform(0.4, 0.75, 1.0), rtol=0, atol=0.01)


def test_draw_ts_gen_sigma_is_of_one_schedule_for_the_whole_batch() -> None:
    allowed = {n: {round(x, 4) for x in few_step_sigmas(n).tolist() if x < 1} for n in (8, 4, 2)}
    seen = set()
    for seed in range(30):
        values = {round(x, 4) for x in draw_ts_gen_sigma(several_counts(), draws(seed, 200)).tolist()}
        seen |= {n for n, steps in allowed.items() if steps == values}
        assert values in allowed.values()
    assert seen == {8, 4, 2}


def test_draw_ta_fm_sigma_laws() -> None:
    once = {law: draw_ta_fm_sigma(config(ta_fm_sigma=law), draws()) for law in ("uniform", "shifted")}
    torch.testing.assert_close(quantiles(once["uniform"]), shifted_uniform(0, 1, 1.0), rtol=0, atol=0.015)
    torch.testing.assert_close(quantiles(once["shifted"]), shifted_uniform(0, 1, 3.0), rtol=0, atol=0.015)
    # Authors: above the DMD sigma of the same sample, then shifted a second time.
    cfg = config("authors")
    sigma_dmd = draw_dmd_sigma(cfg.objective, draws(1))
    sigma = draw_ta_fm_sigma(cfg, draws(2), sigma_dmd)
    assert (sigma >= shift_sigma(sigma_dmd, 3.0) - 1e-6).all()
    above = (sigma / (3 - 2 * sigma) - sigma_dmd) / (1 - sigma_dmd)  # the shift undone
    torch.testing.assert_close(quantiles(above), shifted_uniform(0, 1, 1.0), rtol=0, atol=0.015)
    # It all but leaves out the low sigmas that carry detail: this is why clora's preset shifts once.
    shares = {law: float((s < 0.5).float().mean()) for law, s in {**once, "above_dmd": sigma}.items()}
    assert shares["uniform"] > 0.45 and shares["shifted"] > 0.2 and shares["above_dmd"] < 0.02


def test_draw_ta_fm_sigma_above_dmd_repeats_the_floor_for_a_larger_anchor_batch() -> None:
    cfg = config("authors")
    sigma = draw_ta_fm_sigma(cfg, draws(), torch.tensor([0.1, 0.9, 0.5]))
    floors = [float(sigma[i::3].min()) for i in range(3)]
    want = shift_sigma(torch.tensor([0.1, 0.9, 0.5]), 3.0)
    torch.testing.assert_close(torch.tensor(floors), want, rtol=0, atol=1e-3)


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_draws_of_the_processes_are_rows_of_the_whole(world: int) -> None:
    """Five samples and eight anchors; more processes than samples repeat the first."""
    whole, whole_anchors = draws(count=5), draws(count=8)
    noise, anchor_noise = normal((3, 2), whole), normal((3, 2), whole_anchors)
    levels = uniform(0.25, 0.75, whole)
    for rank in range(world):
        rows, anchor_rows = split_rows(5, rank, world), split_rows(8, rank, world)

        def own() -> Draws:
            return Draws(torch.Generator().manual_seed(0), rows, anchor_rows)  # noqa: B023

        drawn = own()
        assert torch.equal(normal((3, 2), drawn), noise[rows.start : rows.stop])
        assert torch.equal(uniform(0.25, 0.75, drawn), levels[rows.start : rows.stop])
        assert torch.equal(normal((3, 2), own().anchors()), anchor_noise[anchor_rows.start : anchor_rows.stop])
        assert torch.equal(normal((3, 2), own().whole()), noise)
    assert sum(split_rows(5, rank, world).share for rank in range(world)) == pytest.approx(1)

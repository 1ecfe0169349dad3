"""flow: closed forms, round trips, and agreement with diffusers' scheduler. B, T, C as in clora/method/flow.py."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from clora.method import flow

EIGHT = [1.0, 0.9545454545454546, 0.9, 0.8333333333333334, 0.75, 0.6428571428571429, 0.5, 0.3]


def data(seed: int = 0, shape: tuple[int, ...] = (3, 5, 8)) -> tuple[Tensor, Tensor]:
    """x0 and eps in fp64."""
    generator = torch.Generator().manual_seed(seed)
    x0 = torch.randn(shape, generator=generator, dtype=torch.float64) * 2 + 1
    return x0, torch.randn(shape, generator=generator, dtype=torch.float64)


SIGMA = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)


def test_add_noise_ends_are_data_and_noise() -> None:
    x0, eps = data()
    assert torch.equal(flow.add_noise(x0, eps, torch.zeros(3)), x0)
    assert torch.equal(flow.add_noise(x0, eps, torch.ones(3)), eps)


def test_add_noise_uses_each_samples_own_sigma() -> None:
    x0, eps = data()
    x = flow.add_noise(x0, eps, SIGMA)
    for b, s in enumerate(SIGMA.tolist()):
        torch.testing.assert_close(x[b], (1 - s) * x0[b] + s * eps[b], rtol=0, atol=1e-15)


def test_velocity_target_is_the_paths_derivative() -> None:
    x0, eps = data()
    h = 1e-6
    slope = (flow.add_noise(x0, eps, SIGMA + h) - flow.add_noise(x0, eps, SIGMA - h)) / (2 * h)
    torch.testing.assert_close(flow.velocity_target(x0, eps), slope, rtol=0, atol=1e-8)


def test_x0_from_velocity_inverts_add_noise() -> None:
    x0, eps = data()
    x, v = flow.add_noise(x0, eps, SIGMA), flow.velocity_target(x0, eps)
    torch.testing.assert_close(flow.x0_from_velocity(x, v, SIGMA), x0, rtol=0, atol=1e-14)


def test_velocity_from_x0_inverts_x0_from_velocity() -> None:
    x, v = data(1)
    x0 = flow.x0_from_velocity(x, v, SIGMA)
    torch.testing.assert_close(flow.velocity_from_x0(x, x0, SIGMA), v, rtol=0, atol=1e-13)


@pytest.mark.parametrize("shape", [(3,), (3, 7), (3, 5, 8), (3, 2, 4, 6)])
def test_sigma_broadcasts_over_any_trailing_shape(shape: tuple[int, ...]) -> None:
    x0, eps = data(shape=shape)
    x = flow.add_noise(x0, eps, SIGMA)
    torch.testing.assert_close(x[2], 0.1 * x0[2] + 0.9 * eps[2], rtol=0, atol=1e-15)
    torch.testing.assert_close(flow.add_noise(x0, eps, SIGMA[2]), 0.1 * x0 + 0.9 * eps, rtol=0, atol=1e-15)


@pytest.mark.parametrize("shape", [(2,), (1,), (3, 1)])
def test_sigma_of_another_batch_is_refused(shape: tuple[int, ...]) -> None:
    x0, eps = data()
    with pytest.raises(ValueError, match=r"give one per sample, shape \(3,\)"):
        flow.add_noise(x0, eps, torch.full(shape, 0.5))


def test_half_precision_latents_are_computed_in_fp32() -> None:
    x0, eps = (t.bfloat16() for t in data())
    x = flow.add_noise(x0, eps, SIGMA.float())
    assert x.dtype == torch.float32
    torch.testing.assert_close(x.double(), flow.add_noise(x0.double(), eps.double(), SIGMA), rtol=1e-6, atol=1e-6)


def test_few_step_sigmas_default_is_the_published_schedule() -> None:
    sigmas = flow.few_step_sigmas()
    assert sigmas.dtype == torch.float32
    assert torch.equal(sigmas, torch.tensor(EIGHT))
    assert [round(s, 4) for s in sigmas.tolist()] == [1, 0.9545, 0.9, 0.8333, 0.75, 0.6429, 0.5, 0.3]


@pytest.mark.parametrize(("num_steps", "shift"), [(8, 3.0), (4, 3.0), (40, 3.0), (30, 1.0), (7, 2.5)])
def test_few_step_sigmas_equal_the_stock_schedulers(num_steps: int, shift: float) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / num_steps, num_steps).tolist())
    ulps = 0 if (num_steps, shift) == (8, 3.0) else 2
    torch.testing.assert_close(
        flow.few_step_sigmas(num_steps, shift), scheduler.sigmas[:-1], rtol=ulps * 1.2e-7, atol=0
    )


@given(st.integers(1, 200), st.floats(0.1, 20))
def test_few_step_sigmas_fall_from_one(num_steps: int, shift: float) -> None:
    sigmas = flow.few_step_sigmas(num_steps, shift)
    assert sigmas.shape == (num_steps,) and sigmas[0] == 1
    assert bool((sigmas.diff() < 0).all()) and bool((sigmas > 0).all())


@pytest.mark.parametrize(("num_steps", "shift"), [(0, 3.0), (-1, 3.0), (8, 0.0), (8, -1.0), (8, float("nan"))])
def test_few_step_sigmas_refuses(num_steps: int, shift: float) -> None:
    with pytest.raises(ValueError, match="num_steps is|shift is"):
        flow.few_step_sigmas(num_steps, shift)


@given(st.floats(0, 1), st.floats(0.1, 20))
def test_shift_sigma_by_the_inverse_shift_returns(u: float, shift: float) -> None:
    level = torch.tensor(u, dtype=torch.float64)
    back = flow.shift_sigma(flow.shift_sigma(level, shift), 1 / shift)
    torch.testing.assert_close(back, level, rtol=1e-12, atol=1e-15)


def test_euler_step_along_the_true_path_stays_on_it() -> None:
    x0, eps = data()
    x = flow.euler_step(flow.add_noise(x0, eps, SIGMA), flow.velocity_target(x0, eps), SIGMA, SIGMA / 3)
    torch.testing.assert_close(x, flow.add_noise(x0, eps, SIGMA / 3), rtol=0, atol=1e-14)


def test_consistency_step_noises_the_predicted_data() -> None:
    x0, eps = data()
    _, fresh = data(1)
    x, v = flow.add_noise(x0, eps, SIGMA), flow.velocity_target(x0, eps)
    stepped = flow.consistency_step(x, v, SIGMA, SIGMA / 2, fresh)
    torch.testing.assert_close(stepped, flow.add_noise(x0, fresh, SIGMA / 2), rtol=0, atol=1e-14)
    zero = torch.zeros(3, dtype=torch.float64)
    torch.testing.assert_close(flow.consistency_step(x, v, SIGMA, zero, fresh), x0, rtol=0, atol=1e-14)
    torch.testing.assert_close(flow.consistency_step(x, v, SIGMA, zero, None), x0, rtol=0, atol=1e-14)


def test_consistency_step_without_noise_is_refused_above_zero() -> None:
    x, v = data()
    with pytest.raises(ValueError, match="only a step to 0"):
        flow.consistency_step(x, v, SIGMA, torch.tensor([0.0, 0.0, 0.1]), None)

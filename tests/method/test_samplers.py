"""sample: the compiled loop against the Python reference, and both against diffusers' scheduler."""

from __future__ import annotations

import math
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, QwenImageEditPlusPipeline
from torch import Tensor

from clora import _C
from clora.method.flow import add_noise, few_step_sigmas, velocity_from_x0
from clora.method.samplers import (
    draw_noise,
    few_step_sample,
    few_step_sample_ref,
    noise_generators,
    ode_sample,
    pipeline_order,
    sample_noise,
)

SHAPE = (12, 8)
SEEDS = [3, 1, 4, 15]


def velocity(x: Tensor, sigma: Tensor, cond: Any) -> Tensor:
    """A smooth, sigma- and sample-dependent velocity without symmetry that could hide a wrong index."""
    ramp = torch.linspace(-1, 1, x[0].numel(), dtype=x.dtype).view(x.shape[1:])
    return torch.tanh(1.3 * x + ramp) * (0.5 + sigma.to(x.dtype)[:, None, None]) + cond * x.roll(1, -1)


def stock(
    num_steps: int, shift: float, stochastic: bool, seeds: list[int], grid: tuple[int, int] | None = None
) -> Tensor:
    """The same sample by diffusers' scheduler, drawing from the same generators."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift, stochastic_sampling=stochastic)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / num_steps, num_steps).tolist())
    generators = noise_generators(seeds)
    x = draw_noise(generators, SHAPE)
    x = x if grid is None else pipeline_order(x, grid)
    for t in scheduler.timesteps:
        v = velocity(x, (t / 1000).expand(len(seeds)), 0.1)
        x = scheduler.step(v, t, x, generator=generators, return_dict=False)[0]
    return x


@pytest.mark.parametrize("num_steps", [1, 2, 8])
@pytest.mark.parametrize("shape", [(1, 4), (5, 3), (12, 8), (64, 64)])  # below and above torch's 16-value draw
@pytest.mark.parametrize("batch", [1, 4])
def test_few_step_sample_equals_reference_bit_for_bit(num_steps: int, shape: tuple[int, int], batch: int) -> None:
    args = (velocity, 0.1, shape, few_step_sigmas(num_steps), SEEDS[:batch])
    assert torch.equal(few_step_sample(*args), few_step_sample_ref(*args))


def test_few_step_sample_equals_reference_in_fp64_and_half_velocities() -> None:
    def half_velocity(x: Tensor, sigma: Tensor, cond: Any) -> Tensor:
        return velocity(x, sigma, cond).bfloat16()

    args = (half_velocity, 0.1, SHAPE, few_step_sigmas(8), SEEDS)
    assert torch.equal(few_step_sample(*args), few_step_sample_ref(*args))

    sigmas = few_step_sigmas(8)
    draws = [draw.double() for draw in sample_noise(SEEDS, 8, SHAPE)]
    x = draws[0]
    for k, s in enumerate(sigmas.double().tolist()):
        x0 = x - s * velocity(x, torch.full((4,), s), 0.1)
        s_next = sigmas.double().tolist()[k + 1] if k < 7 else 0.0
        x = (1 - s_next) * x0 + s_next * draws[k + 1] if k < 7 else x0
    generators = noise_generators(SEEDS)
    noise = draw_noise(generators, SHAPE).double()
    got = _C.sample(lambda x, s: velocity(x, s, 0.1), noise, generators, sigmas)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, x, rtol=0, atol=1e-6)  # sigma and 1 - sigma are rounded to fp32 in both
    torch.testing.assert_close(few_step_sample_ref(velocity, 0.1, SHAPE, sigmas, SEEDS).double(), x, rtol=0, atol=2e-5)


@pytest.mark.parametrize("grid", [None, (3, 4)])
def test_few_step_sample_equals_the_stock_scheduler(grid: tuple[int, int] | None) -> None:
    got = few_step_sample(velocity, 0.1, SHAPE, few_step_sigmas(8, 3.0), SEEDS, grid=grid)
    expected = stock(8, 3.0, stochastic=True, seeds=SEEDS, grid=grid)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)


def test_ode_sample_equals_the_stock_scheduler() -> None:
    got = ode_sample(velocity, 0.1, SHAPE, few_step_sigmas(40, 3.0), SEEDS)
    torch.testing.assert_close(got, stock(40, 3.0, stochastic=False, seeds=SEEDS), rtol=0, atol=5e-6)


def test_few_step_sample_of_an_exact_velocity_returns_the_data() -> None:
    x0 = torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(9))

    def exact(x: Tensor, sigma: Tensor, cond: Any) -> Tensor:
        return velocity_from_x0(x, x0, sigma)

    for sampler in (few_step_sample, few_step_sample_ref):
        torch.testing.assert_close(sampler(exact, None, SHAPE, few_step_sigmas(8), SEEDS), x0, rtol=0, atol=1e-5)


def test_ode_sample_follows_a_gaussian_to_its_closed_form() -> None:
    # Data N(mu, sd^2) per value: dx/dsigma is linear, and the ODE maps eps to mu + sd eps exactly.
    mu, sd = 0.7, 0.4

    def exact(x: Tensor, sigma: Tensor, cond: Any) -> Tensor:
        s = sigma[:, None, None].double()
        a, var = 1 - s, (1 - s) ** 2 * sd**2 + s**2
        x0 = mu + a * sd**2 / var * (x.double() - a * mu)
        return ((x.double() - x0) / s).float()

    eps = next(iter(sample_noise(SEEDS, 1, SHAPE)))
    errors = [
        (ode_sample(exact, None, SHAPE, few_step_sigmas(n, 1.0), SEEDS) - (mu + sd * eps)).abs().max().item()
        for n in (25, 100)
    ]
    assert errors[1] < 0.05 and 3 < errors[0] / errors[1] < 5  # Euler: first order


def test_few_step_sample_visits_the_noise_levels_it_was_given() -> None:
    sigmas = few_step_sigmas(8)
    seen: list[Tensor] = []
    states: list[Tensor] = []

    def recording(x: Tensor, sigma: Tensor, cond: Any) -> Tensor:
        seen.append(sigma.clone())
        states.append(x.clone())
        return x - 2.0  # the data is at 2 only when sigma is 1; elsewhere x0 = (1 - sigma) x + 2 sigma

    few_step_sample(recording, None, SHAPE, sigmas, SEEDS)
    draws = list(sample_noise(SEEDS, 8, SHAPE))
    assert torch.equal(torch.stack(seen), sigmas[:, None].expand(8, 4))
    assert torch.equal(states[0], draws[0])
    for k in range(7):
        x0 = (1 - sigmas[k]) * states[k] + 2 * sigmas[k]
        expected = add_noise(x0, draws[k + 1], sigmas[k + 1])
        torch.testing.assert_close(states[k + 1], expected, rtol=0, atol=1e-6)


def test_few_step_sample_does_not_depend_on_the_batch() -> None:
    together = few_step_sample(velocity, 0.1, SHAPE, few_step_sigmas(4), SEEDS)
    alone = [few_step_sample(velocity, 0.1, SHAPE, few_step_sigmas(4), [seed]) for seed in SEEDS]
    assert torch.equal(together, torch.cat(alone))
    again = few_step_sample(velocity, 0.1, SHAPE, few_step_sigmas(4), SEEDS[::-1])
    assert torch.equal(again, together.flip(0))


def test_sample_noise_draws_one_stream_per_seed() -> None:
    draws = torch.stack(list(sample_noise([7, 8], 3, SHAPE)))
    for b, seed in enumerate([7, 8]):
        generator = torch.Generator().manual_seed(seed)
        expected = torch.stack([torch.randn(SHAPE, generator=generator) for _ in range(3)])
        assert torch.equal(draws[:, b], expected)
    assert abs(draws.mean().item()) < 4 / math.sqrt(draws.numel())
    assert not torch.equal(draws[0], draws[1]) and not torch.equal(draws[:, 0], draws[:, 1])


def test_sample_noise_is_lazy() -> None:
    draws = sample_noise([0], 10**9, SHAPE)
    assert next(draws).shape == (1, *SHAPE)


def test_pipeline_order_is_the_stock_packing() -> None:
    h, w, channels = 3, 5, 64
    draw = draw_noise(noise_generators([0, 1]), (h * w, channels))
    latent = draw.reshape(2, 1, channels // 4, 2 * h, 2 * w)  # randn fills it in this order
    packed = QwenImageEditPlusPipeline._pack_latents(latent, 2, channels // 4, 2 * h, 2 * w)
    assert torch.equal(pipeline_order(draw, (h, w)), packed)


@pytest.mark.parametrize(("shape", "grid"), [((12, 8), (3, 5)), ((12, 6), (3, 4))])
def test_pipeline_order_refuses_another_grid(shape: tuple[int, int], grid: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="grid of 2x2 latent patches"):
        few_step_sample(velocity, 0.1, shape, [1.0], [0], grid=grid)


def test_on_step_sees_each_prediction_and_may_keep_it() -> None:
    records: list[list[tuple[int, float, Tensor]]] = []
    for sampler in (few_step_sample, few_step_sample_ref):
        kept: list[tuple[int, float, Tensor]] = []
        final = sampler(
            velocity,
            0.1,
            SHAPE,
            few_step_sigmas(8),
            SEEDS,
            on_step=lambda *step, kept=kept: kept.append(step),
        )
        assert torch.equal(kept[-1][2], final)
        records.append(kept)
    for (k, sigma, x0), (k_ref, sigma_ref, x0_ref) in zip(*records, strict=True):
        assert (k, sigma) == (k_ref, sigma_ref) and torch.equal(x0, x0_ref)
    assert [sigma for _, sigma, _ in records[0]] == few_step_sigmas(8).tolist()


class Cancelled(Exception):
    pass


@pytest.mark.parametrize("sampler", [few_step_sample, few_step_sample_ref])
def test_exceptions_end_the_loop_where_they_are_raised(sampler: Any) -> None:
    calls: list[int] = []

    def counting(x: Tensor, sigma: Tensor, cond: Any) -> Tensor:
        calls.append(1)
        if cond == "model" and len(calls) == 3:
            raise Cancelled
        return x

    def cancel(step: int, sigma: float, x0: Tensor) -> None:
        if step == 4:
            raise Cancelled

    with pytest.raises(Cancelled):
        sampler(counting, "model", SHAPE, few_step_sigmas(8), SEEDS)
    assert len(calls) == 3
    calls.clear()
    with pytest.raises(Cancelled):
        sampler(counting, None, SHAPE, few_step_sigmas(8), SEEDS, on_step=cancel)
    assert len(calls) == 5


@pytest.mark.parametrize("sampler", [few_step_sample, few_step_sample_ref])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_non_finite_velocity_names_step_and_sample(sampler: Any, bad: float, dtype: torch.dtype) -> None:
    calls: list[int] = []

    def broken(x: Tensor, sigma: Tensor, cond: Any) -> Tensor:
        calls.append(1)
        v = x.clone().to(dtype)
        if len(calls) == 3:
            v[2, -1, -1] = bad
        return v

    message = r"velocity is not finite at step 2 \(sigma 0\.900000\), sample 2"
    with pytest.raises(FloatingPointError, match=message):
        sampler(broken, None, SHAPE, few_step_sigmas(8), SEEDS)
    assert len(calls) == 3


def test_largest_finite_velocity_is_accepted() -> None:
    big = torch.finfo(torch.float32).max
    got = few_step_sample(lambda x, s, c: torch.full_like(x, -big), None, SHAPE, [0.5], [0])
    torch.testing.assert_close(got, torch.full_like(got, big / 2))


@pytest.mark.parametrize("sampler", [few_step_sample, few_step_sample_ref])
def test_wrong_velocity_shape_is_named(sampler: Any) -> None:
    with pytest.raises(ValueError, match=r"returned shape \[4, 12, 1\] for x of shape \[4, 12, 8\] at step 0"):
        sampler(lambda x, s, c: x[..., :1], None, SHAPE, few_step_sigmas(8), SEEDS)


def test_velocity_must_return_a_tensor() -> None:
    with pytest.raises(TypeError, match="velocity must return a torch.Tensor, got tuple"):
        few_step_sample(lambda x, s, c: (x,), None, SHAPE, [1.0], [0])


@pytest.mark.parametrize(
    ("sigmas", "message"),
    [
        ([], "at least one noise level"),
        ([[1.0, 0.5]], "at least one noise level"),
        ([1.0, 0.5, 0.5], r"must fall strictly, but sigmas\[2\] = 0.5 follows sigmas\[1\] = 0.5"),
        ([0.3, 0.5], r"sigmas\[1\] = 0.5 follows sigmas\[0\] = 0.3"),
        ([1.0, 0.0], r"sigmas\[1\] = 0 is outside \(0, 1\]; .* the final 0 is left out"),
        ([1000.0, 954.0], r"sigmas\[0\] = 1000 is outside"),
        ([1.0, math.nan], r"sigmas\[1\] = nan is outside"),
    ],
)
def test_bad_sigmas_are_named(sigmas: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        few_step_sample(velocity, 0.1, SHAPE, sigmas, SEEDS)


def test_compiled_loop_checks_its_noise_and_generators() -> None:
    generators = noise_generators([0, 1])
    noise, sigmas = draw_noise(generators, SHAPE), few_step_sigmas(2)
    for bad_noise, message in [
        (noise[0], r"must be \(batch, tokens, channels\)"),
        (noise[:, :0], "not empty"),
        (noise.half(), "must be float32 or float64"),
        (noise[:1], "1 samples, 2 generators"),
    ]:
        with pytest.raises(ValueError, match=message):
            _C.sample(lambda x, s: x, bad_noise, generators, sigmas)
    with pytest.raises(ValueError, match="sigmas must be floating point"):
        _C.sample(lambda x, s: x, noise, generators, torch.tensor([1]))
    with pytest.raises(ValueError, match="seeds is empty"):
        few_step_sample(velocity, 0.1, SHAPE, sigmas, [])
    with pytest.raises(ValueError, match="seeds is empty"):
        ode_sample(velocity, 0.1, SHAPE, few_step_sigmas(2), [])


def test_compiled_loop_leaves_its_inputs_alone() -> None:
    generators = noise_generators(SEEDS)
    noise, sigmas = draw_noise(generators, SHAPE), few_step_sigmas(4)
    constant = torch.full((4, *SHAPE), 0.25)
    before = noise.clone()
    _C.sample(lambda x, s: constant, noise, generators, sigmas)
    assert torch.equal(noise, before) and torch.equal(constant, torch.full_like(constant, 0.25))


@pytest.mark.parametrize("layout", ["strided", "itself"])
def test_velocity_may_return_any_view(layout: str) -> None:
    def view(x: Tensor, sigma: Tensor, cond: Any) -> Tensor:
        return x.transpose(1, 2).reshape(x.shape[0], 8, 12).transpose(1, 2) if layout == "strided" else x

    args = (view, None, SHAPE, few_step_sigmas(8), SEEDS)
    assert torch.equal(few_step_sample(*args), few_step_sample_ref(*args))


@pytest.mark.parametrize("sampler", [few_step_sample, few_step_sample_ref])
def test_sampling_records_no_gradient(sampler: Any) -> None:
    weight = torch.ones((), requires_grad=True)
    grad_modes: list[bool] = []

    def learned(x: Tensor, sigma: Tensor, cond: Any) -> Tensor:
        grad_modes.append(torch.is_grad_enabled())
        return x * weight

    assert not sampler(learned, None, SHAPE, few_step_sigmas(2), SEEDS).requires_grad
    assert grad_modes == [False, False] and torch.is_grad_enabled()


def test_compiled_loop_gives_up_the_gil() -> None:
    # With so long a switch interval another thread runs only where this one lets go of the GIL by itself, and
    # a velocity that calls nothing never does: what the ticker gains between two calls, the loop gave it.
    noise = torch.zeros(1, 16384, 64)  # a draw takes about ten milliseconds
    ticks, gained, done = [0], [], threading.Event()

    def tick() -> None:
        while not done.is_set():
            ticks[0] += 1
            time.sleep(0.0005)

    last = [0]

    def still(x: Tensor, sigma: Tensor) -> Tensor:
        gained.append(ticks[0] - last[0])
        last[0] = ticks[0]
        return noise

    ticker = threading.Thread(target=tick)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(100)
    try:
        ticker.start()
        _C.sample(still, noise, noise_generators([0]), few_step_sigmas(8))
    finally:
        sys.setswitchinterval(interval)
        done.set()
        ticker.join()
    assert len(gained) == 8 and sum(gained[1:]) > 0


def test_compiled_loop_runs_in_threads_and_inside_itself() -> None:
    def nested(x: Tensor, sigma: Tensor, cond: Any) -> Tensor:
        return few_step_sample(velocity, 0.1, SHAPE, [1.0], SEEDS)

    assert few_step_sample(nested, None, SHAPE, few_step_sigmas(2), SEEDS).isfinite().all()

    args = (velocity, 0.1, (256, 64), few_step_sigmas(8))
    alone = [few_step_sample(*args, [seed]) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda seed: few_step_sample(*args, [seed]), range(4)))
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


@pytest.mark.gpu
def test_few_step_sample_on_cuda_equals_reference() -> None:
    def on_device(x: Tensor, sigma: Tensor, cond: Any) -> Tensor:
        return torch.tanh(x) * sigma[:, None, None]

    args = (on_device, None, (64, 64), few_step_sigmas(8), SEEDS)
    got = few_step_sample(*args, device="cuda")
    assert got.device.type == "cuda" and torch.equal(got, few_step_sample_ref(*args, device="cuda"))
    torch.testing.assert_close(got.cpu(), few_step_sample(*args), rtol=0, atol=1e-4)

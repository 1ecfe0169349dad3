"""Backward and target simulation: the forwards they run, the states they visit, where grad flows."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from clora.method.flow import add_noise, consistency_step, few_step_sigmas, x0_from_velocity
from clora.method.simulate import backward_simulate, backward_simulate_together, rollout_state, target_simulate

SHAPE = (2, 3, 4)
SIGMAS = few_step_sigmas(8, 3.0)


class CountingNet(torch.nn.Module):
    """A small non-linear velocity that notes every call."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        rng = torch.Generator().manual_seed(0)
        weight = torch.randn(4, 4, generator=rng, dtype=torch.float64).to(dtype) / 2
        self.linear = torch.nn.Linear(4, 4, bias=False, dtype=dtype)
        self.linear.weight = torch.nn.Parameter(weight)
        self.calls: list[tuple[torch.Tensor, torch.Tensor, Any, bool]] = []

    def forward(self, x_sigma: torch.Tensor, sigma: torch.Tensor, cond: Any) -> torch.Tensor:
        self.calls.append((x_sigma.detach().clone(), sigma.clone(), cond, torch.is_grad_enabled()))
        return torch.tanh(self.linear(x_sigma)) * (1 + sigma.view(-1, 1, 1).to(x_sigma.dtype))


def _noises(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    rng = torch.Generator().manual_seed(1)
    return [torch.randn(SHAPE, generator=rng, dtype=torch.float64).to(dtype) for _ in range(9)]


def _weight_grad(net: CountingNet, x0: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(x0.square().sum(), net.linear.weight)[0]


@pytest.mark.parametrize("step", range(8))
def test_backward_simulate_runs_step_plus_one_forwards_and_grads_the_last(step: int) -> None:
    net, noises = CountingNet(), _noises()
    x0, sigma = backward_simulate(net, "cond", noises[8], step, SIGMAS, noises.__getitem__)
    assert len(net.calls) == step + 1
    assert [grad for *_, grad in net.calls] == [False] * step + [True]
    assert all(cond == "cond" for _, _, cond, _ in net.calls)
    seen = torch.stack([s for _, s, _, _ in net.calls])
    torch.testing.assert_close(seen, SIGMAS[: step + 1, None].expand(-1, 2))
    torch.testing.assert_close(sigma, SIGMAS[step].expand(2))
    assert x0.requires_grad and not sigma.requires_grad


def test_backward_simulate_together_equals_each_alone() -> None:
    """Three batches with schedules of their own leave at steps of their own, in the forwards of the longest."""
    steps, sizes, schedules = [2, 5, 0], [2, 1, 3], [few_step_sigmas(4), SIGMAS, few_step_sigmas(2)]
    rng = torch.Generator().manual_seed(3)
    firsts = [torch.randn(size, 3, 4, generator=rng) for size in sizes]
    noises = [torch.randn(8, size, 3, 4, generator=rng) for size in sizes]
    net = CountingNet()
    got = backward_simulate_together(net, ["a", "b", "c"], "".join, firsts, steps, schedules, lambda i, k: noises[i][k])
    assert [cond for _, _, cond, _ in net.calls] == ["abc", "ab", "ab", "b", "b", "b"]
    assert [len(x) for x, *_ in net.calls] == [6, 3, 3, 1, 1, 1] and not any(grad for *_, grad in net.calls)
    for i, x0 in enumerate(got):
        want, _ = backward_simulate(CountingNet(), None, firsts[i], steps[i], schedules[i], noises[i].__getitem__)
        torch.testing.assert_close(x0, want.detach())


@pytest.mark.parametrize("step", [0, 3, 7])
def test_rollout_state_without_noise_is_the_stock_euler_path(step: int) -> None:
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0)
    scheduler.set_timesteps(sigmas=SIGMAS.tolist())
    net, first = CountingNet(), _noises()[8]
    state = first
    for k, t in enumerate(scheduler.timesteps[:step]):
        with torch.no_grad():
            state = scheduler.step(net(state, SIGMAS[k].expand(2), None), t, state).prev_sample
    net.calls.clear()
    got = rollout_state(net, None, first, step, SIGMAS, None)
    assert len(net.calls) == step and not any(grad for *_, grad in net.calls)
    torch.testing.assert_close(got, state)


def test_backward_simulate_together_without_noise_equals_each_alone() -> None:
    rng = torch.Generator().manual_seed(3)
    firsts = [torch.randn(2, 3, 4, generator=rng) for _ in range(2)]
    got = backward_simulate_together(CountingNet(), ["a", "b"], "".join, firsts, [2, 5], [SIGMAS, SIGMAS], None)
    for x0, first, step in zip(got, firsts, (2, 5), strict=True):
        want, _ = backward_simulate(CountingNet(), None, first, step, SIGMAS, None)
        torch.testing.assert_close(x0, want.detach())


@pytest.mark.parametrize("step", [0, 3, 7])
def test_backward_simulate_equals_diffusers_stochastic_sampling(step: int) -> None:
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(stochastic_sampling=True, shift=1.0)
    scheduler.set_timesteps(sigmas=SIGMAS.tolist())
    net = CountingNet()
    torch.manual_seed(5)
    first = torch.randn(SHAPE)
    x0, _ = backward_simulate(net, None, first, step, SIGMAS, lambda _: torch.randn(SHAPE))
    torch.manual_seed(5)
    state = torch.randn(SHAPE)
    with torch.no_grad():
        for k in range(step):
            state = scheduler.step(net(state, SIGMAS[k].expand(2), None), scheduler.timesteps[k], state)[0]
        v = net(state, SIGMAS[step].expand(2), None)
    torch.testing.assert_close(x0.detach(), state - SIGMAS[step] * v, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variant", ["right", "grad through the rollout", "noise reused", "Euler steps"])
def test_backward_simulate_state_and_gradient_separate_wrong_code(variant: str) -> None:
    net, noises, step = CountingNet(torch.float64), _noises(torch.float64), 4
    sigmas = SIGMAS[:, None].expand(-1, 2)
    x = noises[8]
    for k in range(step):  # fp64 reference, written out
        s, s_next = sigmas[k].double().view(-1, 1, 1), sigmas[k + 1].double().view(-1, 1, 1)
        x0_k = x - s * net(x, sigmas[k], None).detach()
        x = (1 - s_next) * x0_k + s_next * noises[k]
    want_x0 = x - sigmas[step].double().view(-1, 1, 1) * net(x, sigmas[step], None)
    want_grad = _weight_grad(net, want_x0)
    if variant == "right":
        got, _ = backward_simulate(net, None, noises[8], step, SIGMAS, noises.__getitem__)
    else:
        state = noises[8]
        for k in range(step):
            v = net(state, sigmas[k], None)
            if variant == "Euler steps":
                state = state + (sigmas[k + 1] - sigmas[k]).double().view(-1, 1, 1) * v.detach()
            else:
                reused = variant == "noise reused"
                noise = noises[8] if reused else noises[k]
                state = consistency_step(state, v.detach() if reused else v, sigmas[k], sigmas[k + 1], noise)
        got = x0_from_velocity(state, net(state, sigmas[step], None), sigmas[step])
    same_x0 = torch.allclose(got, want_x0, rtol=1e-6, atol=1e-6)
    same_grad = torch.allclose(_weight_grad(net, got), want_grad, rtol=1e-5, atol=1e-5)
    assert same_grad == (variant == "right")
    assert same_x0 == (variant in ("right", "grad through the rollout"))


def test_backward_simulate_grads_under_autocast() -> None:
    # Autocast caches its casts of the weights; casts cached without grad in the rollout must not serve the
    # last forward, or the student learns nothing.
    net, noises = CountingNet(), _noises()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x0, _ = backward_simulate(net, None, noises[8], 3, SIGMAS, noises.__getitem__)
    assert _weight_grad(net, x0).abs().sum() > 0


def test_backward_simulate_under_no_grad_carries_none() -> None:
    net, noises = CountingNet(), _noises()
    with torch.no_grad():
        x0, _ = backward_simulate(net, None, noises[8], 2, SIGMAS, noises.__getitem__)
    assert not x0.requires_grad


@pytest.mark.parametrize("step", [-1, 8])
def test_backward_simulate_refuses_a_step_outside_the_schedule(step: int) -> None:
    with pytest.raises(ValueError, match="outside a schedule of 8 steps"):
        backward_simulate(CountingNet(), None, _noises()[8], step, SIGMAS, _noises().__getitem__)


def test_target_simulate_is_one_forward_at_the_noised_target() -> None:
    net, (y, eps, *_) = CountingNet(), _noises()
    sigma = torch.tensor([0.1, 0.7])
    y_hat = target_simulate(net, y, "cond", sigma, eps)
    assert len(net.calls) == 1
    x_sigma, seen_sigma, cond, grad = net.calls[0]
    assert cond == "cond" and grad and torch.equal(seen_sigma, sigma)
    torch.testing.assert_close(x_sigma, add_noise(y, eps, sigma))
    s = sigma.view(-1, 1, 1)
    x = (1 - s) * y + s * eps
    torch.testing.assert_close(y_hat, x - s * torch.tanh(x @ net.linear.weight.T) * (1 + s))
    assert _weight_grad(net, y_hat).abs().sum() > 0


def test_target_simulate_of_a_perfect_student_returns_the_target() -> None:
    y, eps, *_ = _noises(torch.float64)
    sigma = torch.tensor([0.3, 0.74])
    got = target_simulate(lambda x, s, _: (x - y) / s.double().view(-1, 1, 1), y, None, sigma, eps)
    torch.testing.assert_close(got, y, rtol=1e-6, atol=1e-6)

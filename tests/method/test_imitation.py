"""Imitation on Gaussian mixtures: the exact optimum of each loss, sampled in few steps; wrong variants fall behind."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from clora.method.flow import euler_step, few_step_sigmas
from clora.method.imitation import euler_rollout, same_step_loss, segment_mean_loss, step_interval
from tests.support.mixture_world import Mixture, make_effect_cond, teacher_velocity

NUM = 192  # particles
QUADRATURE = 12  # places on a step at which the teacher is asked


def ring(modes: int = 6, radius: float = 2.0, sd: float = 0.12) -> Mixture:
    """Six narrow outcomes on a ring, the same for all particles."""
    angle = torch.arange(modes) * 2 * math.pi / modes
    means = radius * torch.stack([angle.cos(), angle.sin()], -1)
    return Mixture(means.expand(NUM, modes, 2), torch.full((NUM, modes), 1 / modes), sd)


def off_modes(x0: Tensor, world: Mixture) -> float:
    """The share of samples farther than four widths from every outcome."""
    distance = (x0 - world.means).norm(dim=-1).min(1).values
    return float((distance > 4 * world.sd).float().mean())


def optimum(
    world: Mixture, x_s: Tensor, s: Tensor, s_next: Tensor, spread: Callable[[Tensor], Tensor] = lambda u: u
) -> Tensor:
    """The v at which the gradient of the loss, averaged over u, vanishes: found by descending that gradient."""
    every = Mixture(world.means.repeat(QUADRATURE, 1, 1), world.weights.repeat(QUADRATURE, 1), world.sd)
    u = spread((torch.arange(QUADRATURE) + 0.5) / QUADRATURE).repeat_interleave(NUM)
    states, begin, end = x_s.repeat(QUADRATURE, 1, 1), s.repeat(QUADRATURE), s_next.repeat(QUADRATURE)
    v = world.velocity(x_s, s).requires_grad_()
    for _ in range(40):
        loss, _ = segment_mean_loss(
            lambda x, sigma, v=v: v.repeat(QUADRATURE, 1, 1), every.velocity, states, begin, end, u
        )
        (grad,) = torch.autograd.grad(loss, v)
        v = (v.detach() - 0.3 * grad * v.numel()).requires_grad_()
    return v.detach()


def sample(world: Mixture, steps: int, velocity: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
    x = torch.randn(NUM, 1, 2, generator=torch.Generator().manual_seed(3))
    sigmas = few_step_sigmas(steps)
    for k in range(steps):
        s, s_next = step_interval(sigmas, torch.full((NUM,), k))
        x = euler_step(x, velocity(x, s, s_next), s, s_next)
    return x


@pytest.mark.parametrize(("steps", "instantaneous_least"), [(8, 0.1), (4, 0.5), (2, 0.9)])
def test_segment_mean_loss_optimum_samples_every_mode_in_few_steps(steps: int, instantaneous_least: float) -> None:
    world = ring()
    at_once = sample(world, steps, lambda x, s, s_next: world.velocity(x, s))
    assert off_modes(at_once, world) > instantaneous_least  # what flow matching converges to
    mean = sample(world, steps, lambda x, s, s_next: optimum(world, x, s, s_next))
    assert off_modes(mean, world) < 0.01
    chosen = (mean - world.means).norm(dim=-1).argmin(1)
    assert len(chosen.unique()) == 6  # and no outcome is lost


def test_segment_mean_loss_asked_elsewhere_than_along_the_step_misses_the_modes() -> None:
    world = ring()
    before = sample(world, 4, lambda x, s, s_next: optimum(world, x, s, (2 * s - s_next).clamp(max=1)))
    begin = sample(world, 4, lambda x, s, s_next: optimum(world, x, s, s_next, lambda u: 0 * u))
    end = sample(world, 4, lambda x, s, s_next: optimum(world, x, s, s_next, lambda u: 0 * u + 1))
    assert min(off_modes(x0, world) for x0 in (before, begin, end)) > 0.5


def test_segment_mean_loss_gradient_is_that_of_a_fixed_target() -> None:
    world, rng = ring(), torch.Generator().manual_seed(0)
    x_s, u = torch.randn(NUM, 1, 2, generator=rng), torch.rand(NUM, generator=rng)
    s, s_next = torch.full((NUM,), 0.75), torch.full((NUM,), 0.5)
    v = world.velocity(x_s, s).double().requires_grad_()
    loss, figures = segment_mean_loss(lambda x, sigma: v.float(), world.velocity, x_s, s, s_next, u)
    (grad,) = torch.autograd.grad(loss, v)
    t = s + u * (s_next - s)
    target = world.velocity(x_s + (t - s)[:, None, None] * v.detach().float(), t)
    torch.testing.assert_close(grad, (2 * (v.detach() - target) / v.numel()).double(), rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(figures["per_sample"], (v.detach().float() - target).square().flatten(1).mean(1))


@pytest.mark.parametrize("kind", ["segment", "same step"])
def test_imitation_losses_vanish_at_the_asked_effect_alone(kind: str) -> None:
    rng = torch.Generator().manual_seed(1)
    cond = make_effect_cond(NUM, rng)
    other = type(cond)(cond.source, cond.instruction, cond.effects[1:] + cond.effects[:1])
    teacher = teacher_velocity(0.0)
    x, s = torch.randn(NUM, 1, 2, generator=rng), torch.full((NUM,), 0.9)

    def loss(student_cond: object) -> float:
        student, routed = (lambda x, sigma, c=c: teacher(x, sigma, c) for c in (student_cond, cond))
        if kind == "same step":
            return float(same_step_loss(student, routed, x, s)[0])
        return float(segment_mean_loss(student, routed, x, s, s - 1e-3, torch.rand(NUM, generator=rng))[0])

    assert loss(cond) < 1e-4
    assert loss(other) > 1.0


def test_imitation_losses_send_no_gradient_to_the_teacher() -> None:
    weight = torch.ones((), requires_grad=True)
    x, s = torch.randn(4, 1, 2), torch.full((4,), 0.5)
    student = torch.ones((), requires_grad=True)
    for loss, _ in (
        segment_mean_loss(lambda x, s: student * x, lambda x, s: weight * x, x, s, 0.5 * s, torch.rand(4)),
        same_step_loss(lambda x, s: student * x, lambda x, s: weight * 2 * x, x, s),
    ):
        loss.backward()
    assert weight.grad is None and student.grad is not None


def test_euler_rollout_stops_before_the_step() -> None:
    world, sigmas = ring(), few_step_sigmas(4)
    asked: list[float] = []

    def velocity(x: Tensor, sigma: Tensor, cond: None) -> Tensor:
        asked.append(float(sigma[0]))
        return world.velocity(x, sigma)

    eps = torch.randn(NUM, 1, 2, generator=torch.Generator().manual_seed(0))
    assert torch.equal(euler_rollout(velocity, None, eps, 0, sigmas), eps) and asked == []
    x = euler_rollout(velocity, None, eps, 2, sigmas)
    assert asked == sigmas[:2].tolist()
    first = eps + (sigmas[1] - sigmas[0]) * world.velocity(eps, sigmas[:1].expand(NUM))
    expected = first + (sigmas[2] - sigmas[1]) * world.velocity(first, sigmas[1:2].expand(NUM))
    torch.testing.assert_close(x, expected)


def test_step_interval_ends_at_the_data() -> None:
    sigmas = few_step_sigmas(4)
    begin, end = step_interval(sigmas, torch.tensor([0, 3, 1]))
    assert begin.tolist() == [sigmas[0], sigmas[3], sigmas[1]] and end.tolist() == [sigmas[1], 0.0, sigmas[2]]

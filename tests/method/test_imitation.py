"""Imitation on Gaussian mixtures: the exact optimum of each loss, sampled in few steps; wrong variants fall behind."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from clora.config import ObjectiveConfig, ScheduleConfig
from clora.method.flow import euler_step, few_step_sigmas
from clora.method.given import Anchor, DistillBatch, Networks
from clora.method.imitation import imitation_loss, same_step_loss, segment_mean_loss, step_interval
from clora.method.noise import Draws
from clora.method.objective import ta_fm_loss, teacher_velocity_loss
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


def test_step_interval_ends_at_the_data() -> None:
    sigmas = few_step_sigmas(4)
    begin, end = step_interval(sigmas, torch.tensor([0, 3, 1]))
    assert begin.tolist() == [sigmas[0], sigmas[3], sigmas[1]] and end.tolist() == [sigmas[1], 0.0, sigmas[2]]


# Which states, whose answers: `imitation_loss`.


class Recorder:
    """A velocity that notes what it is asked, and answers with `gain` times the state; four times that where its cond
    is of the negative prompt."""

    def __init__(self, gain: float) -> None:
        self.gain = torch.tensor(gain, requires_grad=True)
        self.calls: list[tuple[Tensor, Tensor, Any]] = []

    def __call__(self, x_sigma: Tensor, sigma: Tensor, cond: Any) -> Tensor:
        self.calls.append((x_sigma.detach().clone(), sigma.clone(), cond))
        strength = torch.ones(len(x_sigma), 1, 1)
        if "negative" in cond:
            strength[len(x_sigma) // 2 :] = 4
        return strength * self.gain * x_sigma


def asked_batch(y: Tensor | None, **fields: Any) -> DistillBatch:
    stream = "general" if y is None else "effect"
    conds = {"student_cond": ["student"], "teacher_cond": ["teacher"], "uncond": ["negative"]}
    return DistillBatch(stream, **conds, latent_shape=(1, 2), batch_size=6, samples=[], step=0, y=y, **fields)  # type: ignore[arg-type]


def ask(
    batch: DistillBatch, seed: int = 0, few: bool = False, counts: list[int] | None = None, **objective: Any
) -> tuple[Tensor, Networks]:
    nets = Networks(Recorder(0.5), Recorder(9.0), Recorder(0.25), lambda conds: [*conds[0], *conds[1]])
    nets = replace(nets, few_step_teacher=Recorder(-1.0) if few else None)
    cfg = SimpleNamespace(
        objective=ObjectiveConfig(**{"guidance": 1.0, "imitation_weight": 1.0, **objective}),
        schedule=ScheduleConfig(num_steps=counts[0] if counts else 4, step_counts=counts, sampler="euler"),
    )
    loss, figures = imitation_loss(nets, batch, cfg, Draws.alone(torch.Generator().manual_seed(seed), 6))
    assert figures.keys() == {"imitation_loss"} and figures["imitation_loss"] == loss.detach()
    assert nets.critic.calls == []
    return loss, nets


def test_imitation_loss_asks_the_student_at_noised_targets_and_the_teacher_further_down() -> None:
    y, levels = torch.full((6, 1, 2), 100.0), few_step_sigmas(4)
    seen = set()
    for seed in range(8):
        loss, nets = ask(asked_batch(y), seed)
        ((x_s, s, cond),), ((x_t, t, teacher_cond),) = nets.student.calls, nets.teacher.calls
        assert (cond, teacher_cond) == (["student"], ["teacher"])
        step = (s[:, None] - levels).abs().argmin(1)
        torch.testing.assert_close(s, levels[step])  # each sample at a step of its own
        seen |= set(step.tolist())
        assert ((x_s[:, 0, 0] - (1 - s) * 100).abs() <= 5 * s + 1e-4).all()  # y noised to that level
        begin, end = step_interval(levels, step)
        assert ((end <= t) & (t <= begin)).all()
        torch.testing.assert_close(x_t, x_s + (t - s)[:, None, None] * 0.5 * x_s)
        torch.testing.assert_close(loss, (0.5 * x_s - 0.25 * x_t).square().mean())
    assert seen == {0, 1, 2, 3}


def test_imitation_loss_on_policy_asks_at_the_states_of_the_students_rollout() -> None:
    """Always in the general stream, which has no images; else by `on_policy_share`."""
    levels, lengths = few_step_sigmas(4), set()
    y = torch.full((6, 1, 2), 100.0)
    for batch, share in ((asked_batch(None), 0.0), (asked_batch(y), 1.0)):
        for seed in range(12):
            _, nets = ask(batch, seed, on_policy_share=share)
            calls = nets.student.calls
            lengths.add(len(calls))
            for k, (x, sigma, cond) in enumerate(calls):
                assert (sigma == levels[k]).all() and cond == ["student"]
                if k:
                    before = calls[k - 1][0]
                    torch.testing.assert_close(x, before + (levels[k] - levels[k - 1]) * 0.5 * before)
            assert float(calls[0][0].abs().max()) < 6  # noise, not 100
    assert lengths == {1, 2, 3, 4}


def test_imitation_loss_guides_its_teacher() -> None:
    """v_uncond + 3 (v - v_uncond), both in one call; unconditioned, this teacher answers with four times as much."""
    loss, nets = ask(asked_batch(torch.zeros(6, 1, 2)), guidance=3.0, guidance_rescale="none")
    ((x_s, _, _),), ((x_t, _, cond),) = nets.student.calls, nets.teacher.calls
    assert cond == ["teacher", "negative"] and len(x_t) == 12 and torch.equal(x_t[:6], x_t[6:])
    guided = 1.0 * x_t[:6] + 3 * (0.25 * x_t[:6] - 1.0 * x_t[:6])
    torch.testing.assert_close(loss, (0.5 * x_s - guided).square().mean())


def test_imitation_loss_same_step_asks_the_few_step_teacher_where_the_student_is() -> None:
    loss, nets = ask(asked_batch(torch.zeros(6, 1, 2)), few=True, imitation="same_step", guidance=4.0)
    ((x, s, _),), ((x_t, t, cond),) = nets.student.calls, nets.few_step_teacher.calls  # type: ignore[union-attr]
    assert torch.equal(x, x_t) and torch.equal(s, t) and cond == ["teacher"] and nets.teacher.calls == []
    torch.testing.assert_close(loss, (0.5 * x + x).square().mean())
    with pytest.raises(ValueError, match="few_step_teacher"):
        ask(asked_batch(torch.zeros(6, 1, 2)), imitation="same_step")


def test_imitation_loss_draws_one_of_its_step_counts() -> None:
    seen = Counter()
    for seed in range(40):
        _, nets = ask(asked_batch(torch.zeros(6, 1, 2)), seed, counts=[1, 2])
        levels = set(nets.student.calls[0][1].tolist())
        assert levels <= {1.0, float(few_step_sigmas(2)[1])}
        seen["two" if len(levels) == 2 else "one"] += 1
    assert min(seen["one"], seen["two"]) > 10


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_imitation_loss_keeps_to_the_steps_below_its_bound(share: float) -> None:
    """Of four steps the last two, of two the last; a rollout begins with noise all the same."""
    seen = set()
    for seed in range(40):
        batch = asked_batch(torch.zeros(6, 1, 2))
        _, nets = ask(batch, seed, counts=[4, 2, 1], imitation_below=0.8, on_policy_share=share)
        calls = nets.student.calls
        seen |= {round(level, 4) for level in calls[-1][1].tolist()}
        assert len(calls) == 1 or float(calls[0][1][0]) == 1.0
    assert seen == {0.75, 0.5}


def test_imitation_loss_learns_from_the_anchors_where_a_batch_has_some() -> None:
    anchor = Anchor(torch.full((6, 1, 2), 100.0), ["anchor's student"], ["anchor's teacher"])
    _, nets = ask(asked_batch(torch.zeros(6, 1, 2), anchor=anchor))
    assert nets.student.calls[0][2] == ["anchor's student"] and nets.teacher.calls[0][2] == ["anchor's teacher"]


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_imitation_loss_takes_anchors_of_another_size(share: float) -> None:
    """Their images are drawn by themselves, and may fall into another bucket than those of distribution matching."""
    anchor = Anchor(torch.full((6, 3, 2), 100.0), ["student"], ["teacher"])
    _, nets = ask(asked_batch(torch.zeros(6, 1, 2), anchor=anchor), on_policy_share=share, few=False)
    assert {call[0].shape for call in (*nets.student.calls, *nets.teacher.calls)} == {(6, 3, 2)}


# The coarse stage's: `teacher_velocity_loss`.


def of_coarse(loss: Any, nets: Any, batch: DistillBatch, seed: int = 0, **objective: Any) -> Tensor:
    cfg = SimpleNamespace(
        objective=ObjectiveConfig(**{"guidance": 1.0, "ta_fm_sigma": "shifted", **objective}), schedule=ScheduleConfig()
    )
    value, figures = loss(nets, batch, cfg, Draws.alone(torch.Generator().manual_seed(seed), batch.batch_size))
    assert list(figures.values()) == [value.detach()]
    return value  # type: ignore[no-any-return]


def test_teacher_velocity_loss_asks_both_where_ta_fm_asks_the_student() -> None:
    """Each under its own prompt; guided, the teacher is asked twice in one call; anchors have their own batch."""
    y = torch.full((6, 1, 2), 100.0)
    anchor = Anchor(y, ["anchor's student"], ["anchor's teacher"], ["negative"])
    for batch, student_cond, teacher_cond in (
        (asked_batch(y), ["student"], ["teacher", "negative"]),
        (asked_batch(0 * y, anchor=anchor), ["anchor's student"], ["anchor's teacher", "negative"]),
    ):
        nets = Networks(Recorder(0.5), Recorder(9.0), Recorder(0.25), lambda conds: [*conds[0], *conds[1]])
        loss = of_coarse(teacher_velocity_loss, nets, batch, guidance=3.0, guidance_rescale="none")
        ((x, s, cond),), ((x_t, s_t, asked),) = nets.student.calls, nets.teacher.calls  # type: ignore[attr-defined]
        assert (cond, asked) == (student_cond, teacher_cond) and nets.critic.calls == []  # type: ignore[attr-defined]
        assert torch.equal(x_t, torch.cat([x, x])) and torch.equal(s_t, torch.cat([s, s]))
        torch.testing.assert_close(loss, (0.5 * x - (x + 3 * (0.25 * x - x))).square().mean())
        of_coarse(ta_fm_loss, nets, batch)
        assert torch.equal(nets.student.calls[1][0], x) and torch.equal(nets.student.calls[1][1], s)  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="batch of step 0 has none"):
        of_coarse(teacher_velocity_loss, nets, replace(asked_batch(y), y=None, anchor=Anchor(None, [], [])))


def test_teacher_velocity_loss_is_ta_fm_without_its_noise() -> None:
    """Where y is the teacher's: one gradient in the mean over 200 batches, without any noise around it where the
    student adds a constant `shift` to its teacher's velocity, and none at all where it adds nothing."""
    world, one = ring(), torch.ones(2)
    picks = torch.Generator().manual_seed(5)

    def gradients(loss: Any, shift: Tensor) -> Tensor:
        found = []
        for seed in range(200):
            which = torch.randint(6, (NUM,), generator=picks)
            y = (world.means[0, which] + world.sd * torch.randn(NUM, 2, generator=picks))[:, None]
            added = shift.clone().requires_grad_()

            def student(x: Tensor, sigma: Tensor, cond: Any, added: Tensor = added) -> Tensor:
                return world.velocity(x, sigma) + added

            nets = Networks(student, Recorder(9.0), lambda x, sigma, cond: world.velocity(x, sigma))
            conds = {"student_cond": [], "teacher_cond": [], "uncond": None}
            batch = DistillBatch("effect", **conds, latent_shape=(1, 2), batch_size=NUM, samples=[], step=0, y=y)  # type: ignore[arg-type]
            of_coarse(loss, nets, batch, seed).backward()
            assert added.grad is not None
            found.append(added.grad)
        return torch.stack(found)

    quiet, noisy = gradients(teacher_velocity_loss, 0.3 * one), gradients(ta_fm_loss, 0.3 * one)
    torch.testing.assert_close(quiet.mean(0), 0.3 * one, rtol=1e-5, atol=0)  # of mean((v + a - v)^2): a
    torch.testing.assert_close(noisy.mean(0), quiet.mean(0), rtol=0.1, atol=0)
    assert float(quiet.std(0).max()) < 1e-5 < 1e-3 < float(noisy.std(0).min())
    assert not gradients(teacher_velocity_loss, 0 * one).any()

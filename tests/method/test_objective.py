"""The objectives in a world whose scores are known exactly (`tests/support/mixture_world.py`).

Each threshold has a wrong variant beside it that falls on the other side, so that the test can fail.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from clora.errors import InputError
from clora.method.flow import few_step_sigmas, shift_sigma
from clora.method.given import Anchor, DistillBatch, Networks, Query, ask_scores
from clora.method.losses import guided_velocity
from clora.method.noise import Draws, Rows, draw_dmd_sigma, split_rows
from clora.method.objective import (
    critic_loss,
    critic_samples,
    dmd_bs_loss,
    dmd_ts_loss,
    ta_fm_loss,
    total_loss_terms,
)
from tests.support.losses import c2f_do_loss, total_loss
from tests.support.mixture_world import (
    EFFECTS,
    NUM_EFFECTS,
    Mixture,
    WorldCond,
    base_mixture,
    base_velocity,
    cat_conds,
    config,
    effect_centres,
    effect_mixture,
    energy_distance,
    make_cond,
    make_effect_cond,
    teacher_mixture,
    teacher_velocity,
    unconditional,
    without_effects,
)

LEAK = 0.1


class Net(torch.nn.Module):
    """A velocity with one parameter, 1 at the start, that notes every call."""

    def __init__(self, velocity: Callable[[Tensor, Tensor, Any], Tensor]) -> None:
        super().__init__()
        self.velocity = velocity
        self.gain = torch.nn.Parameter(torch.ones(()))
        self.calls: list[tuple[Tensor, Tensor, Any, bool]] = []

    def forward(self, x_sigma: Tensor, sigma: Tensor, cond: Any) -> Tensor:
        self.calls.append((x_sigma.detach(), sigma, cond, torch.is_grad_enabled()))
        return self.gain * self.velocity(x_sigma, sigma, cond)


class Particles(torch.nn.Module):
    """A student whose samples are free points, whatever it is asked."""

    def __init__(self, points: Tensor) -> None:
        super().__init__()
        self.points = torch.nn.Parameter(points.clone())

    def forward(self, x_sigma: Tensor, sigma: Tensor, cond: Any) -> Tensor:
        return (x_sigma - self.points) / sigma.view(-1, 1, 1)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draws(count: int, seed: int = 0) -> Draws:
    return Draws.alone(rng(seed), count)


def make_batch(cond: WorldCond, **fields: Any) -> DistillBatch:
    effect = cond.effects[0] is not None
    defaults: dict[str, Any] = dict(
        stream="effect" if effect else "general",
        student_cond=without_effects(cond),
        teacher_cond=cond,
        uncond=unconditional(cond),
        latent_shape=(1, 2),
        batch_size=len(cond.effects),
        samples=["a point"] * len(cond.effects),
        step=0,
        y=effect_mixture(cond).sample(rng(99)) if effect else None,
    )
    return DistillBatch(**{**defaults, **fields})


def make_nets(student: Any = base_velocity, critic: Any = base_velocity, teacher: Any = None) -> Networks:
    return Networks(Net(student), Net(critic), Net(teacher or teacher_velocity(LEAK)), cat_conds)


def counts(nets: Networks) -> tuple[int, int, int]:
    return len(nets.student.calls), len(nets.critic.calls), len(nets.teacher.calls)


def particle_gradient(nets: Networks, batch: DistillBatch, cfg: Any, points: Tensor, sigma: Tensor) -> Tensor:
    """numel * dL/dx0 of DMD-BS for a student whose samples are `points`."""
    student = Particles(points)
    loss, _ = dmd_bs_loss(replace(nets, student=student), batch, cfg, draws(batch.batch_size, 1), sigma=sigma)
    loss.backward()
    return student.points.grad * points.numel()


# Directions and sizes of the gradient.


@pytest.mark.parametrize("variant", ["right", "critic and teacher swapped", "no teacher"])
def test_dmd_bs_loss_descends_from_base_to_effect(variant: str) -> None:
    cond = make_effect_cond(1000, rng())
    batch, points = make_batch(cond), base_mixture(cond).sample(rng(2))
    nets = make_nets()
    if variant == "critic and teacher swapped":
        student_cond, teacher_cond = batch.teacher_cond, batch.student_cond
        nets = make_nets(critic=teacher_velocity(LEAK))
        batch = replace(batch, student_cond=student_cond, teacher_cond=teacher_cond)
    if variant == "no teacher":
        nets = make_nets(teacher=base_velocity, critic=lambda x, s, c: base_velocity(x, s, c) * 1.01)
    g = particle_gradient(nets, batch, config(), points, torch.full((1000,), 0.9))
    asked = effect_centres(cond)[torch.arange(1000), torch.arange(1000) % NUM_EFFECTS]
    cosine = torch.cosine_similarity(-g.flatten(1), asked - cond.source).mean()
    if variant == "right":
        assert cosine > 0.95
    else:
        assert cosine < (-0.95 if variant == "critic and teacher swapped" else 0.5)


@pytest.mark.parametrize("norm", ["sample", "none"])
@pytest.mark.parametrize("variant", ["right", "no teacher switch"])
def test_dmd_bs_loss_points_to_the_asked_effect_among_all(variant: str, norm: str) -> None:
    cond = make_effect_cond(1000, rng())
    batch = make_batch(cond)
    if variant == "no teacher switch":
        batch = replace(batch, teacher_cond=replace(cond, effects=(EFFECTS[0],) * 1000))
    points = base_mixture(cond).sample(rng(2))
    g = particle_gradient(make_nets(), batch, config(dmd_norm=norm), points, torch.full((1000,), 0.9))
    to_each = effect_centres(cond) - cond.source[:, None]
    nearest = torch.cosine_similarity(-g, to_each, dim=-1).argmax(-1)
    share = (nearest == torch.arange(1000) % NUM_EFFECTS).float().mean()
    assert share > 0.95 if variant == "right" else share < 0.3


@pytest.mark.parametrize("reverse", [False, True])
def test_dmd_bs_loss_vanishes_at_low_sigma_under_a_leaky_teacher(reverse: bool) -> None:
    cond = make_effect_cond(1000, rng())
    points = base_mixture(cond).sample(rng(2))

    def size(sigma: float) -> float:
        sigma_B = torch.full((1000,), 1 - sigma if reverse else sigma)
        return float(particle_gradient(make_nets(), make_batch(cond), config(), points, sigma_B).abs().mean())

    ratio = size(0.98) / size(0.1)
    assert ratio < 0.02 if reverse else ratio > 50


@pytest.mark.parametrize("leak", [LEAK, 0.0])
def test_dmd_ts_loss_keeps_its_gradient_where_backward_simulation_loses_it(leak: float) -> None:
    # Fig. 13 and 14. Without a leak nothing vanishes, and the two are alike.
    cond = make_effect_cond(2000, rng())
    cfg = config(dmd_sigma_min=0.29, dmd_sigma_max=0.31, dmd_sigma_shift=1.0, tau_min=0.0, dmd_norm="none")
    nets, batch = make_nets(teacher=teacher_velocity(leak)), make_batch(cond)
    nets = replace(nets, student=Particles(base_mixture(cond).sample(rng(2))))
    _, backward = dmd_bs_loss(nets, batch, cfg, draws(batch.batch_size, 3))
    _, target = dmd_ts_loss(replace(nets, student=Net(base_velocity)), batch, cfg, draws(batch.batch_size, 4))
    ratio = target["dmd_ts_grad_abs"] / backward["dmd_bs_grad_abs"]
    assert ratio > 5 if leak else 0.5 < ratio < 2


@pytest.mark.parametrize("preset", ["paper", "authors"])
def test_dmd_ts_loss_gradient_is_amplified_by_the_critics_lower_bound(preset: str) -> None:
    # Fig. 14 (c): the same step without the bound, and with the sigmas the bound keeps out.
    cond = make_effect_cond(2000, rng())
    plain = {"dmd_norm": "none", "ts_sigma": "continuous", "tau_max": 0.75}

    def size(**bounds: float) -> float:
        _, figures = dmd_ts_loss(
            make_nets(), make_batch(cond), config(preset, **plain, **bounds), draws(len(cond.effects), 4)
        )
        return float(figures["dmd_ts_grad_abs"])

    bounded, unbounded = size(), size(tau_min=0.0, ts_critic_shift=1.0)
    below = size(tau_min=0.0, ts_critic_shift=1.0, dmd_sigma_max=0.5)
    assert bounded > 1.3 * unbounded > 1.3 * below


def test_dmd_losses_vanish_when_student_critic_and_teacher_agree() -> None:
    cond = make_cond(500, rng())
    same = make_nets(teacher=base_velocity)
    loss, figures = dmd_bs_loss(same, make_batch(cond), config(), draws(len(cond.effects)))
    assert loss < 1e-6 and figures["dmd_bs_grad_abs"] < 1e-6
    batch = make_batch(cond, y=base_mixture(cond).sample(rng(3)))
    loss, figures = dmd_ts_loss(same, batch, config(), draws(batch.batch_size))
    assert loss < 1e-6 and figures["dmd_ts_grad_abs"] < 1e-6
    differ = make_nets(teacher=lambda x, s, c: base_velocity(x, s, c) + 0.01)
    assert dmd_bs_loss(differ, make_batch(cond), config(), draws(len(cond.effects)))[1]["dmd_bs_grad_abs"] > 1e-3


@pytest.mark.parametrize(
    ("variant", "low", "high"),
    [("right", 0, 1.5), ("base image as target", 4, 30), ("sign", 15, 30), ("effect not asked", 5, 20)],
)
def test_ta_fm_loss_is_small_only_for_the_taught_student(variant: str, low: float, high: float) -> None:
    cond = make_effect_cond(2000, rng())
    taught = teacher_velocity(0.0)
    batch = make_batch(cond, student_cond=cond)  # here the student's prompt names the effect
    match variant:
        case "base image as target":
            batch = replace(batch, y=base_mixture(cond).sample(rng(3)))
        case "sign":
            taught = lambda x, s, c: -teacher_velocity(0.0)(x, s, c)  # noqa: E731
        case "effect not asked":
            batch = replace(batch, student_cond=without_effects(cond))
    loss, _ = ta_fm_loss(make_nets(student=taught), batch, config(), draws(batch.batch_size))
    assert low <= loss < high


@pytest.mark.parametrize("variant", ["right", "sign", "no critic"])
def test_dmd_bs_loss_moves_particles_to_the_teachers_distribution(variant: str) -> None:
    n, num_steps = 256, 250
    one = make_cond(1, rng(), (EFFECTS[1],))
    cond = WorldCond(one.source.expand(n, 2), one.instruction.expand(n), one.effects * n)
    student = Particles(base_mixture(cond).sample(rng(1)))

    def exact_critic(x: Tensor, sigma: Tensor, _: Any) -> Tensor:
        points = student.points.detach()[None, :, 0].expand(n, n, 2)
        return Mixture(points, torch.full((n, n), 1 / n), sd=0.05).velocity(x, sigma)

    def own_sample(x: Tensor, sigma: Tensor, _: Any) -> Tensor:  # x0_critic = the particle itself
        return (x - student.points.detach()) / sigma.view(-1, 1, 1)

    critic = own_sample if variant == "no critic" else exact_critic
    nets = Networks(student, critic, teacher_velocity(0.0))
    batch, steps_draws = make_batch(cond), draws(n, 2)
    for step in range(num_steps):
        loss, _ = dmd_bs_loss(nets, batch, config(), steps_draws)
        g = torch.autograd.grad(loss, student.points)[0] * student.points.numel()
        rate = 0.1 * (1 - step / num_steps) * (-1 if variant == "sign" else 1)
        with torch.no_grad():
            student.points -= rate * g
    distance = energy_distance(student.points.detach(), teacher_mixture(cond, 0.0).sample(rng(3)))
    assert distance < 0.1 if variant == "right" else distance > 0.2


# Where gradients go, and which network sees which prompt.


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_total_loss_sends_gradient_to_the_student_alone(guidance: float) -> None:
    nets = make_nets()
    loss, _ = total_loss(nets, make_batch(make_effect_cond(8, rng())), config(guidance=guidance), draws(8))
    loss.backward()
    assert nets.student.gain.grad.abs() > 0
    assert nets.critic.gain.grad is None and nets.teacher.gain.grad is None
    assert not any(grad for net in (nets.critic, nets.teacher) for *_, grad in net.calls)


def test_dmd_bs_loss_grads_only_the_last_student_forward() -> None:
    for seed in range(12):
        nets = make_nets()
        dmd_bs_loss(nets, make_batch(make_cond(4, rng())), config(), draws(4, seed))
        flags = [grad for *_, grad in nets.student.calls]
        assert flags == [False] * (len(flags) - 1) + [True]


def test_critic_loss_sends_gradient_to_the_critic_alone() -> None:
    for share in (0.0, 1.0):
        nets = make_nets()
        cfg = config(critic_target_share=share)
        loss, _ = critic_loss(nets, make_batch(make_effect_cond(8, rng())), cfg, draws(8))
        loss.backward()
        assert nets.critic.gain.grad.abs() > 0
        assert nets.student.gain.grad is None and nets.teacher.calls == []
        assert not any(grad for *_, grad in nets.student.calls)


def test_objectives_give_student_and_critic_the_students_prompt() -> None:
    nets, batch = make_nets(), make_batch(make_effect_cond(8, rng()))
    total_loss(nets, batch, config(), draws(batch.batch_size))
    critic_loss(nets, batch, config(critic_target_share=1.0), draws(batch.batch_size))
    calls = nets.student.calls + nets.critic.calls
    assert all(cond is batch.student_cond for _, _, cond, _ in calls)
    assert all(cond is batch.teacher_cond for _, _, cond, _ in nets.teacher.calls)


def test_dmd_losses_ask_critic_and_teacher_at_the_same_point() -> None:
    nets = make_nets()
    total_loss(nets, make_batch(make_effect_cond(8, rng())), config(), draws(8))
    assert len(nets.critic.calls) == 2
    for critic, teacher in zip(nets.critic.calls, nets.teacher.calls, strict=True):
        assert torch.equal(critic[0], teacher[0]) and torch.equal(critic[1], teacher[1])


# Guidance.


@pytest.mark.parametrize("joint", [False, True])
def test_ask_scores_evaluates_cond_and_uncond_in_one_call(joint: bool) -> None:
    cond = make_effect_cond(8, rng())
    nets, batch = make_nets(critic=lambda *given: 2 * base_velocity(*given)), make_batch(cond)
    x, sigma = torch.randn(8, 1, 2, generator=rng()), torch.rand(8, generator=rng())
    critic, teacher = nets.critic, nets.teacher
    if joint:

        def scores(of_critic: Query, of_teacher: Query) -> tuple[Tensor, Tensor]:
            return critic(*of_critic), teacher(*of_teacher)

        nets = replace(nets, scores=scores)
    got = ask_scores(nets, batch, config(guidance=4.0).objective, x, sigma)
    assert [len(given[0]) for given in teacher.calls] == [16]
    wanted = 2 * base_velocity(x, sigma, batch.student_cond)
    wanted = [wanted, *(teacher_velocity(LEAK)(x, sigma, one) for one in (cond, unconditional(cond)))]
    for velocity, want in zip(got, wanted, strict=True):
        torch.testing.assert_close(velocity, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("guided", [[1, 3, 4], []])
def test_ask_scores_asks_unguided_samples_once(guided: list[int]) -> None:
    """They have no negative prompt, and guiding them changes nothing; the others are guided as ever."""
    cond = make_effect_cond(5, rng())
    x, sigma = torch.randn(5, 1, 2, generator=rng()), torch.rand(5, generator=rng())
    some = WorldCond(cond.source[guided], cond.instruction[guided], tuple(cond.effects[i] for i in guided))
    batch = make_batch(cond, guided=guided, uncond=unconditional(some) if guided else None)
    nets = make_nets()
    _, v_cond, v_uncond = ask_scores(nets, batch, config(guidance=4.0).objective, x, sigma)
    assert [len(given[0]) for given in nets.teacher.calls] == [5 + len(guided)]
    whole = make_batch(cond)
    _, want_cond, want_uncond = ask_scores(make_nets(), whole, config(guidance=4.0).objective, x, sigma)
    torch.testing.assert_close(v_cond, want_cond)
    assert v_uncond is not None and want_uncond is not None
    for i in range(5):
        got = guided_velocity(v_cond[i : i + 1], v_uncond[i : i + 1], 4.0, "norm")
        want = guided_velocity(want_cond[i : i + 1], want_uncond[i : i + 1], 4.0, "norm")
        torch.testing.assert_close(got, want if i in guided else want_cond[i : i + 1])
        assert float((want - want_cond[i]).abs().max()) > 1e-3  # where guidance would show


@pytest.mark.parametrize("rescale", ["none", "norm"])
def test_dmd_bs_loss_is_of_the_guided_teacher(rescale: str) -> None:
    batch, sigma = make_batch(make_effect_cond(8, rng())), torch.full((8,), 0.6)
    settings = config(guidance=4.0, guidance_rescale=rescale)
    nets = make_nets()
    got, _ = dmd_bs_loss(nets, batch, settings, draws(batch.batch_size), sigma=sigma)
    x_sigma = nets.critic.calls[-1][0]
    v_cond, v_uncond = (teacher_velocity(LEAK)(x_sigma, sigma, c) for c in (batch.teacher_cond, batch.uncond))
    real = guided_velocity(v_cond, v_uncond, 4.0, rescale)
    guided = replace(nets, teacher=lambda *_: real)
    want, _ = dmd_bs_loss(guided, batch, config(guidance=1.0), draws(batch.batch_size), sigma=sigma)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_ask_scores_at_one_never_asks_uncond() -> None:
    nets, batch = make_nets(), make_batch(make_effect_cond(8, rng()), uncond=None)
    total_loss(replace(nets, cat_conds=None), batch, config(guidance=1.0), draws(batch.batch_size))
    assert all(len(x) == 8 for x, *_ in nets.teacher.calls)


def test_ask_scores_refuses_guidance_without_uncond() -> None:
    batch = make_batch(make_effect_cond(8, rng()), uncond=None)
    with pytest.raises(ValueError, match="no uncond"):
        total_loss(make_nets(), batch, config(guidance=4.0), draws(batch.batch_size))


# Counts of forwards.


def run(kind: str, seed: int, **objective: Any) -> tuple[float, int, int]:
    """One update: (forwards, backwards, exit step), the teacher's cond and uncond counted as two."""
    nets = make_nets()
    cond = make_cond(1, rng()) if kind == "general" else make_effect_cond(1, rng())
    update = critic_loss if kind == "critic" else total_loss
    loss, _ = update(nets, make_batch(cond), config(guidance=4.0, **objective), draws(len(cond.effects), seed))
    loss.backward()
    forwards = counts(nets)[0] + counts(nets)[1] + sum(len(x) for x, *_ in nets.teacher.calls)
    backwards = sum(grad for net in (nets.student, nets.critic) for *_, grad in net.calls)
    return forwards, backwards, sum(not grad for *_, grad in nets.student.calls)


@pytest.mark.parametrize(
    ("kind", "mean_forwards", "backwards"), [("effect", 12.5, 3), ("general", 7.5, 1), ("critic", 5.5, 1)]
)
def test_mean_cost_is_what_the_method_needs(kind: str, mean_forwards: float, backwards: int) -> None:
    # The authors' code runs 16 F + 3 B in either stream and 9 F + 1 B for the critic.
    rows = [run(kind, seed) for seed in range(160)]
    assert {b for _, b, _ in rows} == {backwards}
    by_exit = {step: {f for f, _, s in rows if s == step} for step in {s for *_, s in rows}}
    assert len(by_exit) == 8 and all(len(forwards) == 1 for forwards in by_exit.values())
    # One of each exit step, as the uniform draw has on average.
    assert sum(min(forwards) for forwards in by_exit.values()) / 8 <= mean_forwards
    assert abs(sum(f for f, *_ in rows) / len(rows) - mean_forwards) < 0.6


def test_total_loss_of_general_stream_never_runs_ts_or_ta_fm() -> None:
    nets = make_nets()
    _, figures = total_loss(nets, make_batch(make_cond(4, rng())), config(), draws(4))
    assert counts(nets)[1:] == (1, 1)
    assert {name.rsplit("_", 1)[0] for name in figures} <= {"total", "dmd_bs", "dmd_bs_grad"}


@pytest.mark.parametrize(
    ("weights", "critic_calls", "terms"),
    [
        ({"dmd_ts_weight": 0.0, "dmd_bs_weight": 0.0}, 0, {"ta_fm_loss"}),
        ({"ta_fm_weight": 0.0, "dmd_bs_weight": 0.0}, 1, {"dmd_ts_loss"}),
        ({"ta_fm_weight": 0.0, "dmd_ts_weight": 0.0}, 1, {"dmd_bs_loss"}),
    ],
)
def test_total_loss_spends_nothing_on_a_term_of_weight_zero(
    weights: dict[str, float], critic_calls: int, terms: set[str]
) -> None:
    nets = make_nets()
    _, figures = total_loss(nets, make_batch(make_effect_cond(4, rng())), config(**weights), draws(4))
    assert counts(nets)[1:] == (critic_calls, critic_calls)
    assert {name for name in figures if name.endswith("_loss")} == {"total_loss", *terms}
    if "dmd_bs_loss" not in terms:
        assert counts(nets)[0] == 1


def test_total_loss_refuses_a_stream_without_weight() -> None:
    with pytest.raises(InputError, match="general stream.*all 0.*p_switch"):
        total_loss(make_nets(), make_batch(make_cond(4, rng())), config(dmd_bs_weight=0.0), draws(4))


@pytest.mark.parametrize("loss", [ta_fm_loss, dmd_ts_loss])
def test_losses_on_targets_refuse_a_batch_without_them(loss: Any) -> None:
    with pytest.raises(ValueError, match="needs target images y, and the batch of step 17"):
        loss(make_nets(), make_batch(make_effect_cond(4, rng()), y=None, step=17), config(), draws(4))


# Sums, figures, randomness.


@pytest.mark.parametrize("stream", ["effect", "general"])
def test_total_loss_terms_are_walked_back_before_the_next_is_computed(stream: str) -> None:
    batch = make_batch(make_effect_cond(8, rng()) if stream == "effect" else make_cond(8, rng()))
    points = torch.randn(8, 1, 2, generator=rng(3))

    def student(scale: Tensor) -> Any:
        return lambda x, sigma, cond: base_velocity(x, sigma, cond) * scale + points

    scales = [torch.ones((), requires_grad=True) for _ in range(2)]
    whole, figures = total_loss(make_nets(student(scales[0])), batch, config(), draws(batch.batch_size))
    whole.backward()
    nets = make_nets(student(scales[1]))
    calls_with_grad, sums = [], []
    for loss, of_term in total_loss_terms(nets, batch, config(), draws(8)):
        calls_with_grad.append(sum(grad for *_, grad in nets.student.calls))
        loss.backward()
        sums.append(loss.detach())
        assert all(torch.equal(value, figures[name]) for name, value in of_term.items())
    assert calls_with_grad == list(range(1, 4 if stream == "effect" else 2))
    torch.testing.assert_close(torch.stack(sums).sum(), whole.detach(), rtol=1e-6, atol=0)
    torch.testing.assert_close(scales[1].grad, scales[0].grad, rtol=1e-6, atol=0)


def test_c2f_do_loss_is_the_weighted_sum_of_its_terms() -> None:
    batch = make_batch(make_effect_cond(8, rng()))
    weights = {"ta_fm_weight": 0.7, "dmd_ts_weight": 0.2, "dmd_bs_weight": 1.3}
    nets = make_nets()
    loss, figures = c2f_do_loss(nets, batch, config(**weights), draws(batch.batch_size))
    want = sum(weight * figures[name.replace("weight", "loss")] for name, weight in weights.items())
    torch.testing.assert_close(loss.detach(), want, rtol=1e-6, atol=0)
    in_order = draws(8)
    sigma = draw_dmd_sigma(config().objective, in_order)
    parts = [
        ta_fm_loss(nets, batch, config(), in_order)[0],
        dmd_ts_loss(nets, batch, config(), in_order)[0],
        dmd_bs_loss(nets, batch, config(), in_order, sigma=sigma)[0],
    ]
    torch.testing.assert_close(loss, sum(w * p for w, p in zip(weights.values(), parts, strict=True)))
    total, total_figures = total_loss(nets, batch, config(**weights), draws(batch.batch_size))
    assert total == loss and total_figures["total_loss"] == loss


def test_objectives_are_pure_functions_of_weights_batch_and_rng() -> None:
    batch = make_batch(make_effect_cond(8, rng()))
    for objective in (total_loss, critic_loss):
        torch.manual_seed(0)
        first, _ = objective(make_nets(), batch, config(critic_target_share=0.5), draws(batch.batch_size, 7))
        torch.manual_seed(1)  # the global generator is not read
        again, _ = objective(make_nets(), batch, config(critic_target_share=0.5), draws(batch.batch_size, 7))
        other, _ = objective(make_nets(), batch, config(critic_target_share=0.5), draws(batch.batch_size, 8))
        assert first == again and first != other


def test_objectives_figures_are_detached_scalars() -> None:
    batch = make_batch(make_effect_cond(8, rng()))
    for objective in (total_loss, critic_loss):
        loss, figures = objective(make_nets(), batch, config(), draws(batch.batch_size))
        assert loss.ndim == 0 and loss.requires_grad
        assert all(v.ndim == 0 and not v.requires_grad and v.isfinite() for v in figures.values())


def rows_of(cond: WorldCond, rows: Rows) -> WorldCond:
    kept = slice(rows.start, rows.stop)
    return WorldCond(cond.source[kept], cond.instruction[kept], cond.effects[kept])


def part_of(
    whole: DistillBatch, cond: WorldCond, anchor_cond: WorldCond, rows: Rows, anchor_rows: Rows
) -> DistillBatch:
    """The rows of one process of a batch with anchors."""
    assert whole.y is not None and whole.anchor is not None
    y, own_cond = whole.anchor.y[anchor_rows.start : anchor_rows.stop], rows_of(anchor_cond, anchor_rows)
    return make_batch(rows_of(cond, rows), y=whole.y[rows.start : rows.stop], anchor=Anchor(y, own_cond, own_cond))


@pytest.mark.parametrize("law", ["uniform", "above_dmd"])
@pytest.mark.parametrize("ts_sigma", ["schedule", "continuous"])
@pytest.mark.parametrize("world", [2, 3, 7])  # 5 samples and 8 anchors: uneven, and with 7 some have no sample
def test_objectives_of_all_processes_sum_to_the_whole_batch(world: int, ts_sigma: str, law: str) -> None:
    """Loss, figures and gradient; and every process runs the same forwards."""
    cfg = config(ts_sigma=ts_sigma, ta_fm_sigma=law, critic_target_share=0.5, tau_max=0.9)
    cond, anchor_cond = make_effect_cond(5, rng(1)), make_effect_cond(8, rng(2))
    anchor = Anchor(effect_mixture(anchor_cond).sample(rng(3)), anchor_cond, anchor_cond)
    whole = make_batch(cond, anchor=anchor)
    for objective in (total_loss, critic_loss):
        for seed in range(4):
            nets = make_nets()
            all_rows = Draws(rng(seed), split_rows(5, 0, 1), split_rows(8, 0, 1))
            loss, figures = objective(nets, whole, cfg, all_rows)
            loss.backward()
            sums, gradient, seen = Counter[str](), 0.0, set()
            for rank in range(world):
                rows, anchor_rows = split_rows(5, rank, world), split_rows(8, rank, world)
                batch = part_of(whole, cond, anchor_cond, rows, anchor_rows)
                own = make_nets()
                own_loss, own_figures = objective(own, batch, cfg, Draws(rng(seed), rows, anchor_rows))
                own_loss.backward()
                sums.update(
                    {name: float(value) for name, value in own_figures.items()} | {"loss": float(own_loss.detach())}
                )
                gradient += sum(float(net.gain.grad) for net in (own.student, own.critic) if net.gain.grad is not None)
                seen.add(counts(own))
            expected = {name: float(value) for name, value in figures.items()} | {"loss": float(loss.detach())}
            assert dict(sums) == pytest.approx(expected, rel=1e-5, abs=1e-6)
            trained = nets.student if objective is total_loss else nets.critic
            assert gradient == pytest.approx(float(trained.gain.grad), rel=1e-4, abs=1e-6)
            assert seen == {counts(nets)}


def test_ta_fm_loss_takes_the_anchor_batch_when_there_is_one() -> None:
    nets, batch = make_nets(), make_batch(make_effect_cond(4, rng()))
    anchor_cond = make_effect_cond(32, rng(5))
    teacher_cond = without_effects(anchor_cond)
    batch = replace(batch, anchor=Anchor(effect_mixture(anchor_cond).sample(rng(6)), anchor_cond, teacher_cond))
    for law in ("uniform", "shifted", "above_dmd"):
        own = Draws(rng(), split_rows(4, 0, 1), split_rows(32, 0, 1))
        total_loss(nets, batch, config(ta_fm_sigma=law), own)
    sizes = Counter(len(x) for x, _, cond, _ in nets.student.calls if cond is anchor_cond)
    assert sizes == {32: 3}
    assert all(len(x) == 4 for x, _, cond, _ in nets.student.calls if cond is not anchor_cond)


def test_critic_loss_takes_target_simulated_samples_by_share() -> None:
    batch = make_batch(make_effect_cond(2, rng()))
    taken = []
    for seed in range(300):
        nets = make_nets()
        _, figures = critic_loss(nets, batch, config(critic_target_share=0.3), draws(batch.batch_size, seed))
        taken.append(float(figures["critic_on_target"]))
        if taken[-1]:
            assert counts(nets)[0] == 1 and float(nets.student.calls[0][1].max()) < 0.75
        else:
            assert float(nets.student.calls[0][1].min()) == 1.0
    assert abs(sum(taken) / 300 - 0.3) < 0.1
    general = make_batch(make_cond(2, rng()))
    _, figures = critic_loss(make_nets(), general, config(critic_target_share=1.0), draws(general.batch_size))
    assert figures["critic_on_target"] == 0


@pytest.mark.parametrize("step_counts", [None, [5, 2]])
def test_critic_samples_of_several_batches_are_those_of_each(step_counts: list[int] | None) -> None:
    """Their own sizes, exit steps and kinds; a forward a sampler step for all that roll out, with their conds joined,
    and none with grad. The numbers that follow are those that would have followed."""
    conds = [make_effect_cond(2, rng(1)), make_effect_cond(3, rng(2)), make_effect_cond(2, rng(3))]
    batches = [make_batch(cond) for cond in conds]
    cfg = config(critic_target_share=0.3)
    cfg.schedule = cfg.schedule.model_copy(update={"step_counts": step_counts})
    seen = set()
    for seed in range(12):
        alone, together = make_nets(), make_nets()
        apart, same = ([draws(batch.batch_size, 10 * seed + i) for i, batch in enumerate(batches)] for _ in range(2))
        want = [critic_samples(alone, [b], cfg, [r])[0] for b, r in zip(batches, apart, strict=True)]
        got = critic_samples(together, batches, cfg, same)
        for one, other in zip(got, want, strict=True):
            torch.testing.assert_close(one.x0, other.x0)
            assert one.on_target == other.on_target and not one.x0.requires_grad
        after = [[torch.rand(1, generator=one.generator) for one in which] for which in (apart, same)]
        assert after[0] == after[1]
        rollouts = 3 - sum(one.on_target for one in want)
        assert len(together.student.calls) <= len(alone.student.calls) and not any(c[3] for c in together.student.calls)
        assert sum(len(c[0]) for c in together.student.calls) == sum(len(c[0]) for c in alone.student.calls)
        if rollouts > 1:
            assert len(together.student.calls) < len(alone.student.calls)
        seen.add(rollouts)
    assert {2, 3} <= seen


def test_dmd_bs_loss_samples_in_every_step_count() -> None:
    """Six steps are left at one of their six sigmas, two at one of their two."""
    cfg, seen = config(), set()
    cfg.schedule = cfg.schedule.model_copy(update={"num_steps": 6, "step_counts": [2]})
    for seed in range(40):
        nets = make_nets()
        dmd_bs_loss(nets, make_batch(make_effect_cond(2, rng(1))), cfg, draws(2, seed))
        levels = [float(sigma[0]) for _, sigma, *_ in nets.student.calls]
        fitting = [n for n in (6, 2) if few_step_sigmas(n, cfg.schedule.shift)[: len(levels)].tolist() == levels]
        assert fitting
        seen |= set(fitting if len(fitting) == 1 else ())
    assert seen == {6, 2}


def test_student_samples_are_left_where_imitation_has_no_part() -> None:
    """One rollout and several together end at every step that is not below the bound, and at no other."""
    cfg = config()
    cfg.schedule = cfg.schedule.model_copy(update={"num_steps": 4, "step_counts": None})
    cfg.objective = cfg.objective.model_copy(update={"imitation_below": 0.8, "critic_target_share": 0.0})
    batch, alone, together = make_batch(make_effect_cond(2, rng(1))), set(), set()
    for seed in range(20):
        nets = make_nets()
        dmd_bs_loss(nets, batch, cfg, draws(2, seed))
        alone.add(len(nets.student.calls))
        nets = make_nets()
        critic_samples(nets, [batch, batch], cfg, [draws(2, seed), draws(2, 100 + seed)])
        together.add(len(nets.student.calls))
    assert alone == together == {1, 2}  # sigma 1 and .9


def test_critic_loss_is_least_for_the_exact_critic() -> None:
    # The student is a point mass at its source; the exact critic points there.
    def point_mass(x: Tensor, sigma: Tensor, cond: WorldCond) -> Tensor:
        return (x - cond.source[:, None]) / sigma.view(-1, 1, 1)

    batch = make_batch(make_cond(64, rng()))
    for seed in range(4):
        exact, _ = critic_loss(
            make_nets(student=point_mass, critic=point_mass), batch, config(), draws(batch.batch_size, seed)
        )
        off, _ = critic_loss(make_nets(student=point_mass), batch, config(), draws(batch.batch_size, seed))
        assert exact < 1e-5 and off > 0.01


# Laws of sigma.


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_critic_loss_draws_sigma_over_the_whole_range_shifted(shift: float) -> None:
    nets, batch = make_nets(), make_batch(make_cond(20_000, rng()))
    critic_loss(nets, batch, config(critic_sigma_shift=shift), draws(batch.batch_size))
    sigma = nets.critic.calls[0][1]
    at = torch.tensor([0.0, 0.1, 0.5, 0.9, 1.0], dtype=torch.float64)
    torch.testing.assert_close(sigma.double().quantile(at), shift_sigma(at, shift), rtol=0, atol=0.015)


def test_c2f_do_loss_anchors_above_the_dmd_sigma_of_the_same_step() -> None:
    nets, batch = make_nets(), make_batch(make_effect_cond(500, rng()))
    c2f_do_loss(nets, batch, config("authors", dmd_ts_weight=0.0), draws(batch.batch_size))
    sigma_anchor, sigma_dmd = nets.student.calls[0][1], nets.critic.calls[0][1]
    assert (sigma_anchor >= shift_sigma(sigma_dmd, 3.0) - 1e-6).all()
    assert not (sigma_anchor >= shift_sigma(sigma_dmd.roll(1), 3.0)).all()

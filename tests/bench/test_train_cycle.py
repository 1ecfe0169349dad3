"""The authors' schedule of `bench/`: its cost by hooks, and that it computes what clora computes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.training.authors_schedule import (
    AuthorsSchedule,
    CriticDraws,
    GeneratorDraws,
    Noise,
    RolloutDraws,
    draw_generator,
)
from bench.training.cycle_counts import STREAMS, Work, counted, rehearse, updates_of
from bench.training.cycle_models import SIZES, make_authors, make_data, make_ours, narrow, steps_of
from bench.training.train_cycle import flops, matmul_ceiling, row, time_cycles
from clora.distill.step import Distillation, full_step, networks_at
from clora.method.flow import few_step_sigmas, shift_sigma
from clora.method.given import CriticSample, DistillBatch
from clora.method.noise import Draws
from clora.method.objective import critic_loss, total_loss_terms
from clora.method.routing import Stream
from clora.training.optimizer import AdamW
from tests.support.losses import total_loss

SMALL = replace(narrow(SIZES["tiny"]), grid=(2, 2), text_tokens=3)
TWO_LAYERS = replace(SMALL, transformer={**SMALL.transformer, "num_layers": 2})


def test_both_schedules_do_the_work_that_is_claimed() -> None:
    rehearsal = rehearse(SMALL, "cpu", rehearsals=1)
    assert rehearsal.counts == {
        "ours": {
            "effect_generator": Work(12.5, 3),
            "general_generator": Work(7.5, 1),
            "critic": Work(5.5, 1),
        },
        "authors": {
            "effect_generator": Work(16, 3),
            "general_generator": Work(16, 3),
            "critic": Work(9, 1),
        },
    }
    assert rehearsal.cycle("ours", "effect") == Work(40, 8) and rehearsal.cycle("ours", "general") == Work(35, 6)
    assert rehearsal.cycle("authors", "effect") == rehearsal.cycle("authors", "general") == Work(61, 8)


def test_updates_of_cuts_after_each_update() -> None:
    events = [("forward", 1), ("backward", 1), ("forward", 2), ("backward", 1), ("update", 0), ("forward", 1)]
    assert updates_of([*events, ("backward", 1), ("update", 0)]) == [Work(3, 2), Work(1, 1)]


def test_critic_reuse_saves_the_last_critic_updates_rollout(monkeypatch: pytest.MonkeyPatch) -> None:
    """The critic then learns from the very samples that the student is judged by, which keep their grad."""
    data = make_data(narrow(SIZES["tiny"]), critic_updates=2)
    train = data.config.train.model_copy(update={"critic_reuse": True})
    ours = make_ours(replace(data, config=data.config.model_copy(update={"train": train})), "cpu")
    given: list[tuple[DistillBatch, Tensor | None]] = []

    def watched_critic_loss(nets: Any, batch: DistillBatch, cfg: Any, draws: Any, sample: CriticSample) -> Any:
        given.append((batch, sample.x0))
        return critic_loss(nets, batch, cfg, draws, sample)

    def watched_terms(nets: Any, batch: DistillBatch, cfg: Any, draws: Any, x0: Tensor, *more: Any) -> Any:
        given.append((batch, x0))
        return total_loss_terms(nets, batch, cfg, draws, x0, *more)

    monkeypatch.setattr("clora.distill.step.critic_loss", watched_critic_loss)
    monkeypatch.setattr("clora.distill.step.total_loss_terms", watched_terms)
    rollouts = set()
    for step in range(30):
        with counted([ours.models.backbone.transformer], [ours.student, ours.critic]) as events:
            full_step(ours, step)
        first, last, student = updates_of(events)
        assert first.backwards == last.backwards == 1
        assert student == (Work(8, 3) if ours.batches.stream(step) == "effect" else Work(3, 1))
        rollouts.add(last.forwards)
        assert given[0][1] is not None and not given[0][1].requires_grad
        assert given[1][1] is not None and given[1][1].requires_grad
        assert given[1][0] is given[2][0] and given[1][1] is given[2][1]
        given.clear()
    assert rollouts == {float(k + 1) for k in range(1, 9)}


def test_joint_forwards_compute_what_separate_ones_do() -> None:
    """Critic and teacher, and the critics' rollouts: the same figures and updates from fewer forwards of as many
    samples."""
    results, calls, samples = [], [], []
    for joint_tokens in (0, 512):
        ours = replace(make_ours(make_data(TWO_LAYERS, critic_updates=3), "cpu"), joint_tokens=joint_tokens)
        figures: list[dict[str, Tensor]] = []
        with counted([ours.models.backbone.transformer], []) as events:
            for stream in STREAMS:
                figures.append(full_step(ours, next(steps_of(ours.batches, stream))))
        forwards = [count for kind, count in events if kind == "forward"]
        calls.append(len(forwards))
        samples.append(sum(forwards))
        results.append([*(value for of in figures for value in of.values()), *ours.student.parameters.values()])
    assert samples[0] == samples[1] and calls[1] < 0.75 * calls[0]
    for apart, together in zip(*results, strict=True):
        torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-5)


# Where the schedules coincide the losses agree: same weights, same noise.


@pytest.fixture
def both() -> tuple[Distillation, AuthorsSchedule]:
    data = make_data(TWO_LAYERS, critic_updates=1)
    ours, authors = make_ours(data, "cpu"), make_authors(data, "cpu")
    authors.sigmas = tuple(few_step_sigmas().tolist())  # ours are not cut to thousandths
    return ours, authors


def first_steps(ours: Distillation, stream: Stream) -> list[int]:
    steps = steps_of(ours.batches, stream)
    return [next(steps) for _ in range(3)]


def draws_of(step: int) -> Draws:
    return Draws.alone(torch.Generator().manual_seed(step), 1)


class Replay:
    """The draws of clora's objective once more, in its order."""

    def __init__(self, batch: DistillBatch, seed: int) -> None:
        self.shape = (batch.batch_size, *batch.latent_shape)
        self.rng = torch.Generator().manual_seed(seed)

    def uniform(self) -> Tensor:
        return torch.rand(self.shape[0], generator=self.rng)

    def normal(self) -> Tensor:
        return torch.randn(self.shape, generator=self.rng)

    def noise(self, sigma: Tensor) -> Noise:
        return Noise(sigma, self.normal())

    def rollout(self) -> RolloutDraws:
        step = int(torch.randint(8, (), generator=self.rng))
        needed = [self.normal() for _ in range(step + 1)]
        # What the steps after the exit make of their noise is used by nobody.
        return RolloutDraws(step, (*needed, *(torch.zeros(self.shape) for _ in range(7 - step))))

    def effect(self) -> GeneratorDraws:
        sigma = shift_sigma(self.uniform(), 3.0)
        ta_fm = self.noise(shift_sigma(sigma + (1 - sigma) * self.uniform(), 3.0))
        chosen = torch.randint(5, (self.shape[0],), generator=self.rng)
        y = self.noise(few_step_sigmas()[3:][chosen])
        ts = self.noise(shift_sigma(0.5 + 0.5 * self.uniform(), 3.0))
        return GeneratorDraws(rollout=self.rollout(), bs=self.noise(sigma), y=y, ts=ts, ta_fm=ta_fm)

    def general(self) -> GeneratorDraws:
        rollout = self.rollout()
        bs = self.noise(shift_sigma(self.uniform(), 3.0))
        return GeneratorDraws(rollout=rollout, bs=bs, y=bs, ts=bs, ta_fm=bs)

    def critic(self) -> CriticDraws:
        return CriticDraws(self.rollout(), self.noise(shift_sigma(self.uniform(), 3.0)))


def assert_same_gradients(group: AdamW, model: torch.nn.Module) -> None:
    """clora's stacked adapter of one slot against PEFT's; forgets the former."""
    largest = 0.0
    for name in group.parameters:
        module, _, part = name.split(".", 1)[1].rpartition(".")
        theirs = getattr(model.get_submodule(module), f"lora_{part}")["default"].weight.grad
        grad = group.flat.gradient(name)
        assert (grad is None) == (theirs is None)
        if grad is None:  # the last block's text ends nowhere
            continue
        torch.testing.assert_close(grad[0], theirs, rtol=1e-3, atol=1e-6)
        largest = max(largest, float(grad.abs().max()))
    assert largest > 1e-4
    group.flat.forget_gradients()


@pytest.mark.parametrize("stream", ["effect", "general"])
def test_generator_losses_agree(both: tuple[Distillation, AuthorsSchedule], stream: Stream) -> None:
    ours, authors = both
    effects = set()
    for step in first_steps(ours, stream):
        batch, _ = ours.batches.draw(step, stream, "student")
        effects.add(batch.teacher_cond.effects[0])
        loss, figures = total_loss(networks_at(ours, step), batch, ours.config, draws_of(step))
        their_draws = getattr(Replay(batch, step), stream)()
        their_loss, terms = authors.generator_loss(batch, their_draws)
        torch.testing.assert_close(loss, their_loss, rtol=1e-4, atol=1e-6)
        for name in ("dmd_bs", "dmd_ts", "ta_fm") if stream == "effect" else ("dmd_bs",):
            torch.testing.assert_close(figures[f"{name}_loss"], terms[name].detach(), rtol=1e-4, atol=1e-6)
        loss.backward()
        their_loss.backward()
        assert_same_gradients(ours.student, authors.student)
        authors.student.zero_grad()
    assert len(effects) == (2 if stream == "effect" else 1)  # the teacher was switched


def test_critic_losses_agree(both: tuple[Distillation, AuthorsSchedule]) -> None:
    ours, authors = both
    for step in first_steps(ours, "effect"):
        batch, _ = ours.batches.draw(step, "effect", "critic")
        loss, _ = critic_loss(networks_at(ours, step), batch, ours.config, draws_of(step))
        their_loss = authors.critic_loss(batch, Replay(batch, step).critic())
        torch.testing.assert_close(loss, their_loss, rtol=1e-4, atol=1e-6)
        loss.backward()
        their_loss.backward()
        assert_same_gradients(ours.critic, authors.critic)
        authors.critic.zero_grad()


def test_generator_update_moves_the_students_adapter_alone(both: tuple[Distillation, AuthorsSchedule]) -> None:
    ours, authors = both
    models = {"student": authors.student, "critic": authors.critic}
    before = {name: {k: v.clone() for k, v in model.state_dict().items()} for name, model in models.items()}
    batch, _ = ours.batches.draw(first_steps(ours, "effect")[0], "effect", "student")
    shape = (batch.batch_size, *batch.latent_shape)
    authors.generator_update(batch, draw_generator(shape, torch.Generator().manual_seed(0)))
    moved = {
        f"{name}.{key}"
        for name, model in models.items()
        for key, value in model.state_dict().items()
        if not torch.equal(value, before[name][key])
    }
    assert moved and all(name.startswith("student.") and ".lora_" in name for name in moved)


# Figures.


def test_flops_of_the_real_transformer_at_1024_pixels() -> None:
    """118.3 TFLOP in linear layers and 55.9 in attention, for 8192 image and 512 text tokens; counted at one layer
    and at two, for all layers are alike."""
    size = SIZES["full-width-60"]
    one, two = (flops(replace(size, transformer={"num_layers": layers})).forwards for layers in (1, 2))
    assert one + 59 * (two - one) == pytest.approx(174.2e12, rel=1e-3)


def test_row_counts_the_work_of_a_schedule_against_the_ceiling() -> None:
    got = row(SMALL, Work(10, 2), [1.0, 2.0, 3.0], flops_of=Work(3e12, 5e12), ceiling=40e12)
    assert got["median_s"] == 2.0 and got["model_tflop"] == 40.0 and got["utilisation"] == 0.5
    assert got["tokens_per_s"] == 6 * SMALL.sequence / 2


def test_time_cycles_times_every_schedule_and_stream() -> None:
    steps: dict[Stream, list[int]] = {"effect": [1, 1, 1], "general": [20, 20, 20]}
    seconds = time_cycles(SMALL, ["lean", "exact", "authors"], steps, rounds=2, device="cpu")
    assert all(len(times) == 2 and min(times) > 0 for of in seconds.values() for times in of.values())
    assert matmul_ceiling(SMALL, "cpu") > 0

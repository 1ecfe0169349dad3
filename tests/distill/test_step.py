"""A step's order and wiring: who is updated when, from which gradients, at which rate."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from clora.distill.batches import Batches
from clora.distill.check import check_training
from clora.distill.roles import ACCELERATION, CRITIC, STUDENT
from clora.distill.run import make_distillation, open_bank
from clora.distill.step import Distillation, coarse_step, full_step, networks_at, start_critic, train_step
from clora.distill.targets import targets_from_pairs
from clora.distill.workspace import open_workspace
from clora.errors import NonFiniteError
from clora.method.objective import noise_anchor
from clora.training.optimizer import apply_gradients
from tests.support.golden import make_config, write_inputs
from tests.support.mutants import ROOT, read_mutants


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


def make(inputs: Path, case: str = "paper-full", objective: dict[str, Any] | None = None, **train: Any) -> Distillation:
    config = make_config(inputs, inputs / "out", case).with_values(train=train, objective=objective or {})
    workspace = open_workspace(check_training(config), Console(quiet=True))
    workspace = replace(workspace, effects=targets_from_pairs(workspace.effects))
    return make_distillation(workspace, open_bank(workspace))


def values_of(d: Distillation) -> dict[str, dict[str, Tensor]]:
    return {
        name: {key: value.clone() for key, value in group.fp32_parameters().items()}
        for name, group in ((STUDENT, d.student), (CRITIC, d.critic))
    }


def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> bool:
    return any(not torch.equal(value, after[key]) for key, value in before.items())


@pytest.mark.parametrize("case", ["paper-full", "tiny-full"])
def test_full_step_updates_the_critic_so_often_and_then_the_student(
    inputs: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    """Also with `critic_reuse`, which tiny has: no update of one moves the other."""
    d = make(inputs, case, critic_updates=3)
    calls: list[tuple[str, str]] = []

    def apply(group: Any, factor: float, where: str) -> float:
        name = STUDENT if group is d.student else CRITIC
        before = values_of(d)
        norm = apply_gradients(group, factor, where)
        after = values_of(d)
        assert moved(before[name], after[name])
        other = CRITIC if name == STUDENT else STUDENT
        assert not moved(before[other], after[other])
        calls.append((name, where))
        return norm

    monkeypatch.setattr("clora.distill.step.apply_gradients", apply)
    step = next(step for step in range(99) if d.batches.stream(step) == "effect")
    figures = full_step(d, step)
    assert [name for name, _ in calls] == [CRITIC] * 3 + [STUDENT]
    assert all(where.startswith(f"step {step} ({name}, effect stream: ") for name, where in calls)
    assert {"critic_loss", "critic_grad_norm", "effect/total_loss", "effect/student_grad_norm"} <= figures.keys()
    weights = {term: getattr(d.config.objective, f"{term}_weight") for term in ("ta_fm", "dmd_ts", "dmd_bs")}
    assert {term for term in weights if f"effect/{term}_loss" in figures} == {t for t, w in weights.items() if w}
    total = sum(weight * figures[f"effect/{term}_loss"] for term, weight in weights.items() if weight)
    torch.testing.assert_close(figures["effect/total_loss"], total)


IMITATION = {"imitation_weight": 2.0, "ta_fm_weight": 0.0, "dmd_ts_weight": 0.0, "dmd_bs_weight": 0.0}


@pytest.mark.parametrize("stream", ["effect", "general"])
def test_full_step_of_imitation_has_no_critic(inputs: Path, stream: str) -> None:
    """One update of the student, against the routed teacher or the base; no slot, optimizer or figure of a critic."""
    d = make(inputs, "paper-full", IMITATION, critic_updates=0)
    assert d.critic is None
    step = next(step for step in range(99) if d.batches.stream(step) == stream)
    before = {key: value.clone() for key, value in d.student.fp32_parameters().items()}
    figures = full_step(d, step)
    assert moved(before, d.student.fp32_parameters())
    assert figures.keys() == {f"{stream}/{n}" for n in ("imitation_loss", "total_loss", "student_grad_norm")}
    torch.testing.assert_close(figures[f"{stream}/total_loss"], 2.0 * figures[f"{stream}/imitation_loss"])


def test_full_step_imitates_below_a_bound_for_effects_alone(inputs: Path) -> None:
    d = make(inputs, "tiny-full", {"imitation_weight": 1.0, "imitation_below": 0.7})
    for stream in ("effect", "general"):
        figures = full_step(d, next(step for step in range(99) if d.batches.stream(step) == stream))
        assert (f"{stream}/imitation_loss" in figures) is (stream == "effect") and f"{stream}/dmd_bs_loss" in figures


def test_same_step_teachers_are_accelerated_and_stay_as_they_are(inputs: Path) -> None:
    d = make(inputs, "clora-full", IMITATION | {"imitation": "same_step"}, critic_updates=0)
    batch, _ = d.batches.draw(0, "effect", "student")
    x, sigma = torch.randn(batch.batch_size, *batch.latent_shape), torch.full((batch.batch_size,), 0.5)
    few = networks_at(d, 0).few_step_teacher
    assert few is not None
    slots = [(slot, ACCELERATION) for slot in d.models.teacher_slots(batch.teacher_cond.effects)]
    with torch.no_grad():
        start, plain = few(x, sigma, batch.teacher_cond), networks_at(d, 0).teacher(x, sigma, batch.teacher_cond)
        wanted = d.models.backbone.velocity(x, sigma, batch.teacher_cond, slots)
        torch.testing.assert_close(start, wanted)
        assert float((start - plain).abs().max()) > 0.01
    for step in range(2):
        full_step(d, step)
    with torch.no_grad():
        torch.testing.assert_close(few(x, sigma, batch.teacher_cond), start, rtol=0, atol=0)
        moved_on = d.models.backbone.velocity(x, sigma, batch.teacher_cond, slots)
    assert float((moved_on - start).abs().max()) > 1e-4  # the student's own acceleration LoRA learned


def test_coarse_step_leaves_the_critic_alone(inputs: Path) -> None:
    d = make(inputs, "paper-coarse")
    before = values_of(d)
    figures = coarse_step(d, 0)
    after = values_of(d)
    assert moved(before[STUDENT], after[STUDENT]) and not moved(before[CRITIC], after[CRITIC])
    assert figures.keys() == {"ta_fm_loss", "student_grad_norm"}


def test_coarse_step_follows_the_velocity_of_each_samples_teacher(
    inputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    d = make(inputs, "paper-coarse", {"guidance": 1.0}, coarse_target="velocity")
    prefetched: list[list[str | None]] = []
    monkeypatch.setattr("clora.lora.bank.TeacherBank.prefetch", lambda bank, effects: prefetched.append(effects))
    ((batch, draws),) = list(d.batches.of_student(0, "effect", "coarse"))
    _, query = noise_anchor(batch.y, batch.student_cond, d.config, draws, None)  # type: ignore[arg-type]
    with torch.no_grad():
        student = d.models.backbone.velocity(*query, [STUDENT])
        slots = d.models.teacher_slots(batch.teacher_cond.effects)
        teacher = d.models.backbone.velocity(query.x_sigma, query.sigma, batch.teacher_cond, slots)
    figures = coarse_step(d, 0)
    assert figures.keys() == {"velocity_loss", "student_grad_norm"} and len(set(slots)) > 1
    torch.testing.assert_close(figures["velocity_loss"], (student - teacher).square().mean())
    assert prefetched == [[*d.batches.teachers(0), *d.batches.teachers(1)]] and prefetched[0]


def test_train_step_starts_the_critic_from_the_coarse_student(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the first full step and no other; the acceleration LoRA joins the student there, and learns."""
    d = make(inputs, "clora-full", coarse_steps=2)
    started: list[int] = []
    seen: list[str] = []
    monkeypatch.setattr("clora.distill.step.start_critic", lambda *given: started.append(1) or start_critic(*given))
    monkeypatch.setattr("clora.distill.step.full_step", lambda given, step: seen.append(f"full {step}") or {})
    monkeypatch.setattr("clora.distill.step.coarse_step", lambda given, step: seen.append(f"coarse {step}") or {})
    with torch.no_grad():
        for value in d.student.parameters.values():
            value.add_(0.1)
    for step in range(4):
        train_step(d, step)
    assert seen == ["coarse 0", "coarse 1", "full 2", "full 3"] and started == [1]
    student, critic = d.student.fp32_parameters(), d.critic.fp32_parameters()
    assert all(torch.equal(value, student[key.replace(CRITIC, STUDENT, 1)]) for key, value in critic.items())
    batch, _ = d.batches.draw(2, "effect", "student")
    x_sigma, sigma = torch.randn(batch.batch_size, *batch.latent_shape), torch.full((batch.batch_size,), 0.5)
    early, late = (networks_at(d, step) for step in (1, 2))
    query = (x_sigma, sigma, batch.student_cond)
    with torch.no_grad():
        torch.testing.assert_close(early.student(*query), late.critic(*query), rtol=1e-4, atol=1e-5)
        assert float((late.student(*query) - early.student(*query)).abs().max()) > 0.01
    assert any(key.startswith(f"{ACCELERATION}.") for key in d.student.parameters)


def gradients(d: Distillation, monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """The student's of a coarse step, which is not made."""
    found: dict[str, Tensor] = {}

    def keep(group: Any, factor: float, where: str) -> float:
        for name in group.parameters:
            if (grad := group.flat.gradient(name)) is not None:
                found[name] = grad.clone()
        group.flat.forget_gradients()
        return 0.0

    monkeypatch.setattr("clora.distill.step.apply_gradients", keep)
    coarse_step(d, 0)
    monkeypatch.undo()
    return found


def test_accumulated_gradient_is_the_mean_over_the_batches(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    d = make(inputs, "paper-coarse", gradient_accumulation_steps=2)
    both = gradients(d, monkeypatch)
    whole, parts = d.batches, []
    for part in range(2):

        def one(batches: Batches, step: int, stream: Any, role: Any, part: int = part) -> Any:
            return iter([whole.draw(step, stream, role, part, 2)])

        monkeypatch.setattr(Batches, "of_student", one)
        single = replace(d, config=d.config.with_values(train={"gradient_accumulation_steps": 1}))
        parts.append(gradients(single, monkeypatch))
    assert both.keys() == parts[0].keys() and any(bool(value.any()) for value in both.values())
    for name, value in both.items():
        torch.testing.assert_close(value, (parts[0][name] + parts[1][name]) / 2, rtol=1e-4, atol=1e-8)
        assert not value.any() or not torch.equal(parts[0][name], parts[1][name])


def test_full_step_prefetches_this_step_and_the_next(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    d = make(inputs)
    asked: list[list[str | None]] = []
    monkeypatch.setattr("clora.lora.bank.TeacherBank.prefetch", lambda bank, effects: asked.append(effects))
    step = next(n for n in range(99) if d.batches.stream(n) == d.batches.stream(n + 1) == "effect")
    full_step(d, step)
    assert asked == [[*d.batches.teachers(step), *d.batches.teachers(step + 1)]]
    assert len(asked[0]) == 4


@pytest.mark.parametrize("name", [CRITIC, STUDENT])
def test_a_loss_that_is_not_finite_moves_nothing_and_names_the_samples(
    inputs: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    d = make(inputs, critic_updates=1)
    loss_of = {CRITIC: "critic_loss", STUDENT: "dmd_bs_loss"}[name]
    place = {CRITIC: "clora.distill.step", STUDENT: "clora.method.objective"}[name]
    real = getattr(__import__(place, fromlist=[loss_of]), loss_of)

    def poisoned(*given: Any) -> Any:
        loss, figures = real(*given)
        return loss * torch.nan, figures

    monkeypatch.setattr(f"{place}.{loss_of}", poisoned)
    step = next(step for step in range(99) if d.batches.stream(step) == "effect")
    before = values_of(d)
    batch, _ = d.batches.draw(step, "effect", "critic" if name == CRITIC else "student")
    with pytest.raises(NonFiniteError) as caught:
        full_step(d, step)
    assert f"step {step} ({name}, effect stream: {', '.join(sorted(batch.samples))})" in str(caught.value)
    assert not moved(before[name], values_of(d)[name])


def test_mutants_are_of_texts_that_there_are() -> None:
    """Where `python -m tests.support.mutants` changes the code; a table that has fallen behind says so here."""
    for mutant in read_mutants():
        assert (ROOT / mutant.file).read_text(encoding="utf-8").count(mutant.old) == 1, mutant.name
        assert all((ROOT / path).exists() for path in mutant.tests.split()), mutant.name

"""The whole training path on a small random base: teach, cache, distil, resume, accelerate, evaluate."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

import clora.jobs.train
import clora.training.optimizer as optimizer
from clora.config import Config, acceleration_of
from clora.distill.check import check_teaching
from clora.distill.step import train_step
from clora.distill.targets import targets_from_pairs
from clora.distill.workspace import open_workspace
from clora.errors import InputError, InputErrors
from clora.jobs.eval import evaluate_collection
from clora.jobs.teach import teach
from clora.jobs.train import make_caches, train
from clora.lora.bank import TeacherBank
from clora.lora.catalogue import read_catalogue
from clora.lora.files import read_lora
from clora.training.device import base_dtype, determinism
from clora.training.tracker import read_log
from tests.support.small_job import NAMES, make_config, write_dataset


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def taught(random_base: Path, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output folder whose teachers are taught."""
    out = tmp_path_factory.mktemp("out") / "run"
    files = teach(make_config(random_base, dataset, out))
    assert set(files) == set(NAMES)
    return out


def test_teach_side_by_side_equals_alone(random_base: Path, dataset: Path, taught: Path, tmp_path: Path) -> None:
    """Side by side, an effect's teacher is what its own samples make of it: the other slot changes nothing."""
    other = make_config(random_base, dataset, tmp_path / "run")
    swapped = [e.model_copy(update={"pairs": dataset / NAMES[0]}) if e.name == NAMES[1] else e for e in other.effects]
    teach(other.model_copy(update={"effects": swapped}))
    for name, same in ((NAMES[0], True), (NAMES[1], False)):
        first = read_lora(taught / "teachers" / f"{name}.safetensors").modules
        second = read_lora(tmp_path / "run" / "teachers" / f"{name}.safetensors").modules
        distance = max(float((first[m].B - second[m].B).abs().max()) for m in first)
        assert distance < 1e-5 if same else distance > 1e-3


@pytest.mark.parametrize("coarse_optimizer", ["adamw", "muon"])
def test_train_writes_a_collection_and_resumes_bitwise_equal(
    random_base: Path,
    dataset: Path,
    taught: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    coarse_optimizer: str,
) -> None:
    lora = [{"name": n, "lora": str(taught / "teachers" / f"{n}.safetensors")} for n in NAMES]

    def config(out: Path) -> Config:
        # Any LoRA may join the student after the coarse steps.
        given = (f"student.acceleration={lora[0]['lora']}", f"train.coarse_optimizer={coarse_optimizer}")
        made = make_config(random_base, dataset, out, *given)
        effects = [e.model_copy(update={"lora": Path(row["lora"])}) for e, row in zip(made.effects, lora, strict=True)]
        return made.model_copy(update={"effects": effects})

    whole = train(config(tmp_path / "whole"))
    catalogue = read_catalogue(whole)
    assert [entry.name for entry in catalogue.effects] == list(NAMES)
    assert len({entry.trigger for entry in catalogue.effects}) == 2
    assert catalogue.schedule.num_steps == 3
    assert (tmp_path / "whole" / "train" / "samples" / "samples-000003.png").exists()

    # Killed after the fourth step without a chance to save: the checkpoint of step 4 is the newest.
    apply, calls = optimizer.apply_gradients, iter(range(1000))

    def die(*arguments: Any) -> float:
        if next(calls) == 2 + 2 * 3 + 1:
            raise KeyboardInterrupt
        return apply(*arguments)

    monkeypatch.setattr("clora.distill.step.apply_gradients", die)
    with pytest.raises(KeyboardInterrupt):
        train(config(tmp_path / "split"))
    monkeypatch.setattr("clora.distill.step.apply_gradients", apply)
    resumed = train(config(tmp_path / "split"), resume="latest")
    first, second = read_lora(whole).modules, read_lora(resumed).modules
    assert all(torch.equal(first[m].A, second[m].A) and torch.equal(first[m].B, second[m].B) for m in first)
    assert any(bool(first[m].B.abs().max() > 0) for m in first)
    losses = [
        [{k: v for k, v in row.items() if k != "seconds"} for row in read_log(tmp_path / name / "train")]
        for name in ("whole", "split")
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 6


def test_train_gives_muon_the_coarse_steps_of_the_student_alone(
    random_base: Path, dataset: Path, taught: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    muon, used = optimizer.AdamW._muon, []

    def by_muon(self: optimizer.AdamW, learning_rate: float) -> None:
        used.append((next(iter(self.parameters)).split(".")[0], self.updates))
        muon(self, learning_rate)

    monkeypatch.setattr(optimizer.AdamW, "_muon", by_muon)
    for name in ("adamw", "muon"):
        made = make_config(random_base, dataset, tmp_path / name, f"train.coarse_optimizer={name}")
        train(with_teachers(made, taught))
        coarse = made.train.coarse_steps if name == "muon" else 0
        assert used == [("student", step) for step in range(coarse)]
    assert used


def test_prefetch_foresees_every_teacher_and_changes_no_bit(
    random_base: Path, dataset: Path, taught: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One slot, no cache, both stages: with and without the bank's work ahead the same log and file."""
    slots_for, prefetch = TeacherBank.slots_for, TeacherBank.prefetch
    before = bank_threads()
    foreseen: list[set[str | None]] = []
    asked: list[tuple[int, set[str | None]]] = []

    def ahead(bank: TeacherBank, effects: Sequence[str | None]) -> None:
        foreseen.append(set(effects))
        prefetch(bank, effects)

    def ask(bank: TeacherBank, effects: Sequence[str | None]) -> tuple[str | None, ...]:
        if foreseen:  # the steps have begun
            asked.append((len(foreseen) - 1, set(effects) - {None}))
        return slots_for(bank, effects)

    def run(name: str) -> Path:
        one_at_a_time = ("train.teacher_slots=1", "train.teacher_cache_gb=0", "train.batch_size=1",
                         "train.anchor_batch_size=1", "train.coarse_target=velocity")  # fmt: skip
        config = make_config(random_base, dataset, tmp_path / name, *one_at_a_time, "objective.p_switch=0.8")
        lora = {e.name: taught / "teachers" / f"{e.name}.safetensors" for e in config.effects}
        effects = [effect.model_copy(update={"lora": lora[effect.name]}) for effect in config.effects]
        return train(config.model_copy(update={"effects": effects}))

    monkeypatch.setattr(TeacherBank, "slots_for", ask)
    monkeypatch.setattr(TeacherBank, "prefetch", ahead)
    with_prefetch = run("with")
    assert len(foreseen) == 6 and {name for _, names in asked for name in names} == set(NAMES)
    assert all(names <= foreseen[step] and (step == 0 or names <= foreseen[step - 1]) for step, names in asked)
    monkeypatch.setattr(TeacherBank, "prefetch", lambda bank, effects: None)
    without = run("without")
    assert with_prefetch.read_bytes() == without.read_bytes()
    logs = [read_log(path.parent / "train") for path in (with_prefetch, without)]
    assert [row | {"seconds": 0} for row in logs[0]] == [row | {"seconds": 0} for row in logs[1]]
    assert bank_threads() <= before


def bank_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("teachers")}


def test_acceleration_joins_after_the_coarse_steps(
    random_base: Path, dataset: Path, taught: Path, tmp_path: Path
) -> None:
    """After coarse steps alone the file is their student plus the given LoRA; a full step then moves both."""
    given = taught / "teachers" / "warm.safetensors"
    deltas = []
    for name, overrides in {
        "alone": ("train.coarse_steps=2",),
        "joined": ("train.coarse_steps=2", f"student.acceleration={given}"),
        "moved": ("train.coarse_steps=1", f"student.acceleration={given}"),
    }.items():
        config = make_config(random_base, dataset, tmp_path / name, "train.max_train_steps=2", *overrides)
        lora = {e.name: taught / "teachers" / f"{e.name}.safetensors" for e in config.effects}
        effects = [effect.model_copy(update={"lora": lora[effect.name]}) for effect in config.effects]
        modules = read_lora(train(config.model_copy(update={"effects": effects}))).modules
        deltas.append({module: update.delta() for module, update in modules.items()})
    alone, joined, moved = deltas
    for module, update in read_lora(given).modules.items():
        expected = alone[module] + update.delta()  # up to the file's bfloat16
        assert float((joined[module] - expected).norm()) <= 0.01 * float(expected.norm())
    assert max(float((joined[m] - moved[m]).norm()) for m in joined) > 1e-3


@pytest.mark.parametrize("section", ["student", "targets"])
def test_acceleration_of_a_base_that_brings_none_is_an_error(
    section: Literal["student", "targets"], random_base: Path, dataset: Path, tmp_path: Path
) -> None:
    asked = f"{section}.acceleration=base"
    config = make_config(random_base, dataset, tmp_path / "run", asked)
    with pytest.raises(InputError, match=rf"{section}\.acceleration: .* brings no acceleration LoRA"):
        acceleration_of(config, section)
    assert acceleration_of(make_config(random_base, dataset, tmp_path, asked, effects=False), section) is None


def test_acceleration_of_targets_is_none_where_pairs_bring_them(
    random_base: Path, dataset: Path, tmp_path: Path
) -> None:
    asked = ("targets.acceleration=base", "targets.source=pairs")
    assert acceleration_of(make_config(random_base, dataset, tmp_path, *asked), "targets") is None


def test_train_stops_at_a_loss_that_is_not_finite_and_names_the_samples(
    random_base: Path, dataset: Path, taught: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An infinite target of one effect: the step, stream, effect and image are named, and nothing is written."""
    config = make_config(random_base, dataset, taught, f"output_dir={tmp_path / 'run'}", "train.anchor_batch_size=6")
    lora = {e.name: taught / "teachers" / f"{e.name}.safetensors" for e in config.effects}
    effects = [effect.model_copy(update={"lora": lora[effect.name]}) for effect in config.effects]
    targets_of = clora.jobs.train.targets_of

    def poisoned(*arguments: Any) -> Any:
        made = targets_of(*arguments)
        for example in made["cold"]:
            example.y[0].fill_(torch.inf)
        return made

    monkeypatch.setattr(clora.jobs.train, "targets_of", poisoned)
    before = bank_threads()
    with pytest.raises(optimizer.NonFiniteError, match=r"step 0 \(student, effect stream: cold on \d\.png.*, warm on"):
        train(config.model_copy(update={"effects": effects}))
    assert bank_threads() <= before
    assert not (tmp_path / "run" / "collection.safetensors").exists()


def test_train_without_effects_makes_an_acceleration_lora(random_base: Path, dataset: Path, tmp_path: Path) -> None:
    config = make_config(random_base, dataset, tmp_path / "run", "train.max_train_steps=2", effects=False)
    path = train(config)
    assert path.name == "acceleration.safetensors"
    modules = read_lora(path).modules
    assert any(bool(m.B.abs().max() > 0) for m in modules.values())


def test_make_caches_encodes_nothing_twice(
    random_base: Path, dataset: Path, taught: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(random_base, dataset, taught)
    assert make_caches(config) == {"warm": 3, "cold": 3, "general": 3}

    def refuse(*_: Any) -> Any:
        raise AssertionError("encoded again")

    monkeypatch.setattr("clora.backbones.qwen_image.backbone.QwenImageBackbone.encode_prompts", refuse)
    monkeypatch.setattr("clora.backbones.qwen_image.backbone.QwenImageBackbone.encode_images", refuse)
    monkeypatch.setattr("clora.distill.targets.sample", refuse)
    make_caches(config)


def test_max_sources_limits_training_and_not_teaching(
    random_base: Path, dataset: Path, taught: Path, tmp_path: Path
) -> None:
    config = make_config(random_base, dataset, taught, "targets.max_sources=2")
    assert make_caches(config) == {"warm": 2, "cold": 2, "general": 3}
    teach_workspace = open_workspace(check_teaching(config, config.effects), Console(stderr=True))
    assert [len(examples) for examples in teach_workspace.effects.values()] == [3, 3]


def test_targets_from_pairs_are_the_pairs_own_targets(
    random_base: Path, dataset: Path, taught: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("clora.distill.targets.sample", None)  # no teacher is asked
    assert make_caches(make_config(random_base, dataset, taught, "targets.source=pairs"))["warm"] == 3
    config = make_config(random_base, dataset, taught)
    workspace = open_workspace(check_teaching(config, config.effects), Console(stderr=True))
    filled = targets_from_pairs(workspace.effects)
    for example in (e for examples in filled.values() for e in examples):
        (y,) = example.y
        assert example.x0 is not None and torch.equal(y, example.x0)
    assert not torch.equal(filled["warm"][0].y[0], filled["cold"][0].y[0])
    lacking = {**filled, "cold": [replace(e, x0=None) for e in filled["cold"]]}
    with pytest.raises(InputErrors, match="effect cold: 3 of its pairs have no target"):
        targets_from_pairs(lacking)


@pytest.mark.parametrize(("fast", "expected"), [(True, torch.bfloat16), (False, torch.float32)])
def test_base_dtype_auto_is_what_the_processor_has(
    monkeypatch: pytest.MonkeyPatch, fast: bool, expected: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: fast)
    assert base_dtype("auto", torch.device("cpu")) == expected
    assert base_dtype("auto", torch.device("cuda")) == torch.bfloat16
    assert base_dtype("float32", torch.device("cpu")) == torch.float32


def test_open_workspace_lists_every_faulty_image(random_base: Path, dataset: Path, tmp_path: Path) -> None:
    broken = tmp_path / "data"
    shutil.copytree(dataset, broken)
    for name in NAMES:
        content = (broken / name / "source" / "1.png").read_bytes()
        (broken / name / "source" / "1.png").write_bytes(content[:200])
    with pytest.raises(InputErrors) as caught:
        teach(make_config(random_base, broken, tmp_path / "run"))
    assert len(caught.value.faults) == 2
    assert all(f"{name}/source/1.png" in fault for name, fault in zip(NAMES, caught.value.faults, strict=True))


def test_evaluate_collection_scores_against_the_targets(
    random_base: Path, dataset: Path, taught: Path, tmp_path: Path
) -> None:
    config = make_config(random_base, dataset, taught, "eval.num_steps=[3,1]")
    path = train(config)
    answer = evaluate_collection(config, path)
    assert set(answer["effects"]) == set(NAMES)
    assert list(answer["mean"]) == ["3", "1"]
    mean = np.mean([row["l1"] for row in answer["effects"].values()])
    assert answer["mean"]["3"]["l1"] == pytest.approx(mean) and 0 < mean < 1
    assert answer["mean"]["1"]["l1"] != answer["mean"]["3"]["l1"] and Path(answer["grid"]).exists()
    assert json.loads((taught / "eval" / "eval.json").read_text()) == answer
    unset = {
        "eval": config.eval.model_copy(update={"num_steps": None}),
        "schedule": config.schedule.model_copy(update={"num_steps": 5}),  # the collection's own are 3
    }
    assert list(evaluate_collection(config.model_copy(update=unset), path)["mean"]) == ["3"]
    with pytest.raises(InputError, match="hot: is not in"):
        renamed = [config.effects[0].model_copy(update={"name": "hot"})]
        evaluate_collection(config.model_copy(update={"effects": renamed}), path)


def with_teachers(config: Config, taught: Path) -> Config:
    lora = {e.name: taught / "teachers" / f"{e.name}.safetensors" for e in config.effects}
    return config.model_copy(update={"effects": [e.model_copy(update={"lora": lora[e.name]}) for e in config.effects]})


def test_train_needs_no_data_once_it_runs(
    random_base: Path, dataset: Path, taught: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Images, cache and (once read) teachers vanish after the first step: the result is the same."""

    def run(out: str, vanish: bool) -> bytes:
        data, teachers = tmp_path / f"{out}-data", tmp_path / f"{out}-teachers"
        shutil.copytree(dataset, data)
        shutil.copytree(taught, teachers)
        config = make_config(random_base, data, tmp_path / out, "train.coarse_steps=0", "objective.p_switch=1")

        def step_and_vanish(distillation: Any, number: int) -> Any:
            figures = train_step(distillation, number)
            if vanish and number == 0:
                for folder in (data, tmp_path / out / "cache", teachers):
                    shutil.rmtree(folder)
            return figures

        monkeypatch.setattr("clora.distill.run.train_step", step_and_vanish)
        return train(with_teachers(config, teachers)).read_bytes()

    assert run("kept", vanish=False) == run("gone", vanish=True)


def test_train_refuses_a_checkpoint_of_other_teachers_or_data(
    random_base: Path, dataset: Path, taught: Path, tmp_path: Path
) -> None:
    data, teachers = tmp_path / "data", tmp_path / "teachers"
    shutil.copytree(dataset, data)
    shutil.copytree(taught, teachers)
    fast = {section: tmp_path / f"{section}.safetensors" for section in ("student", "targets")}
    for path in fast.values():
        shutil.copy(teachers / "teachers" / "cold.safetensors", path)
    given = [f"{section}.acceleration={path}" for section, path in fast.items()]
    config = make_config(random_base, data, tmp_path / "run", "train.max_train_steps=2", *given)
    config = with_teachers(config, teachers)
    train(config)
    record = json.loads((tmp_path / "run" / "run-train.json").read_text())
    assert record["sha256"]["teacher of warm"] == hashlib.sha256(config.effects[0].lora.read_bytes()).hexdigest()  # type: ignore[union-attr]
    assert record["versions"]["torch"] == torch.__version__ and record["config"]["seed"] == config.seed
    saved = json.loads((tmp_path / "run" / "train" / "checkpoint-00000002" / "manifest.json").read_text())["state"]
    assert saved["identity"] == record["sha256"] and saved["record"]["config"] == record["config"]
    shutil.copy(teachers / "teachers" / "cold.safetensors", teachers / "teachers" / "warm.safetensors")
    Image.new("RGB", (64, 64), "red").save(data / "cold" / "target" / "1.png")
    changed = "pairs of cold, student.acceleration, targets.acceleration, teacher of warm changed since"
    for path in fast.values():
        shutil.copy(taught / "teachers" / "warm.safetensors", path)
    with pytest.raises(InputError, match=changed):
        train(config, resume="latest")
    # The record stays that of what lies in the folder.
    assert json.loads((tmp_path / "run" / "run-train.json").read_text()) == record


def test_determinism_holds_inside_alone() -> None:
    def nondeterministic() -> None:
        torch.zeros(3).put_(torch.tensor([0, 0]), torch.tensor([1.0, 2.0]))

    with determinism(True), pytest.raises(RuntimeError, match="deterministic"):
        nondeterministic()
    nondeterministic()
    with determinism(False):
        nondeterministic()


def test_train_under_determinism_gives_the_same(random_base: Path, dataset: Path, taught: Path, tmp_path: Path) -> None:
    def run(out: str, *overrides: str) -> bytes:
        config = make_config(random_base, dataset, tmp_path / out, "train.max_train_steps=4", *overrides)
        return train(with_teachers(config, taught)).read_bytes()

    assert run("plain") == run("strict", "train.deterministic=true")

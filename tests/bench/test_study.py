"""A study at the smallest size: two effects, a handful of updates, everything that `table1` does with it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from rich.console import Console

from bench.lab import scaling, table1
from bench.lab.study import Arm, Row, Study, judge
from clora.config import acceleration_lora
from clora.errors import InputError
from clora.io.safetensors import read_header
from clora.jobs.demo import SCALES, Scale
from clora.lora.files import read_lora, write_lora
from clora.lora.module import LoraModule
from clora.tiny.effects import EFFECTS, apply_effect
from clora.tiny.images import to_uint8
from clora.tiny.world.scenes import render, sample_scene

NAMES = ("sepia", "snow")
SETTINGS = ("teach.max_train_steps=4", "teach.lr_warmup_steps=1", "train.max_train_steps=4", "train.coarse_steps=2",
            "train.ema_start=2", "train.batch_size=2", "train.anchor_batch_size=2", "train.lr_warmup_steps=1",
            "train.learning_rate=0.01", "targets.max_sources=2")  # fmt: skip
RECIPE = ("objective.p_switch=1",)
COLLECTION = Row("collection 0", 2, "consistency")


class Captured(NamedTuple):
    """What `table1.measure` gave its judge."""

    images: dict[str, Any]
    controls: dict[str, str]


def study_in(folder: Path, settings: tuple[str, ...] = SETTINGS, num_pairs: int = 4) -> Study:
    return Study(folder, NAMES, settings, num_pairs, num_scenes=2, console=Console(quiet=True))


def measured(study: Study) -> Captured:
    """The table of one seed in two steps, unjudged."""
    found: list[Captured] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(table1, "judge", lambda *given: found.append(Captured(*given)))
        table1.measure(study, [0], RECIPE, [2])
    return found[0]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Study, Captured]:
    study = study_in(tmp_path_factory.mktemp("study"))
    return study, measured(study)


def times(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def same(one: Any, other: Any, levels: int = 0) -> bool:
    """Whether two rows' images are of the same effects and scenes, and no further apart than so many levels."""
    gaps = [np.abs(np.subtract(one[key], other[key], dtype=int)).max() for key in one]
    return set(one) == set(other) and max(gaps) <= levels


def as_arm(study: Study, name: str, modules: dict[str, LoraModule], like: Path) -> None:
    """A file in an arm's place, asked in the words of another."""
    path = study.arm_file(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_lora(path, modules, read_header(like).metadata, dtype=torch.float32)


def without_effect(modules: dict[str, LoraModule]) -> dict[str, LoraModule]:
    return {name: LoraModule(one.A, torch.zeros_like(one.B), one.alpha) for name, one in modules.items()}


@pytest.mark.slow
def test_measure_makes_nothing_twice(run) -> None:
    study, first = run
    before = times(study.folder)
    again = measured(study_in(study.folder))
    assert times(study.folder) == before and len(before) > 40
    assert again.controls == first.controls and set(again.images) == set(first.images)
    assert all(same(again.images[name], images) for name, images in first.images.items())


@pytest.mark.slow
def test_measure_compares_each_row_with_the_coarse_student_in_as_many_steps(run) -> None:
    """The rows that it shows are the study's own, and the control is there of the same effects and scenes."""
    study, found = run
    control = study.sample([Row("collection 0:coarse", 2, "consistency", accelerated=True)])
    assert {name: other for name, other in found.controls.items() if other in found.images} == {
        name: "coarse+accel, 2" for name in found.images if name != "teachers, as targets"
    }
    assert same(found.images["coarse+accel, 2"], next(iter(control.values())))
    assert same(found.images["collection, 2"], study.sample([COLLECTION])[COLLECTION.name])
    assert not same(found.images["collection, 2"], found.images["coarse+accel, 2"], 10)
    assert len({frozenset(images) for images in found.images.values()}) == 1


@pytest.mark.slow
def test_study_refuses_other_settings_in_the_same_folder(run) -> None:
    study, _ = run
    before = times(study.folder)
    arm = table1.arms(study, 0, RECIPE)[0]
    hot = (*SETTINGS, "teach.learning_rate=1e-3")
    for other in (study_in(study.folder, hot), study_in(study.folder, num_pairs=5)):
        with pytest.raises(InputError, match="teachers: was made by other settings; give another --run"):
            other.teach()
    with pytest.raises(InputError, match="arms/collection 0: was made by other settings"):
        study.train(Arm(arm.name, (*arm.overrides, "train.learning_rate=1e-3")))
    assert times(study.folder) == before


@pytest.mark.slow
def test_sample_takes_each_row_from_its_own_file_and_slot(run, tmp_path) -> None:
    """Of a file without effect and the acceleration LoRA on top the images are those of the acceleration LoRA alone;
    another file in an arm's place gives other images; a teacher without effect changes its own effect's alone."""
    study, found = run
    ignored = shutil.ignore_patterns("samples", "cache")
    shutil.copytree(study.folder, tmp_path / "other", symlinks=True, ignore=ignored)
    other, collection = study_in(tmp_path / "other"), study.arm_file("collection 0")
    fast = read_lora(acceleration_lora("tiny")).modules
    as_arm(other, "collection 0", fast, collection)
    as_arm(other, "nothing", without_effect(fast), collection)
    teacher = read_lora(other.teacher("sepia")).modules
    write_lora(other.teacher("sepia"), without_effect(teacher), dtype=torch.float32)
    rows = [Row("nothing", 2, "consistency"), Row("nothing", 2, "consistency", accelerated=True), COLLECTION]
    made = other.sample([*rows, Row("teacher", 2)])
    nothing, accelerated, replaced, teachers = made.values()
    assert same(replaced, accelerated, 1) and not same(replaced, nothing, 10)
    assert not same(replaced, found.images["collection, 2"], 1)
    before = study.sample([Row("teacher", 2)])["teacher, 2 euler"]
    assert same(before, found.images["teachers, 2"])
    assert {key[0] for key in before if not np.array_equal(before[key], teachers[key])} == {"sepia"}


@pytest.mark.slow
def test_arms_gives_the_controls_the_collections_recipe_and_cost(run) -> None:
    """One goes on from its coarse file, the other begins anew, by flow matching on images."""
    study, _ = run
    recipe = ("student.rank=12", "student.alpha=12", "train.coarse_learning_rate=6e-3", "targets.per_source=2",
              "train.coarse_target=velocity", "objective.imitation=same_step", "objective.imitation_weight=1",
              "objective.imitation_below=0.6")  # fmt: skip
    collection, longer, images = table1.arms(study, 3, recipe)
    ours, coarse_file = study.arm_config(collection), study.folder / "arms/collection 3/coarse.safetensors"
    coarse = study.forwards(Arm("coarse", (*collection.overrides, f"train.max_train_steps={ours.train.coarse_steps}")))
    whole = study.forwards(collection)
    for control, start, target, rate, cost in (
        (longer, coarse_file, "velocity", 3e-3, whole - coarse),  # half the rate
        (images, None, "images", 6e-3, whole),
    ):
        theirs = study.arm_config(control)
        assert (theirs.student.init_from, theirs.train.coarse_target) == (start, target)
        assert (ours.seed, theirs.seed) == (3, 3)
        assert (theirs.student.rank, theirs.student.alpha) == (ours.student.rank, ours.student.alpha) == (12, 12)
        for key in ("batch_size", "anchor_batch_size", "max_grad_norm", "lr_scheduler"):
            assert getattr(theirs.train, key) == getattr(ours.train, key)
        assert theirs.targets == ours.targets and theirs.targets.per_source == 2
        assert theirs.train.coarse_learning_rate == rate and not theirs.objective.imitates("effect")
        assert theirs.train.coarse_steps > theirs.train.max_train_steps and theirs.train.critic_updates == 0
        step = study.forwards(control) / theirs.train.max_train_steps
        assert study.forwards(control) == pytest.approx(cost, abs=step)


def test_pooled_joins_seeds_in_order() -> None:
    rows = [Row(f"collection {seed}", 2) for seed in (4, 0, 1)]
    found = {row.name: {("sepia", 7): [f"{row.who} a"], ("snow", 7): [f"{row.who} b"]} for row in reversed(rows)}
    assert table1.pooled(found, rows) == {
        ("sepia", 7): ["collection 4 a", "collection 0 a", "collection 1 a"],
        ("snow", 7): ["collection 4 b", "collection 0 b", "collection 1 b"],
    }


def test_judge_pairs_differences_by_effect_and_scene() -> None:
    """The same images in another order differ by nothing, everywhere; one source in a truth's place is one of four."""
    scenes = {seed: render(sample_scene(seed)) for seed in (20_000_000_101, 20_000_000_102)}
    truth = {
        (name, seed): [to_uint8(apply_effect(EFFECTS[name], scene, np.random.default_rng(0)))]
        for name in ("sepia", "mirror_half")
        for seed, scene in scenes.items()
    }
    key = ("sepia", 20_000_000_102)
    worse = truth | {key: [to_uint8(scenes[key[1]].image_HW3)]}
    blank = {key: images for key, images in worse.items() if key[1] == 20_000_000_102}
    images = {
        "control": worse, "same": dict(reversed(worse.items())), "better": dict(reversed(truth.items())), "half": blank,
    }  # fmt: skip
    rows = {row["row"]: row for row in judge(images, "control")}
    assert {name: row["bcr"] for name, row in rows.items()} == {"control": 0.25, "same": 0.25, "better": 0, "half": 0.5}
    assert rows["control"]["to_control"] == {}
    for name in ("same", "half"):
        assert all(gap == {"mean": 0, "interval": [0, 0]} for gap in rows[name]["to_control"].values())
    assert rows["better"]["to_control"]["bcr"]["mean"] == -0.25
    assert rows["better"]["bcr_by_effect"] == {"sepia": 0, "mirror_half": 0}
    assert rows["same"]["bcr_by_effect"] == {"sepia": 0.5, "mirror_half": 0}


def test_scaling_trains_each_size_from_the_same_teachers_for_as_many_updates_an_effect(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SCALES, "long", Scale(4, 2, SETTINGS))
    judged: list[Captured] = []
    monkeypatch.setattr(scaling, "judge", lambda images, controls: judged.append(Captured(images, controls)) or [])
    made = lambda study, rows: {  # noqa: E731
        row.name: {(effect, scene): [row.who] for effect in study.effects for scene in range(2)} for row in rows
    }
    monkeypatch.setattr(Study, "sample", made)

    figures = scaling.measure(tmp_path, [2, 1], 2)

    small, large = scaling.studies(tmp_path, [2, 1], 2)
    assert small.teacher(small.effects[0]).samefile(large.teacher(small.effects[0]))
    trained = [scaling.collection(study.config(), len(study.effects) / 2).overrides for study in (small, large)]
    assert trained[0] == ("train.max_train_steps=2", "train.coarse_steps=1", "train.ema_start=1")
    assert trained[1] == ("train.max_train_steps=4", "train.coarse_steps=2", "train.ema_start=2")
    assert figures["forwards"]["2"] == pytest.approx(2 * figures["forwards"]["1"], abs=1)
    *own, shared = judged
    assert {effect for images in shared.images.values() for effect, _ in images} == set(small.effects)
    assert shared.controls["2 effects: collection, 2"] == "1 effects: collection, 2"
    assert [{len(images) for images in one.images.values()} for one in own] == [{2}, {4}]  # two scenes of each effect
    assert own[-1].controls["2 effects: collection, 2"] == "2 effects: coarse+accel, 2"
    assert own[-1].images["2 effects: coarse+accel, 2"][large.effects[1], 1] == ["collection 0:coarse"]

"""A demo's folder is one demo's: other effects, another size or another seed are refused, and nothing is touched. What
its control is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from rich.console import Console

import clora.jobs.demo as demo
from clora.config import Config, load_config
from clora.distill.forwards import distillation_forwards, joint_step_forwards
from clora.errors import InputError
from clora.jobs.demo import SCALES, run_demo, write_dataset
from clora.tiny.dataset import effect_names


class Begun(Exception):
    """The demo went past its check."""


@pytest.fixture(autouse=True)
def stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo ends where it would write its dataset."""

    def end(*_: object) -> None:
        raise Begun

    monkeypatch.setattr(demo, "write_dataset", end)


def begin(out: Path, effects: int = 4, size: demo.Size = "full", seed: int = 0) -> None:
    with pytest.raises(Begun):
        run_demo(out, effects, size, seed, Console(quiet=True))


def older(out: Path, effects: int, size: demo.Size, seed: int) -> None:
    """The folder of a version that kept no record."""
    write_dataset(out, effect_names(effects), demo.Scale(1, 1, SCALES[size].overrides), seed)


REFUSED = [
    ({"effects": 3}, "4 effects, not 3; give another --out"),
    ({"size": "smoke"}, "4 effects, not 3 and size full, not smoke;"),
    ({"size": "long"}, "size full, not long;"),
    ({"seed": 2}, "seed 0, not 2;"),
    ({"size": "long", "seed": 2}, "size full, not long and seed 0, not 2;"),
]


@pytest.mark.parametrize(("other", "what"), REFUSED)
@pytest.mark.parametrize("kept", [True, False], ids=["recorded", "older"])
def test_run_demo_refuses_a_folder_of_other_settings(tmp_path, other, what, kept) -> None:
    if kept:
        begin(tmp_path)
    else:
        older(tmp_path, 4, "full", 0)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(InputError) as refused:
        run_demo(tmp_path, **{"num_effects": 4, "size": "full", "seed": 0} | _named(other), console=Console(quiet=True))
    assert str(refused.value).startswith(f"{tmp_path}: holds a demo with {what}")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def _named(other: dict[str, object]) -> dict[str, object]:
    return {"num_effects" if key == "effects" else key: value for key, value in other.items()}


def test_run_demo_goes_on_with_the_same_settings(tmp_path) -> None:
    for folder in (tmp_path / "new", tmp_path / "older"):
        if folder.name == "older":
            older(folder, 4, "long", 5)
        begin(folder, 4, "long", 5)
        begin(folder, 4, "long", 5)
        kept = json.loads((folder / "demo.json").read_text())
        assert kept == {"effects": effect_names(4), "size": "long", "seed": 5}


def test_run_demo_takes_no_other_size_for_an_older_folder(tmp_path) -> None:
    older(tmp_path, 4, "long", 0)
    with pytest.raises(InputError, match="size other than full, not full"):
        run_demo(tmp_path, 4, "full", 0, Console(quiet=True))


def test_run_demo_names_effects_that_are_others(tmp_path) -> None:
    older(tmp_path, 4, "full", 0)
    config = yaml.safe_load((tmp_path / "config.yaml").read_text())
    gone = effect_names(5)[-1]
    config["effects"][0]["name"] = gone
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(InputError, match=f"the effects {gone};"):
        run_demo(tmp_path, 4, "full", 0, Console(quiet=True))


def test_train_joint_learns_at_a_rate_of_its_own_optimizer_at_the_collections_cost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_dataset(tmp_path, ["sepia", "snow"], SCALES["smoke"], 0)
    muon = ("train.coarse_optimizer=muon", "train.coarse_learning_rate=2e-2", "teach.learning_rate=4e-3")
    collection = load_config(tmp_path / "config.yaml", muon)
    checked: list[Config] = []
    monkeypatch.setattr(demo, "check_teaching", lambda config, effects: checked.append(config))
    monkeypatch.setattr(demo, "open_workspace", lambda run, console: run)
    monkeypatch.setattr(demo, "teach_joint", lambda workspace, resume, console: None)
    demo.train_joint(collection, Console(quiet=True))
    (joint,) = checked
    assert joint.teach.learning_rate == 4e-3
    cost = joint.teach.max_train_steps * joint_step_forwards(joint)
    assert cost == pytest.approx(distillation_forwards(collection), abs=joint_step_forwards(joint) / 2)


def test_train_control_is_flow_matching_on_images_at_the_collections_cost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From nothing, in the words of the student; no distillation has a part in it."""
    write_dataset(tmp_path, ["sepia", "snow"], SCALES["smoke"], 0)
    imitates = [one for one in SCALES["long"].overrides if one.startswith("objective.")]
    collection = load_config(tmp_path / "config.yaml", imitates)
    assert collection.objective.imitates("effect")
    trained: list[Config] = []
    monkeypatch.setattr(demo, "train", lambda config, resume, console: trained.append(config))
    demo.train_control(collection, Console(quiet=True))
    (control,) = trained
    assert control.student.init_from is None and control.student.acceleration is None and control.objective.aop
    train = control.train
    assert not control.objective.imitates("effect")
    assert (train.coarse_target, train.ema_start) == ("images", 0) and train.coarse_steps == train.max_train_steps
    assert train.coarse_learning_rate == collection.train.coarse_learning_rate
    assert control.targets == collection.targets and control.output_dir == tmp_path / "joint_student"
    whole = distillation_forwards(collection)
    assert distillation_forwards(control) == pytest.approx(whole, abs=joint_step_forwards(control) / 2)

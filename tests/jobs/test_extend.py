"""extend: the catalogue merged, old effects rehearsed from the collection itself, and every misfit refused."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from clora.cli import commands as cli
from clora.data.examples import collate
from clora.distill.check import check_training
from clora.distill.rehearsal import rehearsal_examples
from clora.distill.roles import COLLECTION, STUDENT
from clora.distill.run import open_bank
from clora.distill.step import Distillation, networks_at, train_step
from clora.distill.workspace import open_workspace
from clora.errors import InputError, InputErrors
from clora.inference.editor import load_editor
from clora.jobs.extend import extend, extend_faults, extended_config, make_extension, merge_catalogue
from clora.lora.catalogue import Catalogue, CatalogueEntry, read_catalogue
from clora.lora.files import read_lora, write_lora
from clora.method.prompts import make_trigger
from clora.training.checkpoint import open_latest
from clora.training.tracker import read_log
from tests.support import processes
from tests.support.extension import make_config, random_modules, write_place

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def place(random_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_place(random_base, tmp_path_factory.mktemp("extend"))


def test_extend_merges_the_catalogue_and_writes_what_loads(random_base: Path, place: Path, tmp_path: Path) -> None:
    config = make_config(random_base, place, tmp_path / "out")
    path = extend(place / "collection.safetensors", config, console=QUIET)
    before, after = read_catalogue(place / "collection.safetensors"), read_catalogue(path)
    assert (before.version, after.version) == (1, 2)
    assert after.effects[:2] == before.effects and after.effects[2].name == "warm"
    assert after.effects[2].trigger.startswith("<warm_") and after.effects[2].teacher_sha256 is not None
    assert (after.base, after.schedule, after.sampler) == (before.base, before.schedule, before.sampler)
    # The same file, moved a little: two coarse and two full steps from where it was.
    old = read_lora(place / "collection.safetensors").modules
    distances = {
        name: float((module.delta() - old[name].delta()).norm() / old[name].delta().norm())
        for name, module in read_lora(path).modules.items()
    }
    assert max(distances.values()) < 0.5 and min(distances.values()) > 1e-3
    log = read_log(tmp_path / "out" / "extend")
    assert [("critic_loss" in row) for row in log] == [False, False, True, True]
    editor = load_editor(str(random_base), path, dtype=torch.float32)
    (picture,) = editor.edit([Image.new("RGB", (64, 64), "red")], ["warm"])
    assert picture.size == (64, 64)
    # Extended again, the version counts on and all three are old.
    again = make_config(random_base, place, tmp_path / "again", "extend.max_train_steps=1", name="warmer")
    third = read_catalogue(extend(path, again, console=QUIET))
    assert third.version == 3 and [entry.name for entry in third.effects] == ["first", "second", "warm", "warmer"]


def test_extend_resumes_bitwise_equal(
    random_base: Path, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    collection = place / "collection.safetensors"
    whole = extend(collection, make_config(random_base, place, tmp_path / "whole"), console=QUIET)
    extend(collection, make_config(random_base, place, tmp_path / "split", "train.max_train_seconds=1e-9"))
    (stopped,) = (tmp_path / "split" / "extend").glob("checkpoint-*")
    assert int(stopped.name.partition("-")[2]) == 1
    # Nothing is sampled or encoded twice.
    monkeypatch.setattr("clora.distill.rehearsal.sample", None)
    resumed = extend(collection, make_config(random_base, place, tmp_path / "split"), "latest", QUIET)
    assert whole.read_bytes() == resumed.read_bytes()


def student_of(out: Path) -> torch.Tensor:
    """All of the student's parameters at the end, in fp32, whoever of the processes kept them."""
    checkpoint, faults = open_latest(out / "extend")
    assert checkpoint is not None and not faults
    return checkpoint.read(
        "student", "param", 0, max(shard["parts"]["student"][1] for shard in checkpoint.shards.values())
    )


@pytest.mark.slow
def test_extend_on_two_processes_equals_one(random_base: Path, place: Path, tmp_path: Path) -> None:
    """Coarse and full steps on new and old effects, half of every batch on each of two processes."""
    collection = place / "collection.safetensors"
    one, two = tmp_path / "one", tmp_path / "two"
    calm = "train.adam_epsilon=1e-6"  # or a gradient that is nothing but rounding moves its element a whole step
    extend(collection, make_config(random_base, place, one, "extend.anchor_batch_size=4", calm), console=QUIET)
    halves = make_config(random_base, place, two, "extend.anchor_batch_size=2", "train.batch_size=1", calm)
    file = tmp_path / "two.yaml"
    file.write_text(json.dumps(halves.model_dump(mode="json")))
    said = processes.run(2, ["extend", str(collection), str(file)], tmp_path / "output")
    assert said.splitlines()[-1] == str(two / "collection.safetensors")
    ours, theirs = read_log(two / "extend"), read_log(one / "extend")
    assert [("ta_fm_loss" in row, "critic_loss" in row) for row in ours] == [(True, False)] * 2 + [(False, True)] * 2
    for row, expected in zip(ours, theirs, strict=True):
        assert row.keys() == expected.keys()
        for name in row.keys() - {"seconds"}:
            assert row[name] == pytest.approx(expected[name], rel=1e-5, abs=1e-5), (row["step"], name)
    torch.testing.assert_close(student_of(two), student_of(one), rtol=0, atol=2e-6)
    shards = (two / "extend" / "checkpoint-00000004").glob("shard-*.safetensors")
    assert sorted(path.name for path in shards) == ["shard-0-of-2.safetensors", "shard-1-of-2.safetensors"]
    assert read_catalogue(two / "collection.safetensors") == read_catalogue(one / "collection.safetensors")


def open_extension(
    base: Path, place: Path, out: Path, *overrides: str, names: Sequence[str] = ("warm", "first", "second")
) -> Distillation:
    """The start of an extension whose targets are noise, of which only `names` are dealt."""
    collection = place / "collection.safetensors"
    catalogue = read_catalogue(collection)
    run = check_training(extended_config(catalogue, make_config(base, place, out, *overrides)))
    workspace = open_workspace(run, QUIET, keep_encoders=True)
    old = rehearsal_examples(workspace, catalogue, QUIET)
    effects = {}
    for name, examples in (workspace.effects | old).items():
        rng = torch.Generator().manual_seed(0)
        effects[name] = [replace(e, y=(torch.randn(e.num_tokens, 64, generator=rng),)) for e in examples]
    below = read_lora(collection).modules
    workspace.adapters.add_lora(COLLECTION, below)
    distillation = make_extension(
        replace(workspace, effects=effects), open_bank(workspace), below, list(workspace.effects), list(old)
    )
    return replace(distillation, batches=replace(distillation.batches, deal=list(names)))


def rehearsing_loss(
    base: Path, place: Path, out: Path, names: tuple[str, ...], *overrides: str, moved: float = 0.0
) -> float:
    """TA-FM of the first step on these effects, with all B of the student moved."""
    distillation = open_extension(base, place, out, *overrides, names=names)
    with torch.no_grad():
        for key, value in distillation.student.parameters.items():
            value.add_(moved if key.endswith(".B") else 0.0)
    return float(train_step(distillation, 0)["ta_fm_loss"])


def test_rehearsal_holds_the_student_where_it_is(random_base: Path, place: Path, tmp_path: Path) -> None:
    """Where nothing has changed yet, old effects ask for no change: their loss is 0, and a new effect's is not."""
    old, new = ("first", "second"), ("warm",)
    assert rehearsing_loss(random_base, place, tmp_path, old) < 1e-9
    assert rehearsing_loss(random_base, place, tmp_path, new) > 0.1
    light, heavy = (
        rehearsing_loss(random_base, place, tmp_path, old, f"extend.rehearsal_weight={weight}", moved=0.1)
        for weight in (1, 4)
    )
    assert light > 1e-4 and heavy == pytest.approx(4 * light, rel=1e-4)
    unweighted = rehearsing_loss(random_base, place, tmp_path, new, "extend.rehearsal_weight=1")
    assert unweighted == pytest.approx(rehearsing_loss(random_base, place, tmp_path, new), rel=1e-6)


def test_make_extension_freezes_the_acceleration_lora_and_deals_by_share(
    random_base: Path, place: Path, tmp_path: Path
) -> None:
    write_lora(tmp_path / "fast.safetensors", random_modules(random_base, 2, 3), dtype=torch.float32)
    fast = f"student.acceleration={tmp_path / 'fast.safetensors'}"
    d = open_extension(random_base, place, tmp_path, fast)
    assert {key.split(".")[0] for key in d.student.parameters} == {STUDENT} and not d.models.joining
    assert d.models.resident == {"first": COLLECTION, "second": COLLECTION}
    assert d.models.bank is not None and d.models.bank.effects == ("warm",)
    # What TA-FM follows differs from y for a new effect too, where there is an acceleration LoRA.
    losses = [
        rehearsing_loss(random_base, place, tmp_path, ("warm",), *overrides, "objective.ta_fm_weight=1")
        for overrides in ((), (fast,))
    ]
    assert abs(losses[0] - losses[1]) > 0.1
    batch, _ = d.batches.draw(0, "effect", "student")
    assert batch.guided == [i for i, effect in enumerate(batch.teacher_cond.effects) if effect == "warm"]


def test_critic_starts_as_the_student_on_its_collection(random_base: Path, place: Path, tmp_path: Path) -> None:
    overrides = ("extend.coarse_steps=1", "train.critic_learning_rate=1e-30")
    d = open_extension(random_base, place, tmp_path, *overrides, names=["warm"])
    warm = d.batches.effects["warm"]
    cond = collate(warm[:1], "student", d.batches.device)
    x_sigma, sigma = torch.randn(1, warm[0].num_tokens, 64), torch.tensor([0.5])
    before = networks_at(d, 0).critic(x_sigma, sigma, cond)
    torch.testing.assert_close(before, networks_at(d, 0).student(x_sigma, sigma, cond), rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        for value in d.student.parameters.values():
            value.add_(0.1)
    moved = networks_at(d, 0).student(x_sigma, sigma, cond).detach()
    train_step(d, 1)  # the first full step; its critic learns next to nothing
    critic = networks_at(d, 1).critic(x_sigma, sigma, cond)
    torch.testing.assert_close(critic, moved, rtol=1e-4, atol=1e-5)
    assert float((critic - before).detach().abs().max()) > 1e-2


def test_extended_config_starts_from_the_collection(random_base: Path, place: Path, tmp_path: Path) -> None:
    collection = place / "collection.safetensors"
    catalogue = read_catalogue(collection)
    extended = extended_config(catalogue, make_config(random_base, place, tmp_path / "out"))
    assert (extended.student.rank, extended.student.alpha, extended.student.init_from) == (4, 4.0, None)
    assert (extended.train.max_train_steps, extended.train.coarse_steps) == (4, 2)
    assert [effect.name for effect in extended.effects] == ["warm"] and extended.folder == place
    assert extended.objective.p_switch == 1.0
    other_share = make_config(random_base, place, tmp_path, "extend.p_switch=0.25")
    assert extended_config(catalogue, other_share).objective.p_switch == 0.25
    accelerated = make_config(random_base, place, tmp_path, "student.acceleration=base")
    with pytest.raises(InputError, match=r"student\.acceleration: base .* brings no acceleration LoRA"):
        extended_config(catalogue, accelerated)


def test_extended_config_trains_as_extend_says(random_base: Path, place: Path, tmp_path: Path) -> None:
    catalogue = read_catalogue(place / "collection.safetensors")
    own = {
        "max_train_steps": 9, "coarse_steps": 7, "learning_rate": 3e-5, "coarse_learning_rate": 5e-2,
        "coarse_optimizer": "muon", "lr_warmup_steps": 1, "anchor_batch_size": 5,
    }  # fmt: skip
    overrides = [f"extend.{key}={value}" for key, value in own.items()]
    train = extended_config(catalogue, make_config(random_base, place, tmp_path / "out", *overrides)).train
    assert {key: getattr(train, key) for key in own} == own


def test_extended_config_draws_triggers_that_the_collection_has_not(
    random_base: Path, place: Path, tmp_path: Path
) -> None:
    catalogue = read_catalogue(place / "collection.safetensors")
    config = make_config(random_base, place, tmp_path, "prompts.trigger_scheme=rare")
    drawn = make_trigger("warm", config.seed, "rare")
    assert extended_config(catalogue, config).effects[0].trigger == drawn
    entries = [catalogue.effects[0].model_copy(update={"trigger": drawn.upper()}), catalogue.effects[1]]
    taken = catalogue.model_copy(update={"effects": entries})
    assert extended_config(taken, config).effects[0].trigger == make_trigger("warm", config.seed, "rare", 1)
    plain = make_config(random_base, place, tmp_path, "objective.aop=false")
    assert extended_config(catalogue, plain).effects[0].trigger is None


def test_extend_faults_lists_every_misfit(random_base: Path, place: Path) -> None:
    collection = place / "collection.safetensors"
    catalogue = read_catalogue(collection)
    fitting = make_config(random_base, place, place / "out")
    assert extend_faults(collection, catalogue, fitting) == []
    config = make_config(random_base, place, place, "base.model=tiny", "schedule.num_steps=8", name="First")
    effects = [config.effects[0].model_copy(update={"trigger": "<SECOND>"})]
    config = config.model_copy(update={"effects": effects})
    faults = extend_faults(collection, catalogue, config)
    for number, start in enumerate(
        ("effect First: the collection has one", "effect First: the collection has its trigger", "base: is tiny")
    ):
        assert faults[number].startswith(start)
    wanted = "schedule.num_steps=2 schedule.shift=3 schedule.sampler=consistency"
    assert faults[3] == f"schedule: differs from the collection's; set {wanted}"
    assert faults[4].startswith("output_dir: ") and len(faults) == 5
    with pytest.raises(InputErrors) as caught:
        extend(collection, config, console=QUIET)
    assert caught.value.faults == faults
    plain = make_config(random_base, place, place / "out", "objective.aop=false")
    assert extend_faults(collection, catalogue, plain) == ["objective.aop: the collection has triggers; set it to true"]


def test_merge_catalogue_keeps_a_file_without_version(place: Path) -> None:
    """A catalogue written before there were versions is its version 1."""
    catalogue = read_catalogue(place / "collection.safetensors")
    old = Catalogue.model_validate({k: v for k, v in catalogue.model_dump().items() if k != "version"})
    merged = merge_catalogue(old, [CatalogueEntry(name="third", student_prompt="x")])
    assert (old.version, merged.version, len(merged.effects)) == (1, 2, 3)
    with pytest.raises(ValueError, match="name given to more than one effect: first"):
        merge_catalogue(old, [CatalogueEntry(name="first", student_prompt="x")])


def test_command_prints_what_the_collection_holds_now(random_base: Path, place: Path, tmp_path: Path) -> None:
    config = make_config(random_base, place, tmp_path / "out", "extend.max_train_steps=1", "extend.coarse_steps=1")
    file = tmp_path / "new.yaml"
    file.write_text(json.dumps(config.model_dump(mode="json")))
    result = CliRunner().invoke(cli.app, ["extend", str(place / "collection.safetensors"), str(file), "--json"])
    answer = json.loads(result.stdout)
    assert result.exit_code == 0 and answer["version"] == 2 and answer["effects"] == ["first", "second", "warm"]
    assert Path(answer["output"]).is_file()


def test_extend_checks_before_it_loads_the_base(
    random_base: Path, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("clora.distill.workspace.load_backbone", None)
    faulty = make_config(random_base, place, tmp_path / "out", "effects.0.lora=gone.safetensors", "extend.p_switch=0.5")
    with pytest.raises(InputErrors) as caught:
        extend(place / "collection.safetensors", faulty, console=QUIET)
    assert [fault.split(":")[0] for fault in caught.value.faults] == ["effects.0.lora", "general"]
    assert not (tmp_path / "out").exists()

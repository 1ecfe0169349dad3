"""extend: the catalogue merged, old effects rehearsed from the collection itself, and every misfit refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from clora.backbones.load import linear_shapes
from clora.cli import commands as cli
from clora.config import Config, build_config
from clora.data.examples import collate
from clora.distill.check import check_training, teacher_files
from clora.distill.run import make_distiller, open_bank
from clora.distill.targets import rehearsal_targets
from clora.distill.workspace import Workspace, open_workspace
from clora.errors import InputError, InputErrors
from clora.inference.editor import load_editor
from clora.jobs.extend import (
    deal_names,
    extend,
    extend_faults,
    extended_config,
    merge_catalogue,
    run_settings,
    with_rehearsed,
)
from clora.lora.catalogue import Catalogue, CatalogueEntry, CatalogueSchedule, read_catalogue, write_collection
from clora.lora.files import read_lora, write_lora
from clora.lora.module import LoraModule, join_modules
from clora.method.flow import few_step_sigmas
from clora.method.routing import step_generator
from clora.method.samplers import few_step_sample_ref
from clora.training.checkpoint import open_latest
from clora.training.tracker import read_log
from tests.support import processes

TARGETS = ["to_q", "to_v", "img_mlp.net.2"]
QUIET = Console(quiet=True)


def random_modules(base: Path, seed: int, rank: int) -> dict[str, LoraModule]:
    rng = torch.Generator().manual_seed(seed)
    return {
        name: LoraModule(torch.randn(rank, K, generator=rng) * 0.1, torch.randn(N, rank, generator=rng) * 0.1, rank)
        for name, (N, K) in linear_shapes(base).items()
        if name.endswith(tuple(TARGETS))
    }


@pytest.fixture(scope="module")
def place(random_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A collection of two effects, a teacher and three pairs of a third."""
    folder = tmp_path_factory.mktemp("extend")
    rng = np.random.default_rng(0)
    for side in ("source", "target"):
        (folder / "warm" / side).mkdir(parents=True)
        for i in range(3):
            Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(folder / "warm" / side / f"{i}.png")
    write_lora(folder / "warm.safetensors", random_modules(random_base, 1, 2), dtype=torch.float32)
    catalogue = Catalogue(
        base=str(random_base),
        schedule=CatalogueSchedule(num_steps=2, shift=3.0),
        effects=[
            CatalogueEntry(name="first", trigger="<first>", student_prompt="paint it", teacher_sha256="0" * 64),
            CatalogueEntry(name="second", trigger="<second>", student_prompt=""),
        ],
    )
    modules = random_modules(random_base, 0, 6)
    write_collection(folder / "collection.safetensors", modules, catalogue, dtype=torch.float32)
    return folder


def make_config(base: Path, place: Path, out: Path, *overrides: str, name: str = "warm") -> Config:
    values: dict[str, Any] = {
        "preset": "tiny",
        "base": {"model": str(base), "dtype": "float32"},
        "output_dir": str(out),
        "effects": [{"name": name, "prompt": "change it", "lora": "warm.safetensors", "pairs": "warm"}],
        "student": {"acceleration": None, "targets": TARGETS},
        "schedule": {"num_steps": 2},
        "objective": {"p_switch": 1.0, "guidance": 2.0},
        "extend": {
            "rank": 4,
            "p_switch": None,
            "max_train_steps": 4,
            "coarse_steps": 2,
            "rehearsal_sources": 2,
            "anchor_batch_size": 3,
        },
        "train": {"critic_updates": 1, "batch_size": 2, "log_every": 1, "checkpointing_steps": 2},
    }
    return build_config(values, place, overrides)


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
    monkeypatch.setattr("clora.distill.targets.few_step_sample", None)
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
    extend(collection, make_config(random_base, place, one, "extend.anchor_batch_size=4"), console=QUIET)
    halves = make_config(random_base, place, two, "extend.anchor_batch_size=2", "train.batch_size=1")
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
    torch.testing.assert_close(student_of(two), student_of(one), rtol=0, atol=1e-5)
    shards = (two / "extend" / "checkpoint-00000004").glob("shard-*.safetensors")
    assert sorted(path.name for path in shards) == ["shard-0-of-2.safetensors", "shard-1-of-2.safetensors"]
    assert read_catalogue(two / "collection.safetensors") == read_catalogue(one / "collection.safetensors")


def test_rehearsal_is_the_collections_own_few_step_sampling(random_base: Path, place: Path, tmp_path: Path) -> None:
    collection = place / "collection.safetensors"
    catalogue = read_catalogue(collection)
    workspace = opened(collection, make_config(random_base, place, tmp_path / "out"))
    bank = open_bank(workspace)
    assert bank is not None and bank.capacity == 2  # the new effect's teacher, and one slot for both old effects
    slots = bank.slots_for(["first", "second", "warm"])
    assert slots[0] == slots[1] != slots[2]
    filled = rehearsal_targets(workspace, bank.slots_for, catalogue, "0" * 64, QUIET)
    assert {name: len(examples) for name, examples in filled.items()} == {"first": 2, "second": 2}

    workspace.adapters.add_lora("by_hand", read_lora(collection).modules)
    prompts = {"first": "<first>paint it", "second": "<second>"}
    for name, examples in filled.items():
        for example in examples:
            texts = workspace.backbone.count_prompt_tokens(prompts[name])
            assert texts and torch.equal(example.texts["student"], example.texts["teacher"])
            assert torch.equal(example.texts["negative"], example.texts["teacher"])
    first = filled["first"][0]
    (key,) = [p.stem for p in (tmp_path / "out" / "cache").rglob("*.safetensors") if _holds(p, first.y[0])]

    def velocity(x: torch.Tensor, sigma: torch.Tensor, cond: Any) -> torch.Tensor:
        return workspace.backbone.velocity(x, sigma, cond, ["by_hand"])

    shape = (first.num_tokens, workspace.backbone.token_channels)
    cond = collate([first], "student", workspace.backbone.device)
    seed = step_generator(int(key[:12], 16), 0, "target", "cpu").initial_seed()
    y = few_step_sample_ref(velocity, cond, shape, few_step_sigmas(2, 3.0), [seed])
    torch.testing.assert_close(first.y[0], y[0], rtol=1e-4, atol=1e-4)


def opened(collection: Path, config: Config) -> Workspace:
    """The workspace of an extension: the new effects of `config`, and the collection's, rehearsed."""
    whole = extended_config(collection, read_catalogue(collection), config)
    return open_workspace(with_rehearsed(check_training(run_settings(config)), whole), QUIET)


def rehearsing_loss(
    base: Path, place: Path, out: Path, names: tuple[str, ...], *overrides: str, moved: float = 0.0
) -> float:
    """TA-FM of the first step on these effects, whose targets are noise, with all B of the student moved."""
    collection = place / "collection.safetensors"
    workspace = opened(collection, make_config(base, place, out, *overrides))
    bank = open_bank(workspace)
    assert bank is not None
    for name, examples in workspace.effects.items():
        rng = torch.Generator().manual_seed(0)
        workspace.effects[name] = [replace(e, y=(torch.randn(e.num_tokens, 64, generator=rng),)) for e in examples]
    distiller = make_distiller(workspace, bank, names, ["first", "second"], collection)
    with torch.no_grad():
        for key, value in distiller.student.parameters.items():
            value.add_(moved if key.endswith(".B") else 0.0)
    return float(distiller.step(0)["ta_fm_loss"])


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


def test_anchors_follow_the_collection_and_accelerated_teachers(random_base: Path, place: Path, tmp_path: Path) -> None:
    """TA-FM's velocity: the collection's for an old effect; for a new one the teacher's, with the acceleration LoRA."""
    collection, fast = place / "collection.safetensors", random_modules(random_base, 2, 3)
    write_lora(tmp_path / "fast.safetensors", fast, dtype=torch.float32)
    given = make_config(random_base, place, tmp_path, f"student.acceleration={tmp_path / 'fast.safetensors'}")
    workspace = opened(collection, given)
    bank = open_bank(workspace)
    assert bank is not None
    distiller = make_distiller(workspace, bank, ("warm", "first"), ["first"], collection)
    assert not any("acceleration" in name for name in distiller.student.parameters)
    taught = join_modules(read_lora(place / "warm.safetensors").modules, fast)
    workspace.adapters.add_lora("new_by_hand", taught)
    workspace.adapters.add_lora("old_by_hand", read_lora(collection).modules)
    cond = collate([workspace.effects[name][0] for name in ("warm", "first")], "teacher", workspace.backbone.device)
    rng = torch.Generator().manual_seed(0)
    x_sigma, eps, y = torch.randn(3, 2, workspace.effects["warm"][0].num_tokens, 64, generator=rng)
    sigma = torch.tensor([0.3, 0.9])
    anchor = distiller.networks(0).anchor
    assert anchor is not None
    x0, weight = anchor(y, eps, x_sigma, sigma, cond)
    with torch.no_grad():
        expected = workspace.backbone.velocity(x_sigma, sigma, cond, ["new_by_hand", "old_by_hand"])
    torch.testing.assert_close(eps - x0, expected, rtol=1e-4, atol=1e-5)
    assert weight.flatten().tolist() == [1.0, given.extend.rehearsal_weight]


def test_critic_starts_as_the_student_on_its_collection(random_base: Path, place: Path, tmp_path: Path) -> None:
    collection = place / "collection.safetensors"
    given = make_config(random_base, place, tmp_path, "extend.coarse_steps=1", "train.critic_learning_rate=1e-30")
    workspace = opened(collection, given)
    bank = open_bank(workspace)
    assert bank is not None
    warm = [replace(e, y=(torch.zeros(e.num_tokens, 64),)) for e in workspace.effects["warm"]]
    workspace.effects["warm"] = warm
    distiller = make_distiller(workspace, bank, ["warm"], ["first"], collection)
    cond = collate(warm[:1], "student", workspace.backbone.device)
    x_sigma, sigma = torch.randn(1, warm[0].num_tokens, 64), torch.tensor([0.5])
    before = distiller.networks(0).critic(x_sigma, sigma, cond)
    torch.testing.assert_close(before, distiller.networks(0).student(x_sigma, sigma, cond), rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        for value in distiller.student.parameters.values():
            value.add_(0.1)
    moved = distiller.networks(0).student(x_sigma, sigma, cond).detach()
    distiller.step(1)  # the first full step; its critic learns next to nothing
    critic = distiller.networks(1).critic(x_sigma, sigma, cond)
    torch.testing.assert_close(critic, moved, rtol=1e-4, atol=1e-5)
    assert float((critic - before).detach().abs().max()) > 1e-2


def _holds(path: Path, latents: torch.Tensor) -> bool:
    from safetensors.torch import load_file

    found = load_file(path).get("latents")
    return found is not None and found.shape == latents.shape and torch.equal(found, latents)


def test_extended_config_starts_from_the_collection(random_base: Path, place: Path, tmp_path: Path) -> None:
    collection = place / "collection.safetensors"
    catalogue = read_catalogue(collection)
    extended = extended_config(collection, catalogue, make_config(random_base, place, tmp_path / "out"))
    assert (extended.student.rank, extended.student.alpha, extended.student.init_from) == (4, 4.0, None)
    assert (extended.train.max_train_steps, extended.train.coarse_steps) == (4, 2)
    assert [effect.name for effect in extended.effects] == ["warm", "first", "second"]
    assert teacher_files(extended)["first"] == teacher_files(extended)["second"] == collection
    rows = (tmp_path / "out" / "rehearsal" / "second.jsonl").read_text().splitlines()
    # Two sources each, taken in turn: the first effect has 0 and 1, the second 2 and 0.
    sources = [Path(json.loads(row)["source_images"][0]).name for row in rows]
    assert sources == ["2.png", "0.png"]
    assert extended.objective.p_switch == 1.0
    other_share = make_config(random_base, place, tmp_path, "extend.p_switch=0.25")
    assert extended_config(collection, catalogue, other_share).objective.p_switch == 0.25
    alone = extended_config(
        collection, catalogue, make_config(random_base, place, tmp_path, "extend.rehearsal_share=0")
    )
    assert [effect.name for effect in alone.effects] == ["warm"]
    accelerated = make_config(random_base, place, tmp_path, "student.acceleration=base")
    with pytest.raises(InputError, match=r"student\.acceleration: base .* brings no acceleration LoRA"):
        extended_config(collection, catalogue, accelerated)


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
    assert faults[3] == "schedule: differs from the collection's; set schedule.num_steps=2 schedule.shift=3"
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


@pytest.mark.parametrize(("num_new", "num_old", "share"), [(3, 50, 0.5), (1, 2, 0.5), (6, 2, 0.5), (3, 50, 0.8)])
def test_deal_names_comes_near_the_share(num_new: int, num_old: int, share: float) -> None:
    new, old = [f"new{i}" for i in range(num_new)], [f"old{i}" for i in range(num_old)]
    deal = deal_names(new, old, share)
    counts = {name: deal.count(name) for name in (*new, *old)}
    assert len({counts[name] for name in new}) == len({counts[name] for name in old}) == 1
    assert sum(counts[name] for name in old) / len(deal) == pytest.approx(share, abs=0.05)
    assert deal_names(new, old, 0) == new


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

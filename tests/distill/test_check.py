"""Every fault of a run is told before any weight is loaded, and each file is read once."""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from typer.testing import CliRunner

import clora.data.examples as examples_module
import clora.distill.workspace as workspace_module
from clora.backbones.load import linear_shapes, load_backbone
from clora.cli.commands import app
from clora.config import Config
from clora.distill.check import check_teaching, check_training
from clora.distill.opened import CheckedRun
from clora.distill.teachers import teacher_files
from clora.distill.workspace import open_base, open_workspace
from clora.errors import InputError, InputErrors
from clora.jobs.teach import teach
from clora.jobs.train import make_caches, train
from clora.jobs.validate import validate
from tests.support.small_job import NAMES, make_config, write_dataset

TINY = Path(__file__).resolve().parents[2] / "clora" / "tiny" / "base"
FULL_WIDTH = {"num_layers": 60, "num_attention_heads": 24, "attention_head_dim": 128, "joint_attention_dim": 3584}
NUM_EFFECTS, NUM_PAIRS = 50, 40


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def taught(random_base: Path, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output folder whose teachers are taught."""
    out = tmp_path_factory.mktemp("out") / "run"
    teach(make_config(random_base, dataset, out, "teach.max_train_steps=1"))
    return out


def write_sparse_lora(path: Path, shapes: Mapping[str, tuple[int, int]], rank: int = 16) -> None:
    """A LoRA file on all these linears whose tensors, all zero, take no room on the disk."""
    header: dict[str, Any] = {}
    end = 0
    for name, (N, K) in sorted(shapes.items()):
        for part, shape in (("A", [rank, K]), ("B", [N, rank])):
            start, end = end, end + 2 * math.prod(shape)
            entry = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
            header[f"diffusion_model.{name}.lora_{part}.weight"] = entry
    text = json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(path, 8 + len(text) + end)


@pytest.fixture
def full_scale(tmp_path: Path) -> Path:
    """The configuration file of 50 effects with 40 pairs each, on a base of full width whose weights are junk."""
    base = tmp_path / "base"
    shutil.copytree(TINY, base, ignore=shutil.ignore_patterns("*.safetensors", "general"))
    config = base / "transformer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | FULL_WIDTH))
    for part in ("transformer", "vae", "text_encoder"):
        weights = next((TINY / part).glob("*.safetensors")).name
        (base / part / weights).write_bytes(b"no weights are in here")
    targets = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    shapes = {name: shape for name, shape in linear_shapes(base).items() if name.endswith(targets)}
    assert len(shapes) == 8 * 60
    effects = []
    for index in range(NUM_EFFECTS):
        name = f"effect_{index:02d}"
        write_sparse_lora(tmp_path / "loras" / f"{name}.safetensors", shapes)
        pairs = tmp_path / "pairs" / name
        pairs.mkdir(parents=True)
        rows = []
        for number in range(NUM_PAIRS):
            (pairs / f"{number:03d}.png").write_bytes(b"")
            rows.append(json.dumps({"source_image": f"{number:03d}.png"}))
        (pairs / "metadata.jsonl").write_text("\n".join(rows))
        effects.append({"name": name, "lora": f"loras/{name}.safetensors", "prompt": name, "pairs": f"pairs/{name}"})
    values = {"base": "./base", "output_dir": "out", "effects": effects, "objective": {"p_switch": 1}}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values | {"preset": "clora"}))
    return path


def test_train_names_a_cut_off_teacher_and_a_missing_image_before_it_loads_the_base(full_scale: Path) -> None:
    """50 effects on 60 blocks, one teacher cut off and one image gone: both are told, in seconds, and no weight is
    read; those of this base could not be."""
    with pytest.raises(InputError, match="cannot be loaded"):
        load_backbone(full_scale.parent / "base", components=("transformer",))
    teacher = full_scale.parent / "loras" / "effect_31.safetensors"
    os.truncate(teacher, teacher.stat().st_size - 1)
    (full_scale.parent / "pairs" / "effect_17" / "023.png").unlink()
    started = time.process_time()  # of this process, however busy the machine is
    result = CliRunner().invoke(app, ["train", str(full_scale)])
    assert time.process_time() - started < 5
    faults = [line.removeprefix("error: ") for line in result.stderr.splitlines()]
    assert result.exit_code == 2 and len(faults) == 2
    assert faults[0].startswith(f"effects.31.lora: {teacher}: cut off (")
    assert faults[1].startswith("effects.17.pairs: ") and "line 24" in faults[1] and "023.png" in faults[1]
    assert not (full_scale.parent / "out").exists()


@pytest.mark.parametrize("command", [train, make_caches, teach])
def test_every_job_checks_before_it_loads_the_base(
    random_base: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Callable[..., Any]
) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("the base is loaded in spite of a fault")

    monkeypatch.setattr(workspace_module, "load_backbone", refuse)
    data = tmp_path / "data"
    shutil.copytree(dataset, data)
    for name in NAMES:
        (data / name / "target" / "1.png").unlink()
    config = make_config(random_base, data, tmp_path / "run", "train.buckets.max_area=1")
    with pytest.raises(InputErrors) as caught:
        command(config)
    faults = caught.value.faults
    assert [fault.split(":")[0] for fault in faults if "no partner in target/" in fault] == [
        "effects.0.pairs", "effects.1.pairs"
    ]  # fmt: skip
    assert any(fault.startswith("train.buckets: ") for fault in faults)
    lacking = [fault for fault in faults if "clora teach" in fault]
    assert len(lacking) == (0 if command is teach else 1) and len(faults) == 3 + len(lacking)


def test_check_training_wants_a_teacher_of_every_effect(random_base: Path, dataset: Path, tmp_path: Path) -> None:
    config = make_config(random_base, dataset, tmp_path / "run")
    with pytest.raises(InputErrors) as caught:
        check_training(config)
    where = "run/teachers/warm.safetensors"
    assert caught.value.faults == [
        f"2 effects have no teacher, first: warm ({where}); run `clora teach` first, or give LoRA files in 'lora'"
    ]
    given = config.model_copy(
        update={"effects": [config.effects[0], config.effects[1].model_copy(update={"lora": tmp_path / "cold.lora"})]}
    )
    with pytest.raises(InputErrors) as caught:
        teacher_files(given)
    assert caught.value.faults == [
        "effects.1.lora: LoRA file cold.lora is missing; put it there or correct the path",
        f"effects.0 (warm): no teacher at {tmp_path / where}; run `clora teach` first, or give LoRA files in 'lora'",
    ]
    # `validate` says the same of the file, and that of the teacher is no fault as long as it can be taught.
    report = validate(given)
    assert report.faults == caught.value.faults[:1]
    assert report.warnings[-1:] == ["1 effect without a teacher, first: warm; run `clora teach` before `clora train`"]


def test_check_training_wants_targets_only_where_they_are_trained_on(
    random_base: Path, dataset: Path, taught: Path, tmp_path: Path
) -> None:
    """Once taught, sources are enough, unless the targets of training are the pairs' own; `teach` needs targets."""
    rows = [json.dumps({"source_image": f"{i}.png"}) for i in range(2)]
    data = tmp_path / "data"
    shutil.copytree(dataset, data)
    for name in NAMES:
        shutil.rmtree(data / name / "target")
        (data / name / "source" / "metadata.jsonl").write_text("\n".join(rows))
    config = make_config(random_base, data, taught)
    effects = [e.model_copy(update={"pairs": data / e.name / "source"}) for e in config.effects]
    config = config.model_copy(update={"effects": effects})
    run = check_training(config)
    assert [len(run.effects[name]) for name in NAMES] == [2, 2] and len(run.general) == 3
    assert validate(config).faults == []
    own = config.model_copy(update={"targets": config.targets.model_copy(update={"source": "pairs"})})
    for check in (check_training, validate_and_raise, lambda config: check_teaching(config, config.effects)):
        with pytest.raises(InputErrors, match="base_pred_image") as caught:
            check(own)
        assert len(caught.value.faults) == 4  # two rows of two effects


def validate_and_raise(config: Config) -> None:
    raise InputErrors(validate(config).faults)


def test_check_training_holds_loras_against_the_students_targets(
    random_base: Path, dataset: Path, taught: Path
) -> None:
    """What a slot does not cover cannot be loaded into it: told here as it is when the teachers are opened."""
    config = make_config(random_base, dataset, taught, "student.targets=[to_q]")
    with pytest.raises(InputErrors) as caught:
        check_training(config)
    first, second = caught.value.faults
    assert first.startswith("effects.0 (warm): ") and "is not on this transformer" in first
    assert second.startswith("effects.1 (cold): ")
    config = make_config(random_base, dataset, taught, "student.targets=[to_w]")
    with pytest.raises(InputErrors, match=r"student\.targets: target 'to_w' matches no linear layer"):
        check_training(config)


def test_check_training_counts_the_tokens_of_every_prompt(
    random_base: Path, dataset: Path, taught: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    shutil.copytree(dataset, data)
    rows = [{"source_images": [f"{i}.png"], "prompt": "paint it " * (300 if i == 1 else 1)} for i in range(3)]
    (data / "general" / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    long = "word " * 300
    config = make_config(random_base, data, taught, f"effects.1.prompt={long}", f"objective.negative_prompt={long}")
    with pytest.raises(InputErrors) as caught:
        check_training(config)
    keys = [fault.split(": ")[0] for fault in caught.value.faults]
    assert keys == ["effects.1.prompt", "objective.negative_prompt", "general.pairs"]
    assert "metadata.jsonl line 2: 600 tokens" in caught.value.faults[2]


def test_check_teaching_counts_the_tokens_of_captions(random_base: Path, dataset: Path, tmp_path: Path) -> None:
    """A pair's caption is encoded in place of the prompt."""
    data = tmp_path / "data"
    shutil.copytree(dataset, data)
    (data / "cold" / "source" / "1.txt").write_text("word " * 300)
    (data / "cold" / "target" / "1.txt").write_text("word " * 300)
    config = make_config(random_base, data, tmp_path / "run")
    for check in (lambda: check_teaching(config, config.effects), lambda: validate_and_raise(config)):
        with pytest.raises(InputErrors) as caught:
            check()
        (fault,) = caught.value.faults
        assert "tokens, more than the" in fault and "1" in fault


@pytest.mark.parametrize(
    "given, fault",
    [
        (["train.teacher_slots=1"], "train.teacher_slots: 1, but a batch may need 2 different teachers; raise it"),
        (["train.teacher_slots=1", "train.batch_size=1", "train.coarse_target=images"], None),
        (
            ["train.teacher_slots=1", "train.batch_size=1", "train.coarse_target=velocity"],
            "train.teacher_slots: 1, but a batch may need 2 different teachers; raise it",
        ),
        (
            ["train.teacher_slots=1", "train.batch_size=1", "objective.imitation_weight=1"],
            "train.teacher_slots: 1, but a batch may need 2 different teachers; raise it",
        ),
        (["train.report_to=wandb"], "train.report_to: wandb is not installed; `pip install wandb`, or set it to none"),
        (["student.init_from={wide}"], "student.init_from: has rank 9, more than student.rank (4); raise that, or use"),
        (["effects.1.lora={folder}"], "effects.1.lora: folder is a folder; name the LoRA file in it"),
    ],
)
def test_check_training_finds_what_a_run_would_stop_at(
    random_base: Path, dataset: Path, taught: Path, given: list[str], fault: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before targets are made: too few slots, a board that is not there, a start that does not fit, a folder."""
    monkeypatch.setattr("clora.distill.check.find_spec", lambda name: None)
    shapes = {name: shape for name, shape in linear_shapes(random_base).items() if name.endswith("attn.to_q")}
    write_sparse_lora(taught.parent / "wide.safetensors", shapes, rank=9)
    (taught.parent / "folder").mkdir(exist_ok=True)
    places = {"wide": taught.parent / "wide.safetensors", "folder": taught.parent / "folder"}
    config = make_config(random_base, dataset, taught, *(one.format(**places) for one in given))
    if fault is None:
        assert set(check_training(config).effects) == set(NAMES)
        return
    for check in (check_training, validate_and_raise):
        with pytest.raises(InputErrors) as caught:
            check(config)
        assert [one.startswith(fault) for one in caught.value.faults] == [True], caught.value.faults


def test_check_training_wants_effects_for_same_step(random_base: Path, dataset: Path, tmp_path: Path) -> None:
    given = ("objective.imitation=same_step", "objective.imitation_weight=1", "student.acceleration=base")
    config = make_config(random_base, dataset, tmp_path / "run", *given, effects=False)
    with pytest.raises(InputErrors, match=r"objective\.imitation: same_step imitates the effects' teachers"):
        check_training(config)


def test_check_training_of_extend_warns_of_its_own_keys(random_base: Path, dataset: Path, taught: Path) -> None:
    """An average that outlasts the few updates of `extend` is meant; of `train` it is not."""
    config = make_config(random_base, dataset, taught, "train.ema_start=500", "train.max_train_steps=100")
    assert any(note.startswith("train.ema_start: 500") for note in check_training(config).warnings)
    assert not any("ema_start" in note for note in check_training(config, "extend").warnings)


def test_check_training_finds_images_that_are_gone(
    random_base: Path, dataset: Path, taught: Path, tmp_path: Path
) -> None:
    """A link that leads nowhere has a name in its folder and is no file."""
    data = tmp_path / "data"
    shutil.copytree(dataset, data)
    (data / "cold" / "source" / "2.png").unlink()
    (data / "cold" / "source" / "2.png").symlink_to(data / "cold" / "gone.png")
    with pytest.raises(InputErrors) as caught:
        check_training(make_config(random_base, data, taught))
    (fault,) = caught.value.faults
    assert fault.startswith(f"effects.1.pairs: {data / 'cold' / 'gone.png'} is missing or may not be read; ")


def test_check_training_without_effects_needs_general_data(random_base: Path, dataset: Path, tmp_path: Path) -> None:
    config = make_config(random_base, dataset, tmp_path / "run", effects=False)
    run = check_training(config)
    assert run.effects == {} and len(run.general) == 3
    with pytest.raises(InputErrors, match=r"general: is missing; set general\.pairs to images with instructions, or"):
        check_training(config.model_copy(update={"general": None}))


def count(monkeypatch: pytest.MonkeyPatch, module: Any, name: str, path_of: Callable[[Any], Path]) -> Counter[Path]:
    """How often a function is called for each file."""
    calls: Counter[Path] = Counter()
    real = getattr(module, name)

    def counted(first: Any, *more: Any, **named: Any) -> Any:
        calls[path_of(first).resolve()] += 1
        return real(first, *more, **named)

    monkeypatch.setattr(module, name, counted)
    return calls


def test_train_hashes_every_file_once_and_decodes_every_image_once(
    random_base: Path, dataset: Path, taught: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, out = tmp_path / "data", tmp_path / "run"
    shutil.copytree(dataset, data)
    shutil.copytree(taught / "teachers", out / "teachers")
    hashed = count(monkeypatch, hashlib, "file_digest", lambda file: Path(file.name))
    decoded = count(monkeypatch, examples_module, "load_image", Path)
    train(make_config(random_base, data, out, "train.max_train_steps=1", "train.coarse_steps=0"))
    images = {path.resolve() for path in data.rglob("*.png")}
    teachers = {path.resolve() for path in (out / "teachers").glob("*.safetensors")}
    assert len(images) == 15 and len(teachers) == 2
    assert hashed == Counter(dict.fromkeys(images | teachers, 1))
    assert decoded == Counter(dict.fromkeys(images, 1))


def test_open_workspace_encodes_what_the_check_found(
    random_base: Path, dataset: Path, taught: Path, tmp_path: Path
) -> None:
    """The metadata is not read again: it may be gone by then."""
    data = tmp_path / "data"
    shutil.copytree(dataset, data)
    run = check_training(make_config(random_base, data, taught)).first_pairs(1)
    (data / "general" / "metadata.jsonl").unlink()
    workspace = open_workspace(run, Console(quiet=True))
    assert {name: len(found) for name, found in workspace.effects.items()} == {"warm": 1, "cold": 1}
    assert [example.sources for example in workspace.general] == [pair.sources for pair in run.general]
    assert set(workspace.hashes) == {"base", "pairs of warm", "pairs of cold", "general data"}
    with pytest.raises(AttributeError):
        workspace.effects = {}  # type: ignore[misc]


def test_open_workspace_says_what_the_check_warned_of(random_base: Path, tmp_path: Path) -> None:
    config = make_config(random_base, tmp_path / "none", tmp_path / "run", effects=False)
    console = Console(file=io.StringIO(), record=True, width=40)
    run = CheckedRun(config, {}, [], {}, ("train.lr_warmup_steps: is [too] long for the stage that it is in",))
    workspace = open_workspace(run, console)
    assert console.export_text().splitlines()[0] == f"warning: {run.warnings[0]}"  # whole, and its brackets too
    assert workspace.effects == {} and workspace.general == []


def test_open_base_reads_no_data_and_keeps_the_encoders(random_base: Path, tmp_path: Path) -> None:
    """Effects may lack pairs and teachers: whoever opens a base samples from it."""
    config = make_config(random_base, tmp_path / "none", tmp_path / "run")
    base = open_base(config, Console(quiet=True))
    assert base.config == config.with_targets(base.backbone.default_targets) and base.backbone.adapters is base.adapters
    assert base.backbone.pipeline.text_encoder is not None
    assert not (tmp_path / "run").exists()
    linears = [
        name
        for name in linear_shapes(random_base)
        if name.endswith(tuple(f".{target}" for target in base.config.student.targets))
    ]
    assert set(base.adapters.module_shapes) == set(linears)
    assert all(not p.requires_grad for p in base.backbone.transformer.parameters())
    assert base.backbone.dtype == torch.float32

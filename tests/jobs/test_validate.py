"""Validation of a configuration and of everything it names."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import clora.distill.check as checking
from clora.config import build_config
from clora.jobs.validate import Report, validate, validate_config, validate_file

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "qwen_image_edit_2509_50in1.yaml"


def lora(path: Path, **extra: torch.Tensor) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    prefix = "diffusion_model.transformer_blocks.0.attn.to_q"
    tensors = {f"{prefix}.lora_A.weight": torch.ones(2, 48), f"{prefix}.lora_B.weight": torch.ones(48, 2)}
    save_file({**tensors, **extra}, path)
    return path


def picture(path: Path, size: tuple[int, int] = (8, 8)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(path)
    return path


@pytest.fixture
def home(tmp_path: Path, random_base: Path) -> Path:
    """A folder with a base (without its weights), two effects and general data, all sound."""
    shutil.copytree(random_base, tmp_path / "base", ignore=shutil.ignore_patterns("*.safetensors"))
    for name in ("clay", "felt"):
        lora(tmp_path / "loras" / f"{name}.safetensors")
        for stem in "ab":
            picture(tmp_path / "pairs" / name / "source" / f"{stem}.png")
            picture(tmp_path / "pairs" / name / "target" / f"{stem}.png")
    picture(tmp_path / "general" / "x.jpg")
    row = {"source_image": "x.jpg", "instruction": "make the sky red"}
    (tmp_path / "general" / "metadata.jsonl").write_text(json.dumps(row))
    return tmp_path


def values(**changes: Any) -> dict[str, Any]:
    effects = [
        {"name": name, "lora": f"loras/{name}.safetensors", "prompt": f"make it {name}", "pairs": f"pairs/{name}"}
        for name in ("clay", "felt")
    ]
    whole = {"base": "./base", "output_dir": "out", "effects": effects, "general": {"pairs": "general"}}
    return {**whole, **changes}


def report(home: Path, *overrides: str, **changes: Any) -> Report:
    return validate(build_config(values(**changes), home, overrides))


def test_a_sound_configuration_has_no_fault(home: Path) -> None:
    found = report(home)
    assert (found.faults, found.warnings, found.ok) == ([], [], True)
    assert (found.num_effects, found.num_pairs, found.num_images) == (2, 5, 9)
    assert json.loads(json.dumps(found.to_json())) == {
        "ok": True, "faults": [], "warnings": [], "num_effects": 2, "num_pairs": 5, "num_images": 9
    }  # fmt: skip


def test_the_shipped_example_names_what_to_bring_in_three_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checking.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(checking, "try_to_load_from_cache", lambda *_, **__: None)
    found = validate_file(EXAMPLE)
    assert found.num_effects == 50
    assert found.faults == [
        "50 LoRA files missing under loras/, first: clay_figure.safetensors (effects.0.lora);"
        " put them there or correct the paths",
        "50 datasets missing under pairs/, first: clay_figure (effects.0.pairs); put them there or correct the paths",
        "general.pairs: dataset general/metadata.jsonl is missing; put it there or correct the path",
    ]
    assert found.warnings == [
        "base: Qwen/Qwen-Image-Edit-2509 is not in the local hub cache; the first run downloads it"
    ]


def test_a_hub_base_is_looked_for_in_the_local_cache_only(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str, str | None]] = []

    def look(repository: str, name: str, revision: str | None = None) -> str | None:
        asked.append((repository, name, revision))
        return "/cache/model_index.json" if revision == "abc" else None

    monkeypatch.setattr(checking, "try_to_load_from_cache", look)
    monkeypatch.setattr(checking.constants, "HF_HUB_OFFLINE", True)
    (fault,) = report(home, base="owner/name").faults
    assert "owner/name is not in the local hub cache and HF_HUB_OFFLINE is set" in fault
    assert report(home, base={"model": "owner/name", "revision": "abc"}).faults == []
    assert asked == [("owner/name", "model_index.json", None), ("owner/name", "model_index.json", "abc")]


@pytest.mark.parametrize("base", ["./nowhere", "./pairs", "what is this"])
def test_a_base_that_is_none_is_a_fault(home: Path, base: str) -> None:
    (fault,) = report(home, base=base).faults
    assert fault.startswith("base: ")


def test_missing_files_are_grouped_by_folder(home: Path) -> None:
    shutil.rmtree(home / "loras")
    shutil.rmtree(home / "pairs" / "felt")
    assert report(home).faults == [
        "2 LoRA files missing under loras/, first: clay.safetensors (effects.0.lora);"
        " put them there or correct the paths",
        "effects.1.pairs: dataset pairs/felt is missing; put it there or correct the path",
    ]


def test_bad_lora_files_are_named_with_their_keys(home: Path) -> None:
    lora(home / "loras" / "clay.safetensors", **{"lycoris.mystery": torch.ones(1)})
    (home / "loras" / "felt.safetensors").write_bytes(b"\x80\x04pickle of something")
    faults = report(home).faults
    assert len(faults) == 2
    assert faults[0].startswith("effects.0.lora: ") and "lycoris.mystery" in faults[0]
    assert faults[1].startswith("effects.1.lora: ") and "pickle" in faults[1]


def test_one_lora_for_two_effects_and_a_missing_start_are_told(home: Path) -> None:
    absent = ("student.init_from=start.safetensors", "student.acceleration=fast.safetensors")
    found = report(home, "effects.1.lora=loras/clay.safetensors", *absent)
    assert found.warnings == ["loras/clay.safetensors is the LoRA of effects.0.lora and effects.1.lora; is that meant?"]
    assert found.faults == [
        "2 LoRA files missing under ./, first: start.safetensors (student.init_from);"
        " put them there or correct the paths"
    ]


def test_damaged_images_are_each_listed_once(home: Path) -> None:
    for path in (home / "pairs/clay/source/a.png", home / "general/x.jpg"):
        raw = path.read_bytes()
        path.write_bytes(raw[: len(raw) * 2 // 3])
    (home / "general" / "metadata.jsonl").write_text('{"source_image": "x.jpg", "instruction": "i"}\n' * 3)
    faults = report(home).faults
    assert [fault.split(": ")[0] for fault in faults] == ["effects.0.pairs", "general.pairs"]
    assert "source/a.png is damaged or cut off" in faults[0] and "x.jpg is damaged" in faults[1]


def test_faults_of_datasets_carry_their_key(home: Path) -> None:
    (home / "pairs/clay/target/b.png").unlink()
    (home / "general" / "metadata.jsonl").write_text('{"source_image": "../base/model_index.json"}\n{\n')
    (home / "pairs/felt/source/c.png").symlink_to("/etc/hostname")
    faults = report(home).faults
    assert [fault.split(":")[0] for fault in faults] == [
        "effects.0.pairs", "effects.1.pairs", "general.pairs", "general.pairs"
    ]  # fmt: skip
    assert "image 'b' has no partner in target/" in faults[0]
    assert "leads outside" in faults[1] and "line 2: not valid JSON" in faults[2] and "leads outside" in faults[3]


def test_general_rows_need_instructions(home: Path) -> None:
    (home / "general" / "metadata.jsonl").write_text('{"source_image": "x.jpg"}\n')
    (fault,) = report(home).faults
    assert fault.endswith("metadata.jsonl line 1 has no instruction; add it") and "general.pairs" in fault


def test_general_may_be_left_out_only_without_its_stream(home: Path) -> None:
    (fault,) = report(home, general=None).faults
    assert fault == "general: is missing; set general.pairs to images with instructions, or objective.p_switch=1"
    assert report(home, "objective.p_switch=1", general=None).faults == []


def test_effects_need_pairs_and_teaching_needs_targets(home: Path) -> None:
    shutil.rmtree(home / "pairs/felt/target")
    effects = [
        {"name": "clay", "prompt": "p", "pairs": "pairs/clay"},
        {"name": "felt", "prompt": "p", "pairs": "pairs/felt"},
        {"name": "bare", "prompt": "p"},
        {"name": "half", "prompt": "p", "lora": "loras/clay.safetensors"},
    ]
    found = report(home, effects=effects)
    assert found.faults[:2] == [
        "effects.2 (bare): has no pairs; name a folder or file of source images and targets, to teach it from",
        "effects.3 (half): has no pairs; name a folder or file of source images",
    ]
    assert len(found.faults) == 3 and found.faults[2].startswith("effects.1.pairs: ")
    assert found.warnings == ["3 effects without a teacher, first: clay; run `clora teach` before `clora train`"]
    # Once taught, sources are enough.
    lora(home / "out" / "teachers" / "felt.safetensors")
    (home / "pairs" / "felt" / "rows.jsonl").write_text('{"source_image": "source/a.png"}\n')
    effects[1]["pairs"] = "pairs/felt/rows.jsonl"
    assert report(home, effects=effects[:2]).faults == []


def test_without_effects_there_must_be_general_data(home: Path) -> None:
    assert report(home, effects=[]).faults == []
    (fault,) = report(home, "objective.p_switch=1", effects=[], general=None).faults
    assert fault.startswith("general: is missing")


def test_long_prompts_are_faults_where_tokens_can_be_counted(home: Path) -> None:
    config = build_config(values(), home, ["effects.1.prompt=" + "word " * 600])
    faults = validate_config(config)
    assert [fault.split(":")[0] for fault in faults] == ["effects.1.prompt", "effects.1.student_prompt"]
    assert all("tokens, more than the" in fault and fault.endswith("shorten it") for fault in faults)
    (home / "base" / "model_index.json").unlink()  # a base that is not there has no tokens to count
    assert all("tokens" not in fault for fault in validate_config(config))


def test_lora_files_are_held_against_the_base(home: Path) -> None:
    save_file({"diffusion_model.transformer_blocks.0.attn.to_q.lora_A.weight": torch.ones(2, 8),
               "diffusion_model.transformer_blocks.0.attn.to_q.lora_B.weight": torch.ones(48, 2)},
              home / "loras" / "clay.safetensors")  # fmt: skip
    (fault,) = report(home).faults
    assert "clay.safetensors" in fault and "to_q" in fault


def test_lora_files_are_held_against_a_known_base_that_is_not_here(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The small files fit the small base of the other tests, and none of the 3072 wide linears of the real one."""
    monkeypatch.setattr(checking.constants, "HF_HUB_OFFLINE", False)
    found = report(home, base="Qwen/Qwen-Image-Edit-2511")
    assert [fault.split(":")[0] for fault in found.faults] == ["effects.0.lora", "effects.1.lora"]
    assert all("to_q" in fault and "3072" in fault for fault in found.faults)
    assert "not in the local hub cache" in found.warnings[0]
    assert report(home, base="owner/of-unknown-shapes").faults == []


def test_what_a_lora_file_holds_besides_is_a_warning(home: Path) -> None:
    lone = {"diffusion_model.transformer_blocks.0.attn.to_k.alpha": torch.tensor(4.0)}
    lora(home / "loras" / "clay.safetensors", **lone)
    found = report(home)
    assert found.faults == []
    (warning,) = found.warnings
    assert warning.startswith("effects.0.lora: ") and "to_k.alpha belongs to no matrix" in warning


def test_folders_are_checked(home: Path) -> None:
    (home / "file").touch()
    found = report(home, "output_dir=file/out", "data_roots=[nowhere]", "train.buckets.max_area=100")
    assert found.faults == [
        f"data_roots.0: {home / 'nowhere'} is not a folder; correct it",
        f"output_dir: {home / 'file'} is a file; choose another folder",
        "train.buckets: no 1:1 size of multiples of 32 fits into 100 pixels; raise max_area",
    ]


def test_pairs_of_different_shape_and_runs_without_a_fine_stage_are_warned_of(home: Path) -> None:
    picture(home / "pairs/clay/target/a.png", (8, 9))
    picture(home / "pairs/clay/target/b.png", (16, 16))  # the same shape, larger: no shift
    found = report(home, "train.max_train_steps=500")
    assert found.faults == []
    assert found.warnings == [
        "train.coarse_steps is not below train.max_train_steps: every update is coarse, none has a critic",
        "effects.0.pairs: 1 pair with source and target of different shape, first: target/a;"
        " the crop will shift one against the other",
    ]


def test_schedules_that_do_not_fit_their_stages_are_warned_of(home: Path) -> None:
    """What once made the demo's full stage have no effect; each with its key and its mend."""
    short = ("train.max_train_steps=620", "train.coarse_steps=600", "train.ema_start=50", "train.ema_decay=0.98")
    found = report(home, *short, "train.lr_warmup_steps=20")
    assert found.faults == [] and [warning.split(": ")[0] for warning in found.warnings] == [
        "train.lr_warmup_steps", "train.ema_start"
    ]  # fmt: skip
    assert "the full stage has 20 updates" in found.warnings[0] and "set it to 600" in found.warnings[1]
    # Teaching's are told only where there is something to teach.
    assert report(home, "teach.max_train_steps=10").warnings == []
    taught = report(home, "teach.max_train_steps=10", "effects.1.lora=null").warnings
    assert taught[0].startswith("teach.lr_warmup_steps: 50, but the run has 10 updates")


def test_a_base_that_is_cached_in_part_is_a_warning(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a base in the local cache everything is checked as of a folder; what is missing there is downloaded yet."""
    monkeypatch.setattr(checking, "try_to_load_from_cache", lambda *_, **__: str(home / "base" / "model_index.json"))
    found = report(home, "effects.1.prompt=" + "word " * 600, base="owner/name")
    assert [fault.split(":")[0] for fault in found.faults] == ["effects.1.prompt", "effects.1.student_prompt"]
    shutil.rmtree(home / "base" / "tokenizer")
    found = report(home, base="owner/name")
    assert found.faults == [] and len(found.warnings) == 1
    assert found.warnings[0].startswith("base: the local hub cache has not all of owner/name (")


def test_teachers_that_were_taught_are_checked(home: Path) -> None:
    teacher = lora(home / "out" / "teachers" / "felt.safetensors")
    assert report(home, "effects.1.lora=null").ok
    teacher.write_bytes(teacher.read_bytes()[:-1])
    (fault,) = report(home, "effects.1.lora=null").faults
    assert fault.startswith(f"effects.1 (felt): {teacher}: cut off (")


def test_a_base_may_bring_its_own_general_data(home: Path) -> None:
    (home / "base" / "clora.json").write_text('{"general": "own_general"}')
    assert report(home, general=None).faults[0].startswith("general: is missing")
    (home / "base" / "own_general").mkdir()
    (fault,) = report(home, general=None).faults
    assert fault.startswith("general data of base ") and "holds no pairs" in fault
    shutil.copytree(home / "general", home / "base" / "own_general", dirs_exist_ok=True)
    found = report(home, general=None)
    assert (found.faults, found.num_pairs) == ([], 4)  # counted are the configuration's


def test_validate_file_reports_faults_of_the_file_itself(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("output_dir: o\nefects: []\ntrain: {batch_size: 0}\n")
    found = validate_file(path)
    assert not found.ok and len(found.faults) == 2
    assert "did you mean 'effects'?" in "\n".join(found.faults)
    assert "does not exist" in validate_file(tmp_path / "none.yaml").faults[0]
    assert "must read key=value" in validate_file(path, ["x"]).faults[0]

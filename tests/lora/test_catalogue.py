"""The catalogue in a collection's header: what is written is what every reader gets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from safetensors import safe_open

from clora.errors import InputError, InputErrors
from clora.lora.catalogue import Catalogue, CatalogueEntry, describe_file, read_catalogue, write_collection
from clora.lora.convert import convert_lora
from clora.lora.files import read_lora, write_lora
from clora.lora.module import LoraModule

MODULES = {"transformer_blocks.0.attn.to_q": LoraModule(torch.ones(2, 3), torch.ones(3, 2), 1.0)}


def catalogue(**changes: Any) -> Catalogue:
    effects = [
        {
            "name": "clay",
            "trigger": "<clay_Ab1>",
            "student_prompt": "make it clay",
            "teacher_sha256": "0" * 64,
        },
        {"name": "manga tone", "trigger": "idem-thence", "student_prompt": "grey screen tones"},
    ]
    fields = {"base": "tiny", "schedule": {"num_steps": 8, "shift": 3.0}, "effects": effects}
    return Catalogue.model_validate(fields | changes)


def test_write_collection_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "collection.safetensors"
    sha256 = write_collection(path, MODULES, catalogue(), {"author": "me"})
    assert read_catalogue(path) == catalogue()
    file = read_lora(path)
    assert file.layout == "comfyui" and file.sha256 == sha256 and file.metadata["author"] == "me"
    with safe_open(path, "pt") as stock:  # any reader of safetensors finds it
        assert json.loads(stock.metadata()["clora.catalogue"])["effects"][1]["name"] == "manga tone"
    convert_lora(path, tmp_path / "kohya.safetensors", "kohya")
    assert read_catalogue(tmp_path / "kohya.safetensors") == catalogue()


text = st.text(st.characters(codec="utf-8"), min_size=1, max_size=20).filter(str.strip)


@given(name=text, trigger=text, prompt=text)
def test_write_collection_any_text(
    tmp_path_factory: pytest.TempPathFactory, name: str, trigger: str, prompt: str
) -> None:
    path = tmp_path_factory.mktemp("c") / "collection.safetensors"
    written = catalogue(effects=[{"name": name, "trigger": trigger, "student_prompt": prompt}])
    write_collection(path, MODULES, written)
    assert read_catalogue(path) == written


@pytest.mark.parametrize(
    ("trigger", "prompt", "read"),
    [
        ("<clay_Ab1>", "make it clay", "<clay_Ab1>make it clay"),
        ("idem-thence", "make it clay", "idem-thence make it clay"),
        ("idem-thence", "idem-thence make it clay", "idem-thence make it clay"),
        ("", "make it clay", "make it clay"),
    ],
)
def test_entry_prompt_has_the_trigger_once(trigger: str, prompt: str, read: str) -> None:
    assert CatalogueEntry(name="clay", trigger=trigger, student_prompt=prompt).prompt == read


def test_effect_unknown_names_the_nearest() -> None:
    assert catalogue().effect("clay").trigger == "<clay_Ab1>"
    with pytest.raises(InputError, match="effect 'manga' is not in the collection; did you mean 'manga tone'"):
        catalogue().effect("manga")
    with pytest.raises(InputError, match="known: clay, manga tone"):
        catalogue().effect("zzzz")


@pytest.mark.parametrize(
    "changes",
    [
        {"effects": []},
        {"extra": 1},
        {"schedule": {"num_steps": 0, "shift": 3.0}},
        {"schedule": {"num_steps": 8, "shift": float("nan")}},
        {"effects": [{"name": n, "trigger": "x", "student_prompt": "p"} for n in "ab"]},
        {"effects": [{"name": "a", "student_prompt": "p"}, {"name": "a", "student_prompt": "q"}]},
        {"effects": [{"name": "a", "trigger": "", "student_prompt": " "}]},
        {"effects": [{"name": "a", "student_prompt": "p", "teacher_sha256": "beef"}]},
    ],
)  # fmt: skip
def test_catalogue_refuses(changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        catalogue(**changes)


def test_read_catalogue_faults(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"

    def write(value: str | None) -> None:
        write_lora(path, MODULES, {} if value is None else {"clora.catalogue": value})

    write(None)
    with pytest.raises(InputError, match="carries no catalogue"):
        read_catalogue(path)
    for value, message in (
        ("{", "no JSON"),
        ("[]", "catalogue format None"),
        ('{"format_version": 2}', "format 2"),
    ):
        write(value)
        with pytest.raises(InputError, match=message):
            read_catalogue(path)
        assert "effects" not in describe_file(path) and describe_file(path)["lora"]["faults"]
    raw = catalogue().model_dump()
    raw["effects"][0]["name"] = ""
    raw["schedule"]["shift"] = -1
    write(json.dumps(raw))
    with pytest.raises(InputErrors) as caught:
        read_catalogue(path)
    assert len(caught.value.faults) == 2
    assert any("schedule.shift" in fault for fault in caught.value.faults)
    assert any("effects.0.name" in fault for fault in caught.value.faults)


def test_describe_file_is_what_inspect_prints(tmp_path: Path) -> None:
    path = tmp_path / "collection.safetensors"
    write_collection(path, MODULES, catalogue())
    found = json.loads(json.dumps(describe_file(path)))
    assert found["effects"][0]["trigger"] == "<clay_Ab1>" and found["base"] == "tiny"
    assert found["schedule"] == {"num_steps": 8, "shift": 3.0} and found["sampler"] == "consistency"
    assert found["lora"]["faults"] == [] and found["lora"]["num_modules"] == 1
    write_lora(path, MODULES)
    assert list(describe_file(path)) == ["lora"]

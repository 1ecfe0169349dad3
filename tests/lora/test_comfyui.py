"""comfyui: a collection's workflow samples at the catalogue's noise levels, and is linked as ComfyUI wants it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from clora.config import collection_lora
from clora.jobs.convert import convert
from clora.lora.catalogue import Catalogue, read_catalogue
from clora.lora.comfyui import exact_steps, workflow
from clora.lora.files import read_lora
from clora.method.flow import few_step_sigmas


def comfy_sigmas(steps: int, shift: float) -> torch.Tensor:
    """ComfyUI's scheduler "simple" over the table of its model sampling for flow models, restated."""
    t = torch.arange(1, 1001, dtype=torch.float64) / 1000
    table = shift * t / (1 + (shift - 1) * t)
    return torch.stack([table[-(1 + int(i * 1000 / steps))] for i in range(steps)])


@pytest.mark.parametrize("steps", [1, 4, 5, 8, 10, 20])
def test_workflow_has_the_very_noise_levels(steps: int) -> None:
    assert exact_steps(steps)
    assert torch.allclose(comfy_sigmas(steps, 3.0), few_step_sigmas(steps, 3.0).double(), atol=1e-6, rtol=0)


def test_exact_steps_knows_which_are_not() -> None:
    assert not exact_steps(6)
    off = (comfy_sigmas(6, 1.0) - few_step_sigmas(6, 1.0).double()).abs().max()
    assert 1e-4 < off <= 1e-3


def test_convert_to_comfyui_writes_a_collections_workflow(tmp_path: Path) -> None:
    source = collection_lora("tiny")
    assert source is not None
    catalogue, target = read_catalogue(source), tmp_path / "out.safetensors"
    done = convert(source, target, "comfyui")
    place = tmp_path / "out.workflow.json"
    assert any(str(place) in note for note in done.notes)
    nodes = json.loads(place.read_text())
    for number, one in nodes.items():
        for value in one["inputs"].values():
            assert not isinstance(value, list) or (value[0] in nodes and value[0] != number and value[1] == 0)
    by_kind = {one["class_type"]: one["inputs"] for one in nodes.values()}
    sampler = by_kind["KSampler"]
    assert (sampler["steps"], sampler["cfg"], sampler["scheduler"], sampler["denoise"]) == (8, 1.0, "simple", 1.0)
    assert sampler["sampler_name"] == "lcm" and by_kind["ModelSamplingAuraFlow"]["shift"] == 3.0
    assert by_kind["LoraLoaderModelOnly"]["lora_name"] == "out.safetensors"
    assert by_kind["TextEncodeQwenImageEditPlus"]["prompt"] == catalogue.effects[0].prompt
    assert read_lora(target).layout == "comfyui"
    assert "FluxKontextMultiReferenceLatentMethod" not in by_kind


def test_convert_of_a_plain_lora_writes_no_workflow(tmp_path: Path) -> None:
    source = collection_lora("tiny")
    assert source is not None
    convert(source.parent / "acceleration.safetensors", tmp_path / "out.safetensors", "comfyui")
    convert(source, tmp_path / "other.safetensors", "kohya")
    assert {path.name for path in tmp_path.iterdir()} == {"out.safetensors", "other.safetensors"}


def test_workflow_of_2511_puts_references_at_level_zero() -> None:
    source = collection_lora("tiny")
    assert source is not None
    values = read_catalogue(source).model_dump() | {"base": "Qwen/Qwen-Image-Edit-2511", "sampler": "euler"}
    catalogue = Catalogue.model_validate(values)
    nodes = workflow(catalogue, catalogue.effects[0], Path("x.safetensors"))
    by_kind = {one["class_type"]: (number, one["inputs"]) for number, one in nodes.items()}
    number, inputs = by_kind["FluxKontextMultiReferenceLatentMethod"]
    assert inputs["reference_latents_method"] == "index_timestep_zero"
    assert by_kind["KSampler"][1]["positive"] == [number, 0] and by_kind["KSampler"][1]["sampler_name"] == "euler"

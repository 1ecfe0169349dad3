"""merged: stock diffusers loads the folder and makes what `clora edit` makes, without a LoRA or our code."""

from __future__ import annotations

import ast
import functools
import importlib.util
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import QwenImageEditPlusPipeline, QwenImageTransformer2DModel
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as stock
from PIL import Image
from transformers import Qwen2Tokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from clora.backbones.qwen_image.pipeline import StillImageProcessor, pass_token_types
from clora.config import collection_lora, read_sidecar
from clora.errors import InputError
from clora.export import verify as verifying
from clora.export.artefact import check_sampling, open_artefact
from clora.export.manifest import list_files, read_manifest, write_manifest
from clora.export.snippet import SNIPPET, write_snippet
from clora.export.verify import picture, verify
from clora.inference.editor import load_editor
from clora.lora.files import read_lora


def test_write_merged_folder_is_the_editors_image_in_stock_diffusers(
    merged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stock, "VAE_IMAGE_SIZE", 64 * 64)
    monkeypatch.setattr(stock, "CONDITION_IMAGE_SIZE", 64 * 64)
    # The stock processor needs torchvision for videos; ours is the same without them.
    processor = StillImageProcessor(
        image_processor=Qwen2VLImageProcessorPil.from_pretrained(merged / "processor"),
        tokenizer=Qwen2Tokenizer.from_pretrained(merged / "tokenizer"),
    )
    pipeline = QwenImageEditPlusPipeline.from_pretrained(merged, processor=processor, dtype=torch.float32)
    pass_token_types(pipeline.text_encoder)
    pipeline.set_progress_bar_config(disable=True)
    editor = load_editor("tiny", collection_lora("tiny"), "cpu", torch.float32)
    assert editor.catalogue is not None
    effect, image = editor.catalogue.effects[3], picture(5)
    generator = torch.Generator().manual_seed(11)
    pipeline.scheduler.step = functools.partial(pipeline.scheduler.step, generator=generator)
    made = pipeline(
        image=[image], prompt=effect.prompt, width=64, height=64, sigmas=np.linspace(1, 1 / 8, 8).tolist(),
        num_inference_steps=8, generator=generator, true_cfg_scale=1.0,
    ).images[0]  # fmt: skip
    wanted = editor.edit([image], [effect.name], seeds=[11])[0]
    assert pixels(made, wanted) <= 2
    assert pixels(made, image) > 20


def test_write_snippet_makes_the_editors_image(merged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The program itself, as a user runs it, but for its last three lines."""
    for name in ("VAE_IMAGE_SIZE", "CONDITION_IMAGE_SIZE"):
        monkeypatch.setattr(stock, name, getattr(stock, name))  # it sets them for its own process
    spec = importlib.util.spec_from_file_location("snippet", merged / SNIPPET)
    assert spec is not None and spec.loader is not None
    snippet = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(snippet)
    editor = load_editor("tiny", collection_lora("tiny"), "cpu", torch.float32)
    assert editor.catalogue is not None
    effect, image = editor.catalogue.effects[3], picture(5)
    pipeline = snippet.load("cpu")
    pipeline.set_progress_bar_config(disable=True)
    for seed in (11, 12):  # the second as well: each has its own noise
        made = snippet.edit(pipeline, image, effect.prompt, seed)
        assert pixels(made, editor.edit([image], [effect.name], seeds=[seed])[0]) <= 2
    assert pixels(made, image) > 20 and effect.prompt in (snippet.__doc__ or "")


def test_write_snippet_holds_no_code_of_a_catalogue(tmp_path: Path) -> None:
    name, prompt = 'x""" + quit() + """', 'a\\" """\nimport os\nos.abort()\n"""'
    write_snippet(tmp_path, {name: prompt}, 8, "float32", 4096, 4096)
    tree = ast.parse((tmp_path / SNIPPET).read_text())
    assert isinstance(tree.body[0], ast.Expr) and "os.abort()" in str(ast.get_docstring(tree))
    calls = {node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    imported = {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    assert "pipeline" in calls and "quit" not in calls and "torch" in imported and "os" not in imported


def pixels(a: Image.Image, b: Image.Image) -> int:
    return int(np.abs(np.asarray(a, np.int16) - np.asarray(b, np.int16)).max())


def test_write_merged_weights_are_the_sums(merged: Path) -> None:
    lora = collection_lora("tiny")
    assert lora is not None
    modules = read_lora(lora).modules
    base = Path(lora).parent / "transformer"
    before = QwenImageTransformer2DModel.from_pretrained(base, dtype=torch.float32).state_dict()
    after = QwenImageTransformer2DModel.from_pretrained(merged / "transformer").state_dict()
    assert before.keys() == after.keys()
    for key, value in after.items():
        assert value.dtype == torch.float32
        module = modules.get(key.removesuffix(".weight")) if key.endswith(".weight") else None
        exact = before[key].double() + (0 if module is None else module.delta())
        assert (value - exact).abs().max() <= 5e-7 * exact.abs().max()


def test_write_merged_keeps_sizes_and_leaves_data_with_the_base(merged: Path) -> None:
    sidecar = read_sidecar(merged)
    assert (sidecar.vae_image_area, sidecar.default_size, sidecar.preset) == (4096, (64, 64), "tiny")
    assert sidecar.general is sidecar.acceleration is sidecar.collection is None
    files = set(read_manifest(merged).files)
    assert not any(name.startswith("general") or "acceleration" in name for name in files)
    assert {"model_index.json", "vae/config.json", "text_encoder/model.safetensors"} <= files


def test_export_manifest_says_what_was_measured(merged: Path) -> None:
    manifest = read_manifest(merged)
    assert (manifest.format, manifest.base, manifest.num_steps, manifest.shift) == ("merged", "tiny", 8, 3.0)
    parity = manifest.parity
    assert parity["ok"] and 0 < parity["velocity"] <= 3e-6 and parity["padding"] == 0 and parity["pixel"] <= 1
    assert manifest.rounding == 0.0 and len(manifest.catalogue["effects"]) == 50


def test_verify_sees_another_model(merged: Path, tmp_path: Path) -> None:
    """An artefact whose weights and hashes were both replaced is whole, and still not the model."""
    other = tmp_path / "other"
    shutil.copytree(merged, other)
    base = collection_lora("tiny").parent  # type: ignore[union-attr]
    weights = "diffusion_pytorch_model.safetensors"
    shutil.copy(base / "transformer" / weights, other / "transformer" / weights)  # the base without its collection
    write_manifest(other, read_manifest(other).model_copy(update={"files": list_files(other)}))
    opened = open_artefact(other, device="cpu")
    parity = verify(opened, num_edits=1)
    assert len(parity.faults) == 2 and parity.velocity > 0.01 and parity.pixel > 20 and parity.padding == 0
    velocities = verify(opened, num_edits=0)
    assert len(velocities.faults) == 1 and velocities.velocity == parity.velocity and velocities.effects == ()


@pytest.mark.parametrize(("precision", "tries"), [("float32", ["cpu"]), ("bfloat16", ["cuda", "cpu"])])
def test_compare_takes_the_cpu_for_fp32_and_where_a_gpu_has_no_room(
    precision: str, tries: list[str], merged: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The eager model and the artefact are then both there."""
    asked = []

    def compared(artefact: torch.device, *_: object) -> str:
        asked.append(artefact.type)
        if artefact.type == "cuda":
            raise torch.OutOfMemoryError
        return "compared"

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(verifying, "open_files", lambda folder, manifest, base, device: device)
    monkeypatch.setattr(verifying, "verify", compared)
    manifest = read_manifest(merged).model_copy(update={"precision": precision})
    assert verifying.compare(merged, manifest, None, 1, 0, print) == "compared"
    assert asked == tries and ("has no room for the eager model" in caplog.text) == (len(tries) > 1)


def test_check_sampling_refuses_other_steps_and_guidance(merged: Path, random_base: Path) -> None:
    manifest = read_manifest(merged)
    check_sampling(merged, manifest, None, None)
    check_sampling(merged, manifest, 8, 1.0)
    with pytest.raises(InputError, match=r"holds the modulation of 8 steps \(shift 3\), not of 4; leave --steps out"):
        check_sampling(merged, manifest, 4, None)
    with pytest.raises(InputError, match="guidance: .* samples without it, 3 was given"):
        check_sampling(merged, manifest, None, 3.0)
    with pytest.raises(InputError, match=r"is not what .* was exported from; give that one with --base"):
        verify(open_artefact(merged, device="cpu"), str(random_base))

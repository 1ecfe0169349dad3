"""The shipped base: small enough, a stock pipeline, a faithful autoencoder, text that keeps its words."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bench.lab.tiny_base import reconstruction
from clora.backbones.load import linear_shapes, load_backbone
from clora.backbones.qwen_image.backbone import QwenImageBackbone
from clora.backbones.qwen_image.pipeline import StillImageProcessor
from clora.config import acceleration_lora, collection_lora, default_preset, general_data, resolve_base
from clora.data.pairs import read_pairs
from clora.inference.edit_prompts import find_catalogue
from clora.lora.catalogue import read_catalogue
from clora.lora.files import read_lora
from clora.tiny.effects import EFFECTS, apply_effect
from clora.tiny.images import to_uint8
from clora.tiny.recipe.train_base import encode_latents, encode_texts
from clora.tiny.world.scenes import render, sample_scene

BASE = resolve_base("tiny")
SCENES = [to_uint8(render(sample_scene(40_000_000_000 + seed)).image_HW3) for seed in range(16)]


@pytest.fixture(scope="module")
def backbone() -> QwenImageBackbone:
    return load_backbone("tiny", "cpu", torch.float32)


def test_base_is_at_most_12_megabytes() -> None:
    assert isinstance(BASE, Path)
    parts = ("vae", "text_encoder", "tokenizer", "processor", "scheduler", "transformer", "general")
    size = sum(path.stat().st_size for part in parts for path in (BASE / part).rglob("*") if path.is_file())
    assert size <= 12e6


def test_base_brings_along_what_its_sidecar_names() -> None:
    assert default_preset("tiny") == "tiny"
    general = general_data("tiny")
    assert general is not None
    pairs = read_pairs(general, require_target=False)
    assert len(pairs) >= 200 and all(pair.prompt for pair in pairs)
    fast, collection = acceleration_lora("tiny"), collection_lora("tiny")
    assert fast is not None and collection is not None and {fast.parent, collection.parent} == {BASE}
    assert all(read_lora(path, linear_shapes("tiny")).modules for path in (fast, collection))
    assert find_catalogue(fast) is None and read_catalogue(collection).base == "tiny"


def test_vae_reconstructs_held_out_scenes(backbone: QwenImageBackbone) -> None:
    assert reconstruction(backbone, SCENES) >= 33


@pytest.mark.slow
def test_vae_reconstructs_every_effect(backbone: QwenImageBackbone) -> None:
    rendered = [render(sample_scene(40_000_000_000 + seed)) for seed in range(6)]
    psnr = {}
    for name, effect in EFFECTS.items():
        outcomes = [apply_effect(effect, scene, np.random.default_rng(k)) for k, scene in enumerate(rendered)]
        psnr[name] = reconstruction(backbone, [to_uint8(image) for image in outcomes])
    assert {name: value for name, value in psnr.items() if value < 28} == {}


def test_encode_latents_is_the_backbones_encoding(backbone: QwenImageBackbone) -> None:
    expected, _ = backbone.encode_images([Image.fromarray(scene) for scene in SCENES], (64, 64))
    torch.testing.assert_close(encode_latents(backbone, np.stack(SCENES)).float(), expected, rtol=1e-3, atol=2e-3)


def test_encode_texts_is_the_backbones_encoding(backbone: QwenImageBackbone) -> None:
    prompts = ["flip the image left to right", "tint the image red", ""]
    padded, lengths = encode_texts(backbone, prompts, np.stack(SCENES[:3]))
    expected = backbone.encode_prompts(prompts, [[Image.fromarray(scene)] for scene in SCENES[:3]])
    assert lengths.tolist() == [len(one) for one in expected]
    for row, length, one in zip(padded, lengths.tolist(), expected, strict=True):
        torch.testing.assert_close(row[:length].float(), one, rtol=1e-3, atol=2e-3)
        assert not row[length:].any()


def test_latents_are_normalised(backbone: QwenImageBackbone) -> None:
    latents, _ = backbone.encode_images([Image.fromarray(scene) for scene in SCENES], (64, 64))
    assert 0.6 < latents.std().item() < 1.6 and abs(latents.mean().item()) < 0.3


def _features(backbone: QwenImageBackbone, prompts: list[str]) -> list[torch.Tensor]:
    picture = Image.fromarray(SCENES[0])
    return backbone.encode_prompts(prompts, [[picture]] * len(prompts))


def test_text_features_keep_the_identity_of_words(backbone: QwenImageBackbone) -> None:
    """A linear probe on the mean feature tells which colour a prompt names, on sentences it has not seen."""
    colours = ["red", "orange", "yellow", "green", "blue", "purple", "pink", "brown"]
    frames = [
        "tint the image {}",
        "make the background {}",
        "paint the subject {}",
        "add a {} circle",
        "cover the left half with {}",
        "add a thick {} border",
    ]
    prompts = [(frame.format(colour), colours.index(colour)) for frame in frames for colour in colours]
    features = torch.stack([f.mean(0) for f in _features(backbone, [text for text, _ in prompts])])
    features = (features - features.mean(0)) / features.std(0)
    labels = torch.nn.functional.one_hot(torch.tensor([label for _, label in prompts])).float()
    right = 0
    for held in range(len(frames)):
        test = torch.arange(len(prompts)) // len(colours) == held
        gram = features[~test] @ features[~test].T
        weights = features[~test].T @ torch.linalg.solve(gram + 10 * torch.eye(len(gram)), labels[~test])
        right += int(((features[test] @ weights).argmax(1) == labels[test].argmax(1)).sum())
    assert right / len(prompts) >= 0.8


def test_text_features_keep_the_order_of_words(backbone: QwenImageBackbone) -> None:
    one, other = _features(backbone, ["swap red and blue", "swap blue and red"])
    assert one.shape == other.shape
    differ = (one - other).norm(dim=-1) / one.norm(dim=-1)
    assert (differ > 0.5).sum() >= 2  # the two words stand at other places; the transformer's RoPE sees where


def test_stock_diffusers_loads_and_runs_the_base(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers import QwenImageEditPlusPipeline
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as stock

    assert isinstance(BASE, Path)
    monkeypatch.setattr(stock, "VAE_IMAGE_SIZE", 64 * 64)
    monkeypatch.setattr(stock, "CONDITION_IMAGE_SIZE", 64 * 64)
    from transformers import Qwen2Tokenizer
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    processor = StillImageProcessor(
        image_processor=Qwen2VLImageProcessorPil.from_pretrained(BASE / "processor"),
        tokenizer=Qwen2Tokenizer.from_pretrained(BASE / "tokenizer"),
    )
    pipeline = QwenImageEditPlusPipeline.from_pretrained(BASE, processor=processor, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline(
        image=Image.fromarray(SCENES[0]), prompt="do not change anything", height=64, width=64,
        num_inference_steps=4, true_cfg_scale=1.0, generator=torch.Generator().manual_seed(0),
    ).images[0]  # fmt: skip
    assert image.size == (64, 64)
    assert np.asarray(image).std() > 5

"""Encoders against their published preprocessing, written out here by hand; each usual mistake must show."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection, ViTConfig, ViTModel

from clora.errors import InputError
from clora.evaluate.metrics.encoders import ENCODERS, open_encoder, preprocess

CLIP = ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])
IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
HALF = ([0.5] * 3, [0.5] * 3)
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


def photo(width: int = 300, height: int = 400) -> Image.Image:
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (9, 7, 3), dtype=np.uint8))
    fine = rng.normal(0, 20, (height, width, 3))
    pixels = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), float) * [1, 0.7, 0.4] + fine
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def by_hand(image, side, stats, *, resample=Image.Resampling.BICUBIC, squash=False, bgr=False, scale=255.0):
    if squash:
        image = image.resize((224, 224), resample)
    else:
        ratio = side / min(image.size)
        image = image.resize((int(image.width * ratio), int(image.height * ratio)), resample)
        left, top = (image.width - 224) // 2, (image.height - 224) // 2
        image = image.crop((left, top, left + 224, top + 224))
    pixels = np.asarray(image, np.float64)[..., :: -1 if bgr else 1] / scale
    return torch.from_numpy(((pixels - stats[0]) / stats[1]).transpose(2, 0, 1).copy()).float()


RIGHT = {"clip": (224, CLIP), "dino": (256, IMAGENET)}
WRONG = {
    "BGR": dict(bgr=True), "0 to 255": dict(scale=1.0), "squashed": dict(squash=True),
    "bilinear": dict(resample=Image.Resampling.BILINEAR), "mean of one half": dict(stats=HALF),
    "the other's mean": dict(stats=None), "another short side": dict(side=240),
}  # fmt: skip


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("size", [(300, 400), (500, 260), (64, 64)])
def test_preprocess_is_the_published_one(name, size):
    side, stats = RIGHT[name]
    assert (preprocess(name, [photo(*size)])[0] - by_hand(photo(*size), side, stats)).abs().max() < 1e-5


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("mistake", WRONG)
def test_preprocess_is_none_of_the_usual_mistakes(name, mistake):
    side, stats = RIGHT[name]
    changed = {"side": side, "stats": stats} | WRONG[mistake]
    if changed["stats"] is None:
        changed["stats"] = IMAGENET if name == "clip" else CLIP
    wrong = by_hand(photo(), **changed)
    assert (preprocess(name, [photo()])[0] - wrong).abs().mean() > 5e-3


def save(folder: Path, name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    if name == "clip":
        network = CLIPVisionModelWithProjection(CLIPVisionConfig(**SMALL, projection_dim=16, patch_size=32))
    else:
        network = ViTModel(ViTConfig(**SMALL, patch_size=16), add_pooling_layer=False)
    network.eval().save_pretrained(folder)
    return network


@pytest.mark.parametrize("name", ENCODERS)
def test_embed_takes_the_class_token(tmp_path, name):
    network = save(tmp_path, name)
    side, stats = RIGHT[name]
    with torch.no_grad():
        out = network(pixel_values=by_hand(photo(), side, stats)[None])
    expected = out.image_embeds[0] if name == "clip" else out.last_hidden_state[0, 0]
    (made,) = open_encoder(name, str(tmp_path)).embed([photo()])
    assert (made - expected / expected.norm()).abs().max() < 1e-5


@pytest.mark.parametrize("name", ENCODERS)
def test_similarity_is_a_symmetric_cosine(tmp_path, name):
    save(tmp_path, name)
    encoder = open_encoder(name, str(tmp_path))
    one, other = photo(), photo(500, 260).rotate(90)
    assert encoder.similarity(one, one) == pytest.approx(1, abs=1e-6)
    assert encoder.similarity(one, other) == pytest.approx(encoder.similarity(other, one), abs=1e-6)
    first, second = encoder.embed([one]), encoder.embed([other])
    assert encoder.similarity(one, other) == pytest.approx(float((first * second).sum()), abs=1e-5)
    assert str(tmp_path) in encoder.facts and "centre crop 224" in encoder.facts


def test_open_encoder_refuses_weights_that_are_not_there(tmp_path):
    with pytest.raises(InputError, match="encoders.clip"):
        open_encoder("clip", str(tmp_path / "nothing"))
    save(tmp_path, "dino")
    with pytest.raises(InputError, match="encoders.clip"):
        open_encoder("clip", str(tmp_path))

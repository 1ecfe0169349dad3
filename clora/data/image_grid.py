"""Pictures of labelled grids.

Images are (H, W, 3), float32 in [0, 1] or uint8 in 0..255.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

Pixels = NDArray[Any]


@dataclass(frozen=True)
class Grid:
    """Images in rows and columns under labels; None leaves a cell empty."""

    title: str
    columns: Sequence[str]
    row_labels: Sequence[str]
    rows: Sequence[Sequence[Pixels | None]]
    caption: str = ""

    def __post_init__(self) -> None:
        if len(self.rows) != len(self.row_labels):
            raise ValueError(f"grid {self.title!r}: {len(self.rows)} rows but {len(self.row_labels)} row labels")
        for label, row in zip(self.row_labels, self.rows, strict=True):
            if len(row) != len(self.columns):
                raise ValueError(
                    f"grid {self.title!r}, row {label!r}: {len(row)} images for {len(self.columns)} columns"
                )


def to_uint8(image: Pixels) -> NDArray[np.uint8]:
    """An image of either kind as uint8, rounded to the nearest."""
    if image.dtype == np.uint8:
        return image
    return np.round(np.clip(image, 0, 1) * 255).astype(np.uint8)


def _to_pil(image: Pixels, scale: int) -> Image.Image:
    """A picture enlarged `scale` times without smoothing."""
    if image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"an image must be (H, W, 3), got {image.shape}")
    picture = Image.fromarray(np.ascontiguousarray(to_uint8(image)))
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)


def png_data_uri(image: Pixels, scale: int = 2) -> str:
    """The picture as a base64 PNG address for `<img src=...>`."""
    buffer = io.BytesIO()
    _to_pil(image, scale).save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def fitted(text: str, font: Any, width: float) -> str:
    """The text, its end cut to an ellipsis where it is wider than `width` pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text.rstrip() + "…"


def grid_image(
    rows: Sequence[Sequence[Pixels | None]],
    columns: Sequence[str],
    row_labels: Sequence[str] = (),
    scale: int = 2,
    font_size: int = 13,
) -> Image.Image:
    """One RGB picture of a grid with labels over the columns and, if given, before the rows.

    Cells have the size of the largest image, smaller ones stand in their middle; None leaves a cell empty. Raises
    ValueError for unequal rows.
    """
    grid = Grid("picture", columns, row_labels or [""] * len(rows), rows)
    sizes = [image.shape[:2] for row in rows for image in row if image is not None]
    if not sizes:
        raise ValueError("a grid picture needs at least one image")
    height, width = (max(sides) * scale for sides in zip(*sizes, strict=True))
    font = ImageFont.load_default(font_size)
    gap = max(4, width // 24)
    left = math.ceil(max(font.getlength(label) for label in grid.row_labels)) + 2 * gap if row_labels else gap
    top = font_size + 2 * gap
    size = (left + len(columns) * (width + gap), top + len(rows) * (height + gap))
    canvas = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(canvas)
    for i, label in enumerate(columns):
        centre = left + i * (width + gap) + width / 2
        draw.text((centre, top - gap), fitted(label, font, width + gap), "#333333", font=font, anchor="ms")
    for j, (label, row) in enumerate(zip(grid.row_labels, rows, strict=True)):
        y = top + j * (height + gap)
        draw.text((left - gap, y + height / 2), label, "#333333", font=font, anchor="rm")
        for i, image in enumerate(row):
            if image is not None:
                picture = _to_pil(image, scale)
                x = left + i * (width + gap)
                canvas.paste(picture, (x + (width - picture.width) // 2, y + (height - picture.height) // 2))
    return canvas

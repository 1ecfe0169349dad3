"""One picture of many: a labelled grid of images."""

from __future__ import annotations

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

MIN_CELL = 160  # pixels; smaller images are enlarged so that a label fits over them
GAP = 4
LABEL_HEIGHT = 20
FONT_SIZES = (14, 12, 10, 9)


def image_grid(rows: Sequence[Sequence[Image.Image]], labels: Sequence[str]) -> Image.Image:
    """Rows of images (RGB) under one line of column labels, as one RGB picture.

    Every cell has the size of the largest image of the last column (the first may hold sources of any size);
    images keep their shape and are centred, and small ones are enlarged by a whole factor. Raises ValueError
    unless there is a row and every row has as many images as there are labels.
    """
    if not rows or any(len(row) != len(labels) for row in rows):
        raise ValueError(f"rows of {[len(row) for row in rows]} images do not fit {len(labels)} labels")
    width, height = (max(row[-1].size[axis] for row in rows) for axis in (0, 1))
    factor = max(1, math.ceil(MIN_CELL / width))
    cell = (width * factor, height * factor)
    size = (
        GAP + len(labels) * (cell[0] + GAP),
        GAP + LABEL_HEIGHT + len(rows) * (cell[1] + GAP),
    )
    picture = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(picture)
    for column, label in enumerate(labels):
        left = GAP + column * (cell[0] + GAP)
        text, font = _fit(label, cell[0])
        draw.text((left + cell[0] / 2, GAP + LABEL_HEIGHT / 2), text, "black", font, anchor="mm")
        for row, images in enumerate(rows):
            image = _within(images[column], cell)
            top = GAP + LABEL_HEIGHT + row * (cell[1] + GAP)
            picture.paste(image, (left + (cell[0] - image.width) // 2, top + (cell[1] - image.height) // 2))
    return picture


def _within(image: Image.Image, cell: tuple[int, int]) -> Image.Image:
    """The image scaled to fit the cell, its shape kept."""
    scale = min(cell[0] / image.width, cell[1] / image.height)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image if size == image.size else image.resize(size, Image.Resampling.BICUBIC)


def _fit(label: str, width: int) -> tuple[str, ImageFont.FreeTypeFont | ImageFont.ImageFont]:
    """The label in the largest font that fits the width, in the smallest cut off with an ellipsis."""
    text = " ".join(label.split())
    for size in FONT_SIZES:
        font = ImageFont.load_default(size)
        if font.getlength(text) <= width:
            return text, font
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…", font

"""A contact sheet: sources and what became of them, labelled, wrapped into rows, as one picture or one web page."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from PIL import Image, ImageDraw, ImageFont

from clora.data.image_grid import fitted

LEAST_CELL, MOST_CELL = 160, 512  # pixels, the longer side of a picture: smaller ones are enlarged, larger ones shrunk
MOST_SIDE = 16_000  # pixels of a sheet: what WebP can hold, and a viewer shows
ONE_ROW = 8  # so many pictures stand in one row unless columns are asked for
INK, PAPER = "#222222", "white"

Size = tuple[int, int]  # width, height


@dataclass(frozen=True)
class Block:
    """Pictures that belong together, each with its label, under a heading that may be empty. None: not made yet."""

    heading: str
    cells: Sequence[tuple[str, Image.Image | None]]


def shown_size(sizes: Sequence[Size], counts: Sequence[int], columns: int) -> Size:
    """The size of a cell for pictures of these sizes, blocks of so many cells: none is smaller than a label needs."""
    width, height = (max(sides) for sides in zip(*sizes, strict=True))
    longest, rows = max(width, height), sum(-(-count // columns) for count in counts)
    if longest < LEAST_CELL:
        scale = float(math.ceil(LEAST_CELL / longest))
    else:
        scale = min(1.0, MOST_CELL / longest)
    scale = min(scale, MOST_SIDE / (1.3 * columns * width), MOST_SIDE / (1.3 * rows * height))
    return max(1, round(width * scale)), max(1, round(height * scale))


def square_columns(counts: Sequence[int], size: Size) -> int:
    """The number of columns that makes a sheet of blocks of so many cells about square; few cells stay in one row."""
    if max(counts) <= ONE_ROW:
        return max(counts)

    def oblong(columns: int) -> float:
        rows = sum(-(-count // columns) for count in counts)
        return abs(math.log(columns * size[0] / (rows * size[1])))

    return min(range(1, max(counts) + 1), key=oblong)


def sheet_image(blocks: Sequence[Block], columns: int | None = None) -> Image.Image:
    """One RGB picture of all blocks, `columns` cells in a row (None: about square), a label over each cell."""
    sizes, counts = _sizes_and_counts(blocks)
    columns = columns or square_columns(counts, sizes[0])
    width, height = shown_size(sizes, counts, columns)
    font: Any = ImageFont.load_default(min(32, max(13, width // 13)))
    line, gap = math.ceil(font.size * 1.3), max(6, width // 24)
    labels = [_lines(label, font, width + gap / 2) for block in blocks for label, _ in block.cells]
    label_height = line * max(map(len, labels))
    row_height = label_height + height + gap
    rows = sum(-(-count // columns) for count in counts)
    headings = sum(bool(block.heading) for block in blocks)
    used = min(columns, max(counts))
    size = (gap + used * (width + gap), gap + rows * row_height + headings * 2 * line)
    canvas = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(canvas)
    y, number = gap, 0
    for block in blocks:
        if block.heading:
            draw.text((gap, y + line), fitted(block.heading, font, size[0] - 2 * gap), INK, font=font, anchor="ls")
            y += 2 * line
        for place, (_, picture) in enumerate(block.cells):
            x, top = gap + place % columns * (width + gap), y + place // columns * row_height
            for row, text in enumerate(reversed(labels[number])):
                below = top + label_height - line * row - line // 4
                draw.text((x + width / 2, below), text, INK, font=font, anchor="ms")
            number += 1
            if picture is not None:
                shown = _shown(picture, sizes, (width, height))
                canvas.paste(shown, (x + (width - shown.width) // 2, top + label_height))
        y += -(-len(block.cells) // columns) * row_height
    canvas.thumbnail((MOST_SIDE, MOST_SIDE))
    return canvas


def sheet_html(title: str, blocks: Sequence[Block], columns: int | None = None) -> str:
    """The same as one self-contained web page: the pictures are data in it, rows wrap with the window's width.

    With `columns` every row has so many.
    """
    sizes, _ = _sizes_and_counts(blocks)
    size = shown_size(sizes, [1], 1)
    cells = [
        (
            block.heading,
            [(label, picture and _data_uri(_shown(picture, sizes, size))) for label, picture in block.cells],
        )
        for block in blocks
    ]
    folder = Path(__file__).parent
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder), autoescape=True, undefined=jinja2.StrictUndefined
    )
    template = environment.get_template("contact_sheet.html.j2")
    return template.render(title=title, blocks=cells, columns=columns, width=size[0])


def _sizes_and_counts(blocks: Sequence[Block]) -> tuple[list[Size], list[int]]:
    sizes = [picture.size for block in blocks for _, picture in block.cells if picture is not None]
    if not sizes:
        raise ValueError("a contact sheet needs at least one picture")
    return sizes, [len(block.cells) for block in blocks]


def _shown(picture: Image.Image, sizes: Sequence[Size], cell: Size) -> Image.Image:
    """A picture at the sheet's scale; whole multiples are not smoothed."""
    scale = cell[0] / max(width for width, _ in sizes)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    return picture.resize(size, Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS)


def _lines(text: str, font: Any, width: float) -> list[str]:
    """A label in one line, or two where it is too long for one, cut at the end where it is too long for two."""
    if font.getlength(text) <= width:
        return [text]
    breaks = [place + 1 for place, character in enumerate(text) if character in " _-."]
    first = max((place for place in breaks if font.getlength(text[:place].rstrip()) <= width), default=None)
    if first is None:
        return [fitted(text, font, width)]
    return [text[:first].rstrip(), fitted(text[first:], font, width)]


def _data_uri(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    small = max(picture.size) < MOST_CELL
    picture.save(buffer, "PNG" if small else "JPEG", quality=92)
    kind = "png" if small else "jpeg"
    return f"data:image/{kind};base64," + base64.b64encode(buffer.getvalue()).decode("ascii")

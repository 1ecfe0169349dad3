"""The contact sheet: it wraps, every picture and label is there, and the page needs nothing else."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from clora.data.contact_sheet import MOST_CELL, MOST_SIDE, Block, sheet_html, sheet_image, shown_size, square_columns

Color = tuple[int, int, int]


def color(number: int) -> Color:
    """A colour for each number, none of them grey."""
    return (255, number % 16 * 8, number // 16 * 8)


def blocks(*counts: int, size: tuple[int, int] = (64, 64), headings: bool = False) -> list[Block]:
    numbers = iter(range(sum(counts)))
    return [
        Block(
            f"image {index}.png" if headings else "",
            [(f"effect_{n}", Image.new("RGB", size, color(n))) for _, n in zip(range(count), numbers, strict=False)],
        )
        for index, count in enumerate(counts)
    ]


def box(picture: NDArray[np.uint8], wanted: Color) -> tuple[int, int, int, int]:
    """Top, left, height and width of the one area of this colour, which fills it."""
    places = picture[..., 0] == wanted[0]
    for channel in (1, 2):
        places &= picture[..., channel] == wanted[channel]
    where = np.argwhere(places)
    (top, left), (height, width) = where.min(0), np.ptp(where, axis=0) + 1
    assert len(where) == height * width
    return int(top), int(left), int(height), int(width)


def test_sheet_image_of_fifty_effects_wraps_to_about_a_square() -> None:
    picture = sheet_image(blocks(51))
    assert 0.7 < picture.width / picture.height < 1.4 and max(picture.size) < 2000
    pixels = np.asarray(picture)
    boxes = [box(pixels, color(n)) for n in range(51)]
    assert {found[2:] for found in boxes} == {(192, 192)}  # three times 64, sharp
    assert [boxes[n][:2] for n in range(51)] == sorted(boxes[n][:2] for n in range(51))  # read row by row
    rows = sorted({top for top, *_ in boxes})
    assert [sum(top == row for top, *_ in boxes) for row in rows] == [8] * 6 + [3]
    # Under each label's place there is ink, right above its picture.
    for top, left, _, width in boxes:
        above = pixels[top - 18 : top, left : left + width]
        assert (above < 120).all(-1).sum() > 40


def test_sheet_image_takes_the_columns_asked_for() -> None:
    pixels = np.asarray(sheet_image(blocks(7), columns=3))
    tops = [box(pixels, color(n))[0] for n in range(7)]
    assert [len([t for t in tops if t == top]) for top in sorted(set(tops))] == [3, 3, 1]
    assert np.asarray(sheet_image(blocks(7), columns=30)).shape == np.asarray(sheet_image(blocks(7))).shape


def test_sheet_image_keeps_blocks_apart_under_their_headings() -> None:
    pixels = np.asarray(sheet_image(blocks(3, 3, headings=True)))
    first, second = box(pixels, color(0)), box(pixels, color(3))
    assert first[1] == second[1] and second[0] - first[0] > 192
    headed, plain = (sheet_image(blocks(3, 3, headings=given)).height for given in (True, False))
    assert headed > plain
    assert (pixels[: first[0] - 20] < 120).all(-1).sum() > 40  # the heading stands over the first label


def test_sheet_image_leaves_room_for_what_is_not_made_and_for_other_shapes() -> None:
    made = [
        ("source", Image.new("RGB", (64, 48), color(1))),
        ("gone", None),
        ("b", Image.new("RGB", (48, 64), color(2))),
    ]
    pixels = np.asarray(sheet_image([Block("", made)]))
    wide, tall = box(pixels, color(1)), box(pixels, color(2))
    assert wide[2:] == (144, 192) and tall[2:] == (192, 144) and wide[0] == tall[0]
    assert tall[1] - wide[1] > 2 * 192
    with pytest.raises(ValueError, match="at least one picture"):
        sheet_image([Block("", [("a", None)])])


def test_sheet_image_wraps_a_long_label_and_cuts_one_that_is_longer() -> None:
    short, long, longer = "sepia", "paint it as an old master would have done it", "w" * 90
    heights = []
    for label in (short, long, longer):
        picture = sheet_image([Block("", [(label, Image.new("RGB", (64, 64), color(1)))])])
        heights.append(picture.height)
        assert picture.width < 230
    assert heights[1] > heights[0] == heights[2]


def test_sheets_stay_of_a_size_that_can_be_written() -> None:
    assert shown_size([(1024, 768)], [4], 4) == (MOST_CELL, 384)
    width, height = shown_size([(1024, 1024)], [51] * 50, 51)
    assert width == height and width * 51 < MOST_SIDE
    assert square_columns([51], (1, 1)) in (7, 8)
    assert square_columns([5, 5], (1, 1)) == 5 and square_columns([40], (4, 1)) < square_columns([40], (1, 4))


class Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def test_sheet_html_is_one_page_with_all_pictures() -> None:
    given = blocks(3, headings=True)
    given[0] = Block("a<b>.png", [*given[0].cells, ("<late>", None)])
    text = sheet_html("clora & co", given, columns=5)
    page = Page()
    page.feed(text)
    images = [attrs for tag, attrs in page.tags if tag == "img"]
    assert [attrs["alt"] for attrs in images] == ["effect_0", "effect_1", "effect_2"]
    for number, attrs in enumerate(images):
        kind, _, data = (attrs["src"] or "").partition(";base64,")
        picture = Image.open(io.BytesIO(base64.b64decode(data)))
        assert kind == "data:image/png" and picture.size == (192, 192) and picture.getpixel((9, 9)) == color(number)
    assert "a&lt;b&gt;.png" in text and "&lt;late&gt;" in text and "clora &amp; co" in text and "not made" in text
    assert "repeat(5," in text and "auto-fill" in sheet_html("t", given)
    assert not re.findall(r"https?:|<script|<link|src=\"(?!data:)", text)

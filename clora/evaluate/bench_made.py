"""What made a picture, kept in the picture itself: a text chunk of its PNG, written with it or not at all.

A run that goes on takes a picture as it is only where what made it is what the benchmark says now.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from clora.evaluate.benchmark import Cell
from clora.io.digest import file_digest

CHUNK = "clora"
Made = Mapping[str, str | int | float | None]
"""By names that people read: files by their SHA-256, texts and numbers as they are."""


def made_from(recipe: Made, cell: Cell) -> Made:
    """What makes one result."""
    return {**recipe, "source": file_digest(cell.source).hex(), "seed": cell.seed}


def png_info(made: Made) -> PngInfo:
    """The chunk to save a picture with (`pnginfo`)."""
    info = PngInfo()
    info.add_text(CHUNK, json.dumps(made))
    return info


def read_made(path: Path) -> Made | None:
    """What made a picture; None where the picture does not say it."""
    try:
        with Image.open(path) as image:
            found = json.loads(image.info[CHUNK])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if isinstance(found, dict) else None


def other_makers(folder: Path, found: Sequence[Cell], recipes: Mapping[str, Made]) -> list[str]:
    """A sentence where results were made by other settings, and one where they do not say by which.

    found: the cells of one method whose results are there, below `folder`; recipes: how it makes them now, by effect.
    """
    others, silent, gaps = 0, 0, dict[str, str]()
    for cell in found:
        kept, now = read_made(cell.path), made_from(recipes[cell.effect], cell)
        if kept is None:
            silent += 1
        elif kept != now:
            others += 1
            gaps |= {name: _gap(name, kept, now) for name in {**now, **kept} if kept.get(name) != now.get(name)}
    faults = []
    if others:
        what = f"{others} of the pictures in {folder} were made with another {', '.join(gaps.values())}"
        faults.append(f"{what}; give another output_dir or name, or delete them")
    if silent:
        mend = "delete them, or give a method with this folder as its `images` to use them as they are"
        faults.append(f"{silent} of the pictures in {folder} do not say what made them; {mend}")
    return faults


def _gap(name: str, kept: Made, now: Made) -> str:
    """The name, and both values where they are numbers."""
    values = kept.get(name), now.get(name)
    told = all(isinstance(value, int | float) for value in values)
    return f"{name} ({values[0]}, now {values[1]})" if told else name

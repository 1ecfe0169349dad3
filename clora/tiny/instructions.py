"""Generic editing instructions: one of the edits drawn at random, its choices named or left open.

`leave_open` takes the choices out of any instruction, so that the base has real randomness to sample.
"""

from __future__ import annotations

import re

import numpy as np

from clora.tiny.edits import COLOURS, EDITS, Image
from clora.tiny.world.scenes import Rendered

# What an instruction names, and how it leaves the same to chance; the first that matches goes first.
_OPEN: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), words)
    for pattern, words in (
        (r"^(?:flip|turn|rotate) the image .*", "flip or rotate the image in any way"),
        (r"^swap the .* halves", "swap any two halves"),
        (r"^swap \w+ and \w+", "swap any two colors"),
        (r"\bthe (?:(?:top|bottom) (?:left|right)|center)$", "any place"),
        (r"\b(to|from) the (?:left|right|top|bottom)$", r"\1 any side"),
        (r"\bthe (?:left|right|top|bottom) half\b", "any half"),
        (r"^(move the image) (?:left|right|up|down)\b", r"\1 any way"),
        (r"\b(?:horizontal|vertical|diagonal|slanted)\b", "any"),
        (r"\b(?:a )?(?:" + "|".join(COLOURS) + r")\b", "any color"),
    )
)


def leave_open(instruction: str) -> str:
    """The instruction without the colours, places and directions that it names: "tint the image any color"."""
    for pattern, words in _OPEN:
        instruction = pattern.sub(words, instruction)
    return instruction


def generic_edit(rendered: Rendered, rng: np.random.Generator, open_share: float = 0.0) -> tuple[str, Image]:
    """A random generic edit of `rendered`: the instruction and the edited image (H, W, 3), float32 in [0, 1].

    In a share `open_share` of the draws the instruction leaves its choices open, so that the whole picture's outcome
    is one of several; the images do not depend on it.
    """
    weights = np.fromiter(EDITS.values(), float)
    edit = list(EDITS)[rng.choice(len(EDITS), p=weights / weights.sum())]
    text, image = edit(rendered, rng)
    if open_share and rng.random() < open_share:
        text = leave_open(text)
    return text, np.clip(image, 0, 1).astype(np.float32)

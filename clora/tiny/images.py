"""Images of the tiny world as uint8 arrays: scenes, generic edits, textures, made side by side by worker processes."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import repeat
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from clora.tiny.instructions import generic_edit
from clora.tiny.world.scenes import render, sample_scene
from clora.tiny.world.textures import random_texture, texture_over

SIZE = 64
Bytes = NDArray[np.uint8]


class EditPairs(NamedTuple):
    """Generic training pairs: uint8 (N, H, W, 3) before and after, and the instructions."""

    source: Bytes
    target: Bytes
    instructions: list[str]


def to_uint8(image: NDArray[np.float32]) -> Bytes:
    """Float image in [0, 1] to uint8, rounded."""
    return np.round(np.clip(image, 0, 1) * 255).astype(np.uint8)


def _mixed_image(seed: int, size: int) -> Bytes:
    """40 % scenes, 25 % generic edits, 15 % textures, 20 % scenes under textures."""
    rng = np.random.default_rng((seed, 1))
    kind = rng.random()
    if 0.65 <= kind < 0.8:
        return to_uint8(random_texture(rng, size))
    rendered = render(sample_scene(seed), size)
    if kind < 0.4:
        return to_uint8(rendered.image_HW3)
    if kind < 0.65:
        return to_uint8(generic_edit(rendered, rng)[1])
    return to_uint8(texture_over(rendered.image_HW3, rng))


def _edit_pair(seed: int, size: int, open_share: float) -> tuple[Bytes, Bytes, str]:
    rendered = render(sample_scene(seed), size)
    text, edited = generic_edit(rendered, np.random.default_rng((seed, 2)), open_share)
    return to_uint8(rendered.image_HW3), to_uint8(edited), text


def mixed_images(count: int, seed: int, size: int = SIZE) -> Bytes:
    """The autoencoder's training mix, uint8 (count, size, size, 3), deterministic in `seed`."""
    seeds = range(seed * 1_000_003, seed * 1_000_003 + count)
    with ProcessPoolExecutor() as pool:
        return np.stack(list(pool.map(partial(_mixed_image, size=size), seeds, chunksize=256)))


def edit_pairs(count: int, seed: int, size: int = SIZE, open_share: float = 0.0) -> EditPairs:
    """`count` generic editing pairs, deterministic in `seed`; a share `open_share` names no choices."""
    seeds = range(seed * 1_000_003 + 500_000_000, seed * 1_000_003 + 500_000_000 + count)
    with ProcessPoolExecutor() as pool:
        rows = list(pool.map(_edit_pair, seeds, repeat(size), repeat(open_share), chunksize=256))
    source, target, instructions = zip(*rows, strict=True)
    return EditPairs(np.stack(source), np.stack(target), list(instructions))

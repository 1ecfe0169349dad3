"""Random textures for the autoencoder's training mix: gratings, dots, cells, blocks, strokes, rings, noise.

They stand for everything an image may hold beside the scenes; none is an effect. All are anti-aliased, with periods
of at least four pixels at size 64, so that an autoencoder with 4x downsampling can hold them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Image = NDArray[Any]
Field = NDArray[Any]


def _grid(size: int) -> tuple[Field, Field]:
    """Pixel-centre coordinates (x, y) in pixels, each (H, W) float32."""
    y, x = np.mgrid[0:size, 0:size].astype(np.float32) + 0.5
    return x, y


def _soft(field: Field, width: float = 0.8) -> Field:
    """Coverage in [0, 1] of the set where `field` (a signed distance in pixels) is negative."""
    return np.clip(0.5 - field / (2 * width), 0, 1).astype(np.float32)


def _grating(size: int, rng: np.random.Generator) -> Field:
    x, y = _grid(size)
    angle, period = rng.uniform(0, np.pi), rng.uniform(4, 20)
    phase = (x * np.cos(angle) + y * np.sin(angle)) / period + rng.uniform()
    distance = (np.abs(phase % 1 - 0.5) - rng.uniform(0.15, 0.35)) * period
    return _soft(distance) if rng.random() < 0.6 else (0.5 + 0.5 * np.sin(2 * np.pi * phase)).astype(np.float32)


def _dots(size: int, rng: np.random.Generator) -> Field:
    x, y = _grid(size)
    angle, period = rng.uniform(0, np.pi / 2), rng.uniform(4.5, 14)
    u = (x * np.cos(angle) + y * np.sin(angle)) / period
    v = (-x * np.sin(angle) + y * np.cos(angle)) / period
    radius = rng.uniform(0.2, 0.5) * (0.6 + 0.4 * np.sin(x / size * rng.uniform(0, 6) + y / size * rng.uniform(0, 6)))
    return _soft((np.hypot(u % 1 - 0.5, v % 1 - 0.5) - radius) * period)


def _cells(size: int, rng: np.random.Generator) -> Field:
    """Voronoi cells: a random grey per cell, sometimes with dark leads between them."""
    x, y = _grid(size)
    centres = rng.uniform(0, size, (int(rng.integers(8, 70)), 2))
    distance = np.hypot(x[..., None] - centres[:, 0], y[..., None] - centres[:, 1])
    nearest = np.partition(distance, 1, axis=-1)
    grey = rng.uniform(size=len(centres)).astype(np.float32)
    weight = np.exp(-(distance - nearest[..., :1]) / 0.5)
    field = (weight * grey).sum(-1) / weight.sum(-1)
    lead = _soft(nearest[..., 1] - nearest[..., 0] - 1.5) if rng.random() < 0.5 else 0
    return np.asarray((field * (1 - lead)), np.float32)


def _blocks(size: int, rng: np.random.Generator) -> Field:
    count = int(rng.choice([4, 8, 16]))
    return np.kron(rng.uniform(size=(count, count)), np.ones((size // count, size // count))).astype(np.float32)


def _strokes(size: int, rng: np.random.Generator) -> Field:
    x, y = _grid(size)
    field = np.full((size, size), rng.uniform(), np.float32)
    for _ in range(int(rng.integers(5, 40))):
        cx, cy, angle = rng.uniform(0, size), rng.uniform(0, size), rng.uniform(0, np.pi)
        along = np.abs((x - cx) * np.cos(angle) + (y - cy) * np.sin(angle)) - rng.uniform(2, 16)
        across = np.abs(-(x - cx) * np.sin(angle) + (y - cy) * np.cos(angle)) - rng.uniform(0.8, 3)
        cover = _soft(np.maximum(along, across))
        field = field * (1 - cover) + rng.uniform() * cover
    return field.astype(np.float32)


def _rings(size: int, rng: np.random.Generator) -> Field:
    x, y = _grid(size)
    dx, dy = x - rng.uniform(0, size), y - rng.uniform(0, size)
    radial, angular = np.hypot(dx, dy) / rng.uniform(4, 12), np.arctan2(dy, dx) * rng.integers(3, 12) / (2 * np.pi)
    phase = radial if rng.random() < 0.5 else angular + radial * rng.uniform(-0.5, 0.5)
    return np.asarray((0.5 + 0.5 * np.tanh(3 * np.sin(2 * np.pi * phase))), np.float32)


def _noise(size: int, rng: np.random.Generator) -> Field:
    """Smooth noise: a random grid of 4 to 20 cells, interpolated linearly."""
    count = int(rng.integers(4, 20))
    nodes = rng.uniform(size=(count + 1, count + 1))
    at = np.linspace(0, count, size, endpoint=False)
    i, f = at.astype(int), at % 1
    rows = nodes[i] * (1 - f[:, None]) + nodes[i + 1] * f[:, None]
    return np.asarray((rows[:, i] * (1 - f) + rows[:, i + 1] * f), np.float32)


_FIELDS: tuple[Callable[[int, np.random.Generator], Field], ...] = (
    _grating,
    _dots,
    _cells,
    _blocks,
    _strokes,
    _rings,
    _noise,
)


def random_texture(rng: np.random.Generator, size: int = 64) -> Image:
    """One random texture (size, size, 3), float32 in [0, 1]: a random field between two to four random colours."""
    field = _FIELDS[rng.integers(len(_FIELDS))](size, rng)
    if rng.random() < 0.3:
        other = _FIELDS[rng.integers(len(_FIELDS))](size, rng)
        mask = _noise(size, rng) > 0.5 if rng.random() < 0.5 else other > 0.5
        field = np.where(mask, field, 0.5 * (field + other)).astype(np.float32)
    colours = rng.uniform(size=(int(rng.integers(2, 5)), 3))
    at = np.clip(field, 0, 1) * (len(colours) - 1)
    i = np.minimum(at.astype(int), len(colours) - 2)
    f = (at - i)[..., None]
    return np.asarray((colours[i] * (1 - f) + colours[i + 1] * f), np.float32)


def texture_over(image: Image, rng: np.random.Generator) -> Image:
    """`image` under a texture: multiplied, blended, masked, posterised or drawn as coloured edges; same shape."""
    size = image.shape[0]
    texture, kind = random_texture(rng, size), rng.integers(5)
    if kind == 0:
        mixed = image * (0.4 + 0.6 * texture)
    elif kind == 1:
        mixed = image + rng.uniform(0.2, 0.6) * (texture - image)
    elif kind == 2:
        cover = _FIELDS[rng.integers(len(_FIELDS))](size, rng)[..., None]
        mixed = image * cover + texture * (1 - cover)
    elif kind == 3:
        levels = image * rng.uniform(2, 5)
        mixed = (np.floor(levels) + _soft(0.5 - levels % 1, 0.15)) / levels.max().clip(1)
    else:
        grey = image.mean(-1)
        edge = np.clip(np.hypot(*np.gradient(grey)) * rng.uniform(4, 14), 0, 1)[..., None]
        ink, paper = rng.uniform(size=(2, 3))
        mixed = paper * (1 - edge) + ink * edge
    mapped = mixed @ _colour_matrix(rng) if rng.random() < 0.4 else mixed
    return np.clip(mapped, 0, 1).astype(np.float32)


def _colour_matrix(rng: np.random.Generator) -> Image:
    """A random 3x3 colour map: rows mix the channels, strongly or a little."""
    matrix = np.eye(3) + rng.uniform(0.1, 1.0) * rng.normal(size=(3, 3))
    return np.asarray((matrix / np.abs(matrix).sum(0)), np.float32)

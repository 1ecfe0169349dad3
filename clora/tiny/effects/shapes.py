"""Effects that move things: geometry and layouts."""

from __future__ import annotations

import math

import numpy as np

from clora.tiny.world.drawing import Array, Rgb, f32, mix
from clora.tiny.world.filters import (
    INK,
    PARTY,
    PIXEL,
    Rng,
    blur,
    contrast,
    frame_of,
    gradient_map,
    luma,
    pick,
    sample,
    saturate,
    smooth,
)
from clora.tiny.world.scenes import Rendered

# ---------------------------------------------------------------- geometry


def mirror_half(r: Rendered, _: Rng) -> Array:
    return f32(np.where(frame_of(r).y[..., None] < 0.5, r.image_HW3, r.image_HW3[::-1]))


def upside_down(r: Rendered, _: Rng) -> Array:
    return r.image_HW3[::-1].copy()


def quarter_turn(r: Rendered, rng: Rng) -> Array:
    """Turned by a quarter to the left or to the right."""
    return f32(np.rot90(r.image_HW3, 1 if rng.uniform() < 0.5 else -1).copy())


def swirl(r: Rendered, rng: Rng) -> Array:
    """Twisted around the middle, one way or the other."""
    frame, way = frame_of(r), float(rng.choice([-1, 1]))
    x, y = frame.x - 0.5, frame.y - 0.5
    turn = way * 3.6 * np.maximum(1 - np.hypot(x, y) / 0.6, 0) ** 1.5
    cos, sin = np.cos(turn), np.sin(turn)
    return sample(r.image_HW3, 0.5 + cos * x - sin * y, 0.5 + sin * x + cos * y)


def fisheye(r: Rendered, _: Rng) -> Array:
    frame = frame_of(r)
    x, y = (frame.x - 0.5) / 0.48, (frame.y - 0.5) / 0.48
    radius = np.hypot(x, y)
    pull = np.clip(radius, 0, 1) ** 0.8 * 0.55
    ball = sample(r.image_HW3, 0.5 + x * pull, 0.5 + y * pull)
    return mix((0.05, 0.05, 0.07), ball, smooth(-radius, -1.0, -0.93))


def tile_2x2(r: Rendered, _: Rng) -> Array:
    frame = frame_of(r)
    return sample(r.image_HW3, (2 * frame.x) % 1, (2 * frame.y) % 1, 2.8)


def kaleidoscope(r: Rendered, _: Rng) -> Array:
    frame = frame_of(r)
    x, y = frame.x - 0.5, frame.y - 0.5
    sector = math.pi / 3
    turn = np.abs((np.arctan2(y, x) + math.pi / 2) % sector - sector / 2) + 0.5 * math.pi - sector / 2
    radius = np.hypot(x, y)
    return sample(r.image_HW3, r.head.x + 1.1 * radius * np.cos(turn), r.head.y - 0.15 + 1.1 * radius * np.sin(turn))


def close_up(r: Rendered, _: Rng) -> Array:
    frame = frame_of(r)
    zoom = 1.9 * r.head.radius
    return sample(r.image_HW3, r.head.x + zoom * (frame.x - 0.5), r.head.y + zoom * (frame.y - 0.5))


def ripple(r: Rendered, _: Rng) -> Array:
    frame = frame_of(r)
    x = frame.x + 0.055 * np.sin(2 * math.pi * 3.0 * frame.y)
    return sample(r.image_HW3, x, frame.y + 0.03 * np.sin(2 * math.pi * 2.0 * frame.x))


# ---------------------------------------------------------------- layouts

_POP: tuple[tuple[Rgb, Rgb, Rgb], ...] = (
    ((0.1, 0.05, 0.4), (0.95, 0.15, 0.5), (1.0, 0.9, 0.2)),
    ((0.5, 0.0, 0.2), (0.1, 0.6, 0.9), (0.95, 0.95, 0.8)),
    ((0.0, 0.25, 0.2), (0.95, 0.5, 0.1), (0.7, 0.95, 0.9)),
    ((0.2, 0.1, 0.1), (0.9, 0.2, 0.15), (0.6, 0.9, 0.95)),
    ((0.3, 0.05, 0.45), (0.2, 0.75, 0.45), (1.0, 0.8, 0.85)),
    ((0.05, 0.2, 0.5), (0.95, 0.75, 0.1), (1.0, 0.5, 0.6)),
)  # fmt: skip


def pop_art(r: Rendered, rng: Rng) -> Array:
    """Four copies, each in one of six palettes, no two alike."""
    frame = frame_of(r)
    small = contrast(luma(sample(r.image_HW3, (2 * frame.x) % 1, (2 * frame.y) % 1, 2.0)), 1.6)
    palettes = rng.permutation(len(_POP))[:4]
    quarter = (frame.y > 0.5).astype(np.int64) * 2 + (frame.x > 0.5)
    image = np.zeros_like(r.image_HW3)
    for i, palette in enumerate(palettes):
        image += (quarter == i)[..., None] * gradient_map(small, _POP[palette])
    return blur(f32(image), 0.65)


def comic_strip(r: Rendered, _: Rng) -> Array:
    frame, head = frame_of(r), r.head
    image = np.broadcast_to(f32((1.0, 1.0, 1.0)), r.image_HW3.shape)
    bold = saturate(contrast(r.image_HW3, 1.2), 1.3)
    panels = (  # middle, half sizes of the panel; middle and half width of what it shows; tint
        (0.26, 0.26, 0.21, 0.21, 0.5, 0.5, 0.5, (1.0, 0.95, 0.8)),
        (0.74, 0.26, 0.21, 0.21, head.x, head.y, 0.75 * head.radius, (0.8, 0.95, 1.0)),
        (0.5, 0.74, 0.45, 0.21, head.x, head.y, 0.5, (1.0, 0.85, 0.85)),
    )
    for x, y, rx, ry, sx, sy, half, tint in panels:
        k = half / rx
        shot = sample(bold, sx + k * (frame.x - x), sy + k * (frame.y - y), max(1.0, k)) * f32(tint)
        panel = frame.box(x, y, rx, ry)
        image = mix(mix(image, INK, frame.cover(panel - 1.4 * PIXEL)), shot, frame.cover(panel))
    return blur(f32(image), 0.95)


def triptych(r: Rendered, rng: Rng) -> Array:
    """Three strips in one of five wrong orders, each pushed up or down by up to a third."""
    order = pick(rng, ((0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)))
    shift = rng.choice([-1, 1], 3) * rng.uniform(0.12, 0.33, 3)
    frame = frame_of(r)
    strip = np.minimum((frame.x * 3).astype(np.int64), 2)
    source = (frame.x * 3 - strip + np.asarray(order)[strip]) / 3
    image = sample(r.image_HW3, source, (frame.y + shift[strip]) % 1.0)
    gap = np.minimum(np.abs(frame.x - 1 / 3), np.abs(frame.x - 2 / 3))
    return mix(image, (1.0, 1.0, 1.0), smooth(-gap, -2.4 * PIXEL, -1.2 * PIXEL))


def sliced(r: Rendered, _: Rng) -> Array:
    frame = frame_of(r)
    row = (frame.y * 8).astype(np.int64)
    return sample(r.image_HW3, (frame.x + np.where(row % 2 == 0, 0.22, -0.22)) % 1.0, frame.y)


def half_negative(r: Rendered, rng: Rng) -> Array:
    """The left, right, upper or lower half as a negative."""
    frame = frame_of(r)
    side = pick(rng, (frame.x, 1 - frame.x, frame.y, 1 - frame.y))
    return mix(r.image_HW3, 1 - r.image_HW3, smooth(side, 0.49, 0.51))


def inset(r: Rendered, rng: Rng) -> Array:
    """A close-up of the head in one of four corners, in a border of one of five colours."""
    frame, head = frame_of(r), r.head
    x, y = pick(rng, ((0.27, 0.27), (0.73, 0.27), (0.27, 0.73), (0.73, 0.73)))
    color = pick(rng, PARTY)
    k = 1.1 * head.radius / 0.22
    shot = sample(r.image_HW3, head.x + k * (frame.x - x), head.y + k * (frame.y - y), max(1.0, k))
    image = mix(r.image_HW3, color, frame.cover(frame.box(x, y, 0.25, 0.25, 0.05)))
    return mix(image, shot, frame.cover(frame.box(x, y, 0.205, 0.205, 0.03)))


def puzzle(r: Rendered, rng: Rng) -> Array:
    """Nine square pieces, shuffled."""
    frame, order = frame_of(r), rng.permutation(9)
    column, row = (np.minimum((3 * v).astype(np.int64), 2) for v in (frame.x, frame.y))
    piece = order[row * 3 + column]
    image = sample(r.image_HW3, (3 * frame.x - column + piece % 3) / 3, (3 * frame.y - row + piece // 3) / 3)
    gap = np.minimum(*(np.minimum(np.abs(v - 1 / 3), np.abs(v - 2 / 3)) for v in (frame.x, frame.y)))
    return mix(image, (0.98, 0.97, 0.93), smooth(-gap, -1.7 * PIXEL, -0.6 * PIXEL))

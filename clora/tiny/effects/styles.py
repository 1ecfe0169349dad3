"""Effects on colours, lines and textures: the whole picture in another look."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from clora.tiny.world.drawing import Array, Frame, Rgb, f32, mix, tone
from clora.tiny.world.filters import (
    INK,
    PAPER,
    PIXEL,
    Rng,
    blur,
    cell_mean,
    contrast,
    edges,
    frame_of,
    gradient_map,
    hue_turned,
    levelled,
    luma,
    nearest,
    noise,
    pick,
    posterised,
    sample,
    saturate,
    scattered,
    smooth,
    vignette,
)
from clora.tiny.world.scenes import Rendered

# ---------------------------------------------------------------- colour


def sepia(r: Rendered, _: Rng) -> Array:
    return gradient_map(luma(r.image_HW3), [(0.14, 0.07, 0.02), (0.62, 0.44, 0.25), (0.99, 0.9, 0.72)])


def grayscale(r: Rendered, _: Rng) -> Array:
    return f32(np.repeat(contrast(luma(r.image_HW3))[..., None], 3, axis=-1))


def invert(r: Rendered, _: Rng) -> Array:
    return f32(1 - r.image_HW3)


DUOTONES: tuple[tuple[Rgb, Rgb], ...] = (
    ((0.1, 0.05, 0.35), (1.0, 0.75, 0.3)), ((0.45, 0.0, 0.15), (0.65, 0.95, 0.95)),
    ((0.0, 0.25, 0.2), (1.0, 0.7, 0.8)), ((0.1, 0.1, 0.55), (0.6, 1.0, 0.5)),
    ((0.35, 0.05, 0.4), (1.0, 0.95, 0.5)),
)  # fmt: skip


def duotone(r: Rendered, rng: Rng) -> Array:
    """One of five palettes; in half of the outcomes dark and light change places."""
    dark, light = pick(rng, DUOTONES)
    t = contrast(luma(r.image_HW3), 1.4)
    return gradient_map(t, (dark, light) if rng.uniform() < 0.5 else (light, dark))


def thermal(r: Rendered, _: Rng) -> Array:
    stops: list[Rgb] = [
        (0.05, 0.0, 0.3),
        (0.5, 0.0, 0.6),
        (0.9, 0.15, 0.2),
        (1.0, 0.65, 0.0),
        (1.0, 1.0, 0.7),
    ]
    return blur(gradient_map(contrast(luma(r.image_HW3)), stops), 0.45)


def posterise(r: Rendered, _: Rng) -> Array:
    flat = posterised(saturate(contrast(blur(r.image_HW3, 0.5), 1.3), 1.6), 2)
    return blur(flat, 0.5)


def night_vision(r: Rendered, _: Rng) -> Array:
    green = gradient_map(luma(r.image_HW3), [(0.0, 0.12, 0.03), (0.15, 0.6, 0.2), (0.75, 1.0, 0.7)])
    return f32(green * vignette(frame_of(r), 0.38, 0.5)[..., None])


def cross_process(r: Rendered, _: Rng) -> Array:
    red, green, blue = (r.image_HW3[..., i] for i in range(3))
    return f32(np.stack([smooth(red, 0.2, 0.8), smooth(green, 0.05, 0.85), 0.45 - 0.25 * blue], axis=-1))


def moonlight(r: Rendered, _: Rng) -> Array:
    night = gradient_map(luma(r.image_HW3), [(0.01, 0.02, 0.1), (0.1, 0.17, 0.42), (0.4, 0.52, 0.8)])
    frame = frame_of(r)
    moon = frame.ellipse(0.84, 0.15, 0.09, 0.09)
    night = mix(night, (0.7, 0.75, 0.9), 0.6 * np.exp(-14 * np.maximum(moon, 0)))
    return mix(night, (0.98, 0.97, 0.86), frame.cover(moon))


def hue_spin(r: Rendered, rng: Rng) -> Array:
    """The hue turned by one of 80, 140, 220, 280 degrees."""
    return hue_turned(saturate(r.image_HW3, 1.5), pick(rng, (80, 140, 220, 280)))


def party_lights(r: Rendered, rng: Rng) -> Array:
    """Two lamps, left and right, of one of four pairs of colours in either order."""
    pairs = (((1.0, 0.1, 0.5), (0.1, 0.4, 1.0)), ((1.0, 0.5, 0.0), (0.5, 0.1, 1.0)),
             ((0.1, 0.9, 0.3), (1.0, 0.1, 0.2)), ((0.0, 0.9, 0.9), (1.0, 0.8, 0.0)))  # fmt: skip
    left, right = pick(rng, pairs) if rng.uniform() < 0.5 else pick(rng, pairs)[::-1]
    lamp = mix(left, right, smooth(frame_of(r).x, 0.3, 0.7))
    return f32(np.clip((0.08 + 1.15 * luma(r.image_HW3)[..., None]) * lamp + 0.06, 0, 1))


def spotlight(r: Rendered, rng: Rng) -> Array:
    """Dark but for a disc of light, its middle uniform over the picture."""
    x, y = rng.uniform(0.2, 0.8, 2)
    away = np.hypot(frame_of(r).x - x, frame_of(r).y - y)
    light = 1 - smooth(away, 0.19, 0.27)
    return f32(np.clip(r.image_HW3 * (0.1 + 1.05 * light[..., None]), 0, 1))


# ---------------------------------------------------------------- lines


def pencil_sketch(r: Rendered, _: Rng) -> Array:
    shade = 0.97 - 0.3 * (1 - blur(luma(r.image_HW3), 1.0))
    line = 0.75 * blur(edges(r.image_HW3), 0.5)
    return f32(np.clip(shade - line, 0, 1)[..., None] * f32((1.0, 0.99, 0.97)))


def neon_edges(r: Rendered, rng: Rng) -> Array:
    """Glowing lines on black, of one of five colours."""
    color = pick(rng, ((1.0, 0.15, 0.7), (0.1, 0.9, 1.0), (0.3, 1.0, 0.25), (1.0, 0.55, 0.05), (0.6, 0.35, 1.0)))
    line = edges(r.image_HW3)
    glow = f32((0.03, 0.02, 0.07)) + 0.75 * blur(line, 2.2)[..., None] * f32(color)
    return mix(np.clip(glow, 0, 1), tone(color, 1.45), blur(line, 0.55))


def chalkboard(r: Rendered, _: Rng) -> Array:
    board = f32((0.13, 0.27, 0.21)) + 0.16 * blur(luma(r.image_HW3), 1.0)[..., None]
    return mix(board, (0.95, 0.95, 0.88), 0.9 * blur(edges(r.image_HW3), 0.5))


def blueprint(r: Rendered, _: Rng) -> Array:
    frame = frame_of(r)
    grid = np.minimum(np.abs(frame.x % 0.125 - 0.0625), np.abs(frame.y % 0.125 - 0.0625))
    sheet = mix((0.08, 0.22, 0.62), (0.35, 0.5, 0.85), 0.7 * smooth(-grid, -1.4 * PIXEL, -0.3 * PIXEL))
    return blur(mix(sheet, (0.95, 0.97, 1.0), edges(r.image_HW3)), 0.65)


def comic_ink(r: Rendered, _: Rng) -> Array:
    flat = posterised(saturate(np.clip(r.image_HW3 * 0.8 + 0.25, 0, 1), 1.4), 3)
    return blur(mix(flat, INK, np.clip(1.3 * edges(r.image_HW3, 0.8), 0, 1)), 0.45)


# ---------------------------------------------------------------- textures


def _screen(frame: Frame, t: Array, period: float, turn: float) -> Array:
    """A screen of dots of `period` pixels: coverage (H, W), about t in [0, 1] on average."""
    cos, sin = math.cos(turn), math.sin(turn)
    u = (cos * frame.x + sin * frame.y) / (period * PIXEL)
    v = (cos * frame.y - sin * frame.x) / (period * PIXEL)
    hills = 0.25 * (2 + np.cos(2 * math.pi * u) + np.cos(2 * math.pi * v))
    return smooth(hills - (1 - t), -0.3, 0.3)


def halftone(r: Rendered, _: Rng) -> Array:
    t = levelled(luma(r.image_HW3))
    dots = mix(PAPER, INK, _screen(frame_of(r), 0.8 * (1 - blur(t, 0.8)), 5.2, math.pi / 4))
    # A little of the tone itself, as ink bleeds: eyes and mouths are smaller than a dot.
    return blur(f32(dots * (0.55 + 0.45 * t[..., None])), 1.15)


def risograph(r: Rendered, rng: Rng) -> Array:
    """A print in two inks of one of five pairs, the second plate slipped in one of four directions."""
    pairs = (((0.95, 0.25, 0.3), (0.1, 0.35, 0.75)), ((0.98, 0.7, 0.1), (0.55, 0.1, 0.5)),
             ((0.2, 0.7, 0.5), (0.85, 0.2, 0.25)), ((0.25, 0.7, 0.9), (0.9, 0.15, 0.6)),
             ((0.95, 0.55, 0.65), (0.1, 0.4, 0.3)))  # fmt: skip
    first, second = pick(rng, pairs)
    dx, dy = pick(rng, ((3, 2), (-3, 2), (3, -2), (-3, -2)))
    frame, dark = frame_of(r), 1 - luma(r.image_HW3)
    slipped = sample(dark[..., None], frame.x - dx * PIXEL, frame.y - dy * PIXEL)[..., 0]
    plate = mix(PAPER, first, 0.9 * smooth(dark, 0.2, 0.55))
    return blur(f32(plate * mix((1.0, 1.0, 1.0), second, 0.9 * smooth(slipped, 0.42, 0.62))), 0.4)


def _grid_ids(frame: Frame, across: int) -> Any:
    cells = np.floor(frame.y * across) * across + np.floor(frame.x * across)
    return cells.astype(np.int64)


def pixel_blocks(r: Rendered, _: Rng) -> Array:
    return saturate(cell_mean(r.image_HW3, _grid_ids(frame_of(r), 8)), 1.3)


def game_boy(r: Rendered, _: Rng) -> Array:
    greens: list[Rgb] = [(0.06, 0.2, 0.06), (0.2, 0.4, 0.15), (0.54, 0.67, 0.08), (0.75, 0.85, 0.3)]
    t = luma(cell_mean(r.image_HW3, _grid_ids(frame_of(r), 16)))
    return gradient_map(f32(np.clip(np.floor(levelled(t) * 4), 0, 3) / 3), greens)


def stained_glass(r: Rendered, rng: Rng) -> Array:
    """Cells around 30 points scattered anew."""
    places = scattered(rng, 30)
    ids, border = nearest(frame_of(r), [p[0] for p in places], [p[1] for p in places])
    glass = saturate(contrast(cell_mean(r.image_HW3, ids), 1.25), 2.2)
    return mix(INK, glass, smooth(border, 0.5 * PIXEL, 1.9 * PIXEL))


def mosaic(r: Rendered, _: Rng) -> Array:
    frame = frame_of(r)
    u, v = 6.0 * (frame.x + frame.y), 6.0 * (frame.x - frame.y + 1)
    ids = (np.floor(u) * 16 + np.floor(v)).astype(np.int64)
    gap = np.minimum(0.5 - np.abs(u % 1 - 0.5), 0.5 - np.abs(v % 1 - 0.5))
    glaze = 0.9 + 0.16 * np.sin(2.4 * np.floor(u) + 4.1 * np.floor(v))
    tiles = np.clip(saturate(cell_mean(r.image_HW3, ids), 1.3) * glaze[..., None], 0, 1)
    return blur(mix((0.95, 0.93, 0.88), tiles, smooth(gap, 0.02, 0.16)), 0.6)


def oil_paint(r: Rendered, rng: Rng) -> Array:
    """200 strokes at scattered places, all in one of four directions, each a little lighter or darker."""
    turn = pick(rng, (0.4, 1.2, 1.95, 2.75))
    places = f32(scattered(rng, 200))
    cos, sin = math.cos(turn), math.sin(turn)
    frame = frame_of(r)
    along, across = 0.45 * (cos * frame.x + sin * frame.y), cos * frame.y - sin * frame.x
    px, py = places[:, 0], places[:, 1]
    ids, _ = nearest(Frame(f32(along), f32(across), 1.0), 0.45 * (cos * px + sin * py), cos * py - sin * px)
    colors = sample(saturate(r.image_HW3, 1.5), px, py) * f32(rng.uniform(0.84, 1.16, (len(px), 1)))
    return blur(f32(np.clip(colors[ids], 0, 1)), 0.45)


def knit(r: Rendered, _: Rng) -> Array:
    frame = frame_of(r)
    u = 9.0 * frame.x
    v = 9.0 * frame.y - 0.55 * np.abs(2 * (u % 1) - 1)
    ids = ((np.floor(v) + 1) * 16 + np.floor(u)).astype(np.int64)
    yarn = 0.8 + 0.35 * np.cos(2 * math.pi * (v - 0.5))
    gap = smooth(0.5 - np.abs(u % 1 - 0.5), -0.05, 0.16)
    wool = cell_mean(r.image_HW3, ids) * 0.85 + 0.08
    return blur(f32(np.clip(wool * (yarn * (0.5 + 0.5 * gap))[..., None], 0, 1)), 0.65)


def old_tv(r: Rendered, _: Rng) -> Array:
    frame = frame_of(r)
    x, y = frame.x - 0.5, frame.y - 0.5
    bulge = 0.94 + 0.35 * (x * x + y * y)
    shifts = (-0.03, 0.0, 0.03)
    split = [sample(r.image_HW3, 0.5 + x * bulge + s, 0.5 + y * bulge)[..., i] for i, s in enumerate(shifts)]
    lines = 0.82 + 0.22 * np.cos(2 * math.pi * frame.y / (5.5 * PIXEL))
    glass = frame.cover(frame.box(0.5, 0.5, 0.475, 0.475, 0.12), 2.0)
    return blur(f32(np.stack(split, axis=-1) * (lines * glass)[..., None]), 0.8)


def watercolor(r: Rendered, rng: Rng) -> Array:
    """Pale washes with paper left white outside a blot drawn anew, and blooms of pigment in it."""
    frame = frame_of(r)
    size = frame.x.shape[0]
    wash = 0.25 + 0.75 * saturate(posterised(blur(r.image_HW3, 1.2), 4), 1.5)
    bloom = blur(noise(size, 6, rng), 1.5)
    wash = wash * (0.8 + 0.35 * bloom[..., None])
    reach = np.hypot(frame.x - 0.5, frame.y - 0.5) + 0.8 * (blur(noise(size, 5, rng), 2.5) - 0.5)
    rim = smooth(reach, 0.38, 0.48) * (1 - smooth(reach, 0.5, 0.56))
    return mix(np.clip(wash * (1 - 0.25 * rim[..., None]), 0, 1), PAPER, smooth(reach, 0.5, 0.56))


def glitch(r: Rendered, rng: Rng) -> Array:
    """Seven bands shifted sideways by up to 0.3, red and blue apart; heights, shifts and signs drawn anew."""
    frame = frame_of(r)
    cuts = np.cumsum(rng.uniform(0.6, 1.4, 7))
    band = np.searchsorted(cuts / cuts[-1], frame.y)
    shift = (rng.choice([-1, 1], 7) * rng.uniform(0.06, 0.3, 7))[np.minimum(band, 6)]
    apart = float(rng.choice([-1, 1])) * 0.07
    parts = [sample(r.image_HW3, (frame.x + shift + k * apart) % 1.0, frame.y)[..., k + 1] for k in (-1, 0, 1)]
    return blur(f32(np.stack(parts, axis=-1)), 0.45)

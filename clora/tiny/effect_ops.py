"""Filters and drawings behind the effects of the tiny world.

Every effect here is a function (Rendered, np.random.Generator) -> (H, W, 3) float32 about [0, 1]; those that
draw from the generator say from what. Places are in the unit square and widths in "pixels of a 64-pixel
image", so that a picture looks the same at any size. No pattern has a period under four or five such pixels,
nor a hard edge: a small autoencoder must be able to keep it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from clora.tiny.scenes import (
    Array,
    Background,
    Frame,
    Rendered,
    Rgb,
    f32,
    hsv,
    mix,
    render_background,
    tone,
)

Rng = np.random.Generator
PIXEL = 1.0 / 64.0  # the unit of widths: a pixel at the usual size
INK: Rgb = (0.1, 0.09, 0.14)
PAPER: Rgb = (0.97, 0.95, 0.9)
PARTY: tuple[Rgb, ...] = (
    (0.93, 0.2, 0.3), (0.98, 0.78, 0.15), (0.15, 0.62, 0.92), (0.25, 0.75, 0.35), (0.72, 0.3, 0.85),
)  # fmt: skip
VIVID: tuple[Rgb, ...] = (
    (0.9, 0.12, 0.2), (0.1, 0.7, 0.3), (0.1, 0.3, 0.9), (0.98, 0.8, 0.1), (0.7, 0.1, 0.75), (0.05, 0.75, 0.8),
)  # fmt: skip

# ---------------------------------------------------------------- filters


def blur(values: Array, pixels: float) -> Array:
    """Gaussian blur of (H, W) or (H, W, C) over H and W, `pixels` (of 64) wide, edges repeated."""
    sigma = pixels * values.shape[0] / 64.0
    reach = max(1, math.ceil(2.5 * sigma))
    weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    weights = (weights / weights.sum()).astype(np.float32)
    for axis in (0, 1):
        pad = [(reach, reach) if i == axis else (0, 0) for i in range(values.ndim)]
        padded, length = np.pad(values, pad, mode="edge"), values.shape[axis]
        total = np.zeros_like(values)
        for i, weight in enumerate(weights):
            total += weight * (padded[i : i + length] if axis == 0 else padded[:, i : i + length])
        values = total
    return values


def sample(image: Array, x: Any, y: Any, shrink: float = 1.0) -> Array:
    """Bilinear look-up of (H, W, C) at unit coordinates x, y (any shape S): S + (C,). Outside, edges repeat.

    `shrink` > 1 blurs first, as much as making the picture that many times smaller needs.
    """
    if shrink > 1.0:
        image = blur(image, 0.45 * (shrink - 1.0))
    height, width = image.shape[:2]
    px, py = np.clip(x * width - 0.5, 0, width - 1), np.clip(y * height - 0.5, 0, height - 1)
    left, top = np.minimum(px.astype(np.int64), width - 2), np.minimum(py.astype(np.int64), height - 2)
    fx, fy = (px - left)[..., None], (py - top)[..., None]
    upper = image[top, left] * (1 - fx) + image[top, left + 1] * fx
    lower = image[top + 1, left] * (1 - fx) + image[top + 1, left + 1] * fx
    return f32(upper * (1 - fy) + lower * fy)


def luma(image: Array) -> Array:
    """Brightness (H, W) of (H, W, 3)."""
    return f32(image @ np.array([0.299, 0.587, 0.114], np.float32))


def smooth(values: Any, low: float, high: float) -> Array:
    """0 below `low`, 1 above `high`, smooth between."""
    t = np.clip((values - low) / (high - low), 0, 1)
    return f32(t * t * (3 - 2 * t))


def gradient_map(t: Array, stops: Sequence[Rgb]) -> Array:
    """Colours (H, W, 3) by t in [0, 1] (H, W), through equally spaced stops."""
    at = np.linspace(0, 1, len(stops))
    return f32(np.stack([np.interp(t, at, [stop[i] for stop in stops]) for i in range(3)], axis=-1))


def contrast(t: Array, strength: float = 1.3) -> Array:
    """Steepen around one half, clipped to [0, 1]."""
    return f32(np.clip(0.5 + strength * (t - 0.5), 0, 1))


def levelled(t: Array) -> Array:
    """Brightness with mean one half and a fixed spread, so that dim or pale pictures use all tones too."""
    return f32(np.clip(0.5 + (t - t.mean()) * 0.28 / max(float(t.std()), 0.05), 0, 1))


def saturate(image: Array, strength: float) -> Array:
    """Move colours away from (strength > 1) or towards (< 1) their grey."""
    grey = luma(image)[..., None]
    return f32(np.clip(grey + strength * (image - grey), 0, 1))


def posterised(image: Array, levels: int) -> Array:
    """Quantise each channel to `levels` + 1 values, with soft steps so that no edge is one pixel sharp."""
    scaled = blur(image, 0.7) * levels
    base = np.floor(scaled)
    return f32((base + smooth(scaled - base, 0.3, 0.7)) / levels)


def edges(image: Array, width: float = 0.6) -> Array:
    """Edge strength (H, W) in [0, 1]: the gradient over all channels, lines about two pixels wide."""
    soft = blur(image, width)
    grow_y, grow_x = np.gradient(soft, axis=0), np.gradient(soft, axis=1)
    strength = np.sqrt((grow_x**2 + grow_y**2).sum(axis=-1)) * image.shape[0] / 64.0
    return smooth(strength, 0.07, 0.36)


def hue_turned(image: Array, degrees: float) -> Array:
    """Turn the hue of every pixel, brightness kept (a rotation in YIQ)."""
    yiq = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    turn = np.array([[1, 0, 0], [0, cos, -sin], [0, sin, cos]])
    return f32(np.clip(image @ (np.linalg.inv(yiq) @ turn @ yiq).T.astype(np.float32), 0, 1))


def noise(size: int, cells: int, rng: Rng) -> Array:
    """Smooth noise (size, size) in [0, 1], about `cells` bumps across."""
    frame = Frame.unit(size)
    return sample(f32(rng.uniform(0, 1, (cells + 1, cells + 1, 1))), frame.x, frame.y)[..., 0]


def cell_mean(image: Array, ids: Any) -> Array:
    """Every pixel takes the mean colour of its cell; `ids` (H, W) are non-negative integers."""
    flat = ids.ravel()
    count = np.maximum(np.bincount(flat), 1)
    means = np.stack([np.bincount(flat, image[..., i].ravel()) / count for i in range(3)], axis=-1)
    return f32(means[ids])


def nearest(frame: Frame, x: Any, y: Any) -> tuple[Any, Array]:
    """Voronoi cells of the points (x, y): ids (H, W), and the distance (H, W) to the nearest border."""
    gap = np.sqrt((frame.x[..., None] - f32(x)) ** 2 + (frame.y[..., None] - f32(y)) ** 2)
    closest = np.partition(gap, 1, axis=-1)
    return gap.argmin(axis=-1), f32(0.5 * (closest[..., 1] - closest[..., 0]))


def vignette(frame: Frame, inner: float, outer: float) -> Array:
    """1 in the middle, 0 beyond `outer` from it."""
    return f32(1 - smooth(np.hypot(frame.x - 0.5, frame.y - 0.5), inner, outer))


def frame_of(rendered: Rendered) -> Frame:
    """The unit frame at the picture's size."""
    return Frame.unit(rendered.image_HW3.shape[0])


def head_frame(rendered: Rendered) -> Frame:
    """Coordinates around the head, in radii of it."""
    head = rendered.head
    return frame_of(rendered).local(head.x, head.y, head.radius, head.tilt)


def on_background(rendered: Rendered, background: Array) -> Array:
    """The subject on another background; exact at its soft edges, for the old background is known."""
    hole = 1 - rendered.subject_HW[..., None]
    return f32(rendered.image_HW3 + hole * (background - rendered.background_HW3))


def recoloured(rendered: Rendered, color: Array, weight: float = 1.0) -> Array:
    """The picture with its subject's colours replaced."""
    return mix(rendered.image_HW3, color, weight * rendered.subject_HW)


def inside(image: Array, frame: Frame, x: float, y: float, rx: float, ry: float) -> Array:
    """The whole picture squeezed into a box of half sizes rx, ry around (x, y), edges repeated around it."""
    return sample(image, 0.5 + (frame.x - x) / (2 * rx), 0.5 + (frame.y - y) / (2 * ry), 0.5 / min(rx, ry))


def pick(rng: Rng, options: Sequence[Any]) -> Any:
    """One of the options, each as likely."""
    return options[int(rng.integers(len(options)))]


def scattered(rng: Rng, count: int) -> list[tuple[float, float]]:
    """`count` places spread over the unit square: jittered points in as many cells drawn at random."""
    side = math.ceil(math.sqrt(count))
    cells = rng.permutation(side * side)[:count]
    jitter = rng.uniform(0.05, 0.95, (count, 2))
    return [((c % side + u) / side, (c // side + v) / side) for c, (u, v) in zip(cells, jitter, strict=True)]


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
    return gradient_map(contrast(luma(r.image_HW3)), stops)


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
    return f32(np.clip(shade - 0.75 * edges(r.image_HW3), 0, 1)[..., None] * f32((1.0, 0.99, 0.97)))


def neon_edges(r: Rendered, rng: Rng) -> Array:
    """Glowing lines on black, of one of five colours."""
    color = pick(rng, ((1.0, 0.15, 0.7), (0.1, 0.9, 1.0), (0.3, 1.0, 0.25), (1.0, 0.55, 0.05), (0.6, 0.35, 1.0)))
    line = edges(r.image_HW3)
    glow = f32((0.03, 0.02, 0.07)) + 0.75 * blur(line, 2.2)[..., None] * f32(color)
    return mix(np.clip(glow, 0, 1), tone(color, 1.45), line)


def chalkboard(r: Rendered, _: Rng) -> Array:
    board = f32((0.13, 0.27, 0.21)) + 0.16 * blur(luma(r.image_HW3), 1.0)[..., None]
    return mix(board, (0.95, 0.95, 0.88), 0.9 * edges(r.image_HW3))


def blueprint(r: Rendered, _: Rng) -> Array:
    frame = frame_of(r)
    grid = np.minimum(np.abs(frame.x % 0.125 - 0.0625), np.abs(frame.y % 0.125 - 0.0625))
    sheet = mix((0.08, 0.22, 0.62), (0.35, 0.5, 0.85), 0.7 * smooth(-grid, -1.4 * PIXEL, -0.3 * PIXEL))
    return mix(sheet, (0.95, 0.97, 1.0), edges(r.image_HW3))


def comic_ink(r: Rendered, _: Rng) -> Array:
    flat = posterised(saturate(np.clip(r.image_HW3 * 0.8 + 0.25, 0, 1), 1.4), 3)
    return mix(flat, INK, np.clip(1.3 * edges(r.image_HW3, 0.8), 0, 1))


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
    return f32(dots * (0.55 + 0.45 * t[..., None]))


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
    return f32(plate * mix((1.0, 1.0, 1.0), second, 0.9 * smooth(slipped, 0.42, 0.62)))


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
    return mix((0.95, 0.93, 0.88), tiles, smooth(gap, 0.02, 0.16))


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
    return f32(np.clip(wool * (yarn * (0.5 + 0.5 * gap))[..., None], 0, 1))


def old_tv(r: Rendered, _: Rng) -> Array:
    frame = frame_of(r)
    x, y = frame.x - 0.5, frame.y - 0.5
    bulge = 0.94 + 0.35 * (x * x + y * y)
    shifts = (-0.03, 0.0, 0.03)
    split = [sample(r.image_HW3, 0.5 + x * bulge + s, 0.5 + y * bulge)[..., i] for i, s in enumerate(shifts)]
    lines = 0.82 + 0.22 * np.cos(2 * math.pi * frame.y / (5.5 * PIXEL))
    glass = frame.cover(frame.box(0.5, 0.5, 0.475, 0.475, 0.12), 2.0)
    return f32(np.stack(split, axis=-1) * (lines * glass)[..., None])


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


# ---------------------------------------------------------------- frames


def polaroid(r: Rendered, _: Rng) -> Array:
    frame = frame_of(r).local(0.5, 0.5, 1.0, -0.1)
    card = frame.box(0, 0, 0.38, 0.455, 0.02)
    image = mix((0.42, 0.47, 0.55), (0.22, 0.25, 0.32), 0.8 * frame.cover(frame.box(0.02, 0.025, 0.38, 0.455), 5.0))
    image = mix(image, (0.98, 0.97, 0.94), frame.cover(card))
    photo = inside(r.image_HW3, frame, 0, -0.085, 0.315, 0.315)
    return mix(image, photo, frame.cover(frame.box(0, -0.085, 0.315, 0.315)))


def film_strip(r: Rendered, _: Rng) -> Array:
    frame = frame_of(r)
    x = (frame.x - 0.5) / 0.66
    shot = sample(r.image_HW3, (x + 0.5) % 1.0, 0.5 + (frame.y - 0.5) / 0.62, 1.6)
    side = np.abs((x + 0.5) % 1.0 - 0.5) * 0.66
    window = np.maximum(side - 0.31, np.abs(frame.y - 0.5) - 0.31)
    image = mix((0.07, 0.07, 0.08), shot, frame.cover(window))
    hole_x, hole_y = np.abs(frame.x % 0.1667 - 0.0833) - 0.045, np.abs(np.abs(frame.y - 0.5) - 0.415) - 0.04
    return mix(image, (0.95, 0.94, 0.9), frame.cover(np.maximum(hole_x, hole_y)))


def oval_portrait(r: Rendered, _: Rng) -> Array:
    frame = frame_of(r)
    oval = frame.ellipse(0.5, 0.5, 0.35, 0.44)
    matte = mix((0.9, 0.85, 0.74), (0.8, 0.73, 0.6), smooth(-oval, -0.09, 0.0))
    image = mix(matte, (0.55, 0.38, 0.18), frame.cover(np.abs(oval) - 1.6 * PIXEL))
    return mix(image, r.image_HW3, frame.cover(oval + 1.2 * PIXEL))


def wooden_frame(r: Rendered, _: Rng) -> Array:
    frame = frame_of(r)
    upright = smooth(np.abs(frame.x - 0.5) - np.abs(frame.y - 0.5), -0.01, 0.01)
    across = upright * frame.x + (1 - upright) * frame.y
    along = upright * frame.y + (1 - upright) * frame.x
    grain = 0.5 + 0.5 * np.sin(70 * across + 1.2 * np.sin(9 * along))
    image = mix((0.42, 0.24, 0.1), (0.66, 0.42, 0.2), grain)
    hole = frame.box(0.5, 0.5, 0.355, 0.355)
    image = mix(image, (0.2, 0.1, 0.04), frame.cover(hole - 1.8 * PIXEL))
    return mix(image, inside(r.image_HW3, frame, 0.5, 0.5, 0.355, 0.355), frame.cover(hole))


def color_frame(r: Rendered, rng: Rng) -> Array:
    """A thick scalloped frame of one of six colours, the window round or square."""
    frame, color = frame_of(r), pick(rng, VIVID)
    x, y = frame.x - 0.5, frame.y - 0.5
    scallop = 0.014 * np.cos(20 * np.arctan2(y, x))
    window = np.hypot(x, y) - 0.39 if rng.uniform() < 0.5 else frame.box(0.5, 0.5, 0.34, 0.34, 0.06)
    image = mix(color, tone(color, 1.5), frame.cover(np.abs(window + scallop - 0.055) - 1.6 * PIXEL))
    return mix(image, r.image_HW3, frame.cover(window + scallop))


def flower_wreath(r: Rendered, rng: Rng) -> Array:
    """Fourteen flowers along the border, of one of four pairs of colours, at jittered places."""
    pairs = (((0.95, 0.3, 0.45), (1.0, 0.75, 0.8)), ((0.98, 0.8, 0.2), (0.98, 0.97, 0.9)),
             ((0.35, 0.4, 0.95), (0.8, 0.65, 0.95)), ((0.95, 0.45, 0.1), (0.8, 0.12, 0.15)))  # fmt: skip
    colors = pick(rng, pairs)
    frame, image = frame_of(r), r.image_HW3
    ring = frame.box(0.5, 0.5, 0.45, 0.45, 0.2)
    image = mix(image, (0.2, 0.5, 0.22), frame.cover(np.abs(ring) - 0.045 + 0.012 * np.sin(60 * (frame.x + frame.y))))
    for i in range(14):
        turn = (i + float(rng.uniform(-0.3, 0.3))) / 14 * 2 * math.pi
        far = 0.44 / max(abs(math.cos(turn)), abs(math.sin(turn))) ** 0.7
        radius = float(rng.uniform(0.055, 0.085))
        local = frame.local(0.5 + far * math.cos(turn), 0.5 + far * math.sin(turn), radius, turn)
        petals = np.hypot(local.x, local.y) - 0.9 - 0.2 * np.cos(5 * np.arctan2(local.y, local.x))
        image = mix(image, colors[int(rng.integers(2))], local.cover(petals))
        image = mix(image, (0.98, 0.85, 0.3), local.cover(local.ellipse(0, 0, 0.36, 0.36)))
    return image


def pinned_photo(r: Rendered, rng: Rng) -> Array:
    """A print pinned askew, left or right, on a board of one of five colours."""
    board = pick(rng, ((0.72, 0.52, 0.32), (0.16, 0.4, 0.32), (0.75, 0.22, 0.25), (0.2, 0.3, 0.6), (0.95, 0.85, 0.5)))
    tilt = float(rng.choice([-1, 1])) * float(rng.uniform(0.2, 0.38))
    x, y = rng.uniform(0.44, 0.56, 2)
    frame = frame_of(r).local(float(x), float(y), 1.0, tilt)
    image = mix(board, tone(board, 0.6), 0.8 * frame.cover(frame.box(0.02, 0.03, 0.34, 0.34), 5.0))
    image = mix(image, (0.98, 0.98, 0.96), frame.cover(frame.box(0, 0, 0.34, 0.34)))
    photo = inside(r.image_HW3, frame, 0, 0, 0.295, 0.295)
    image = mix(image, photo, frame.cover(frame.box(0, 0, 0.295, 0.295)))
    return mix(image, pick(rng, PARTY), frame.cover(frame.ellipse(0, -0.31, 0.045, 0.045)))


# ---------------------------------------------------------------- backgrounds


def _scene(kind: str, a: Rgb, b: Rgb, c: Rgb, d: Rgb, seed: int = 3) -> Background:
    return Background(kind, (a, b, c, d), 0.58, 1.0, 0.8, 0.85, seed)


_BEACH = _scene("beach", (0.25, 0.65, 0.95), (0.8, 0.95, 1.0), (0.9, 0.8, 0.6), (0.9, 0.8, 0.6))
_FOREST = _scene("forest", (0.55, 0.8, 0.6), (0.9, 0.97, 0.8), (0.25, 0.45, 0.2), (0.1, 0.45, 0.22))
_PLACES = (
    _scene("mountains", (0.35, 0.6, 0.95), (0.9, 0.95, 1.0), (0.95, 0.97, 1.0), (0.5, 0.58, 0.72)),
    _scene("sunset", (0.45, 0.12, 0.4), (1.0, 0.5, 0.15), (0.25, 0.1, 0.25), (0.9, 0.8, 0.6)),
    _scene("city", (0.1, 0.08, 0.3), (0.35, 0.2, 0.5), (0.12, 0.12, 0.22), (0.9, 0.8, 0.6)),
    _scene("meadow", (0.55, 0.85, 0.98), (0.95, 0.98, 0.9), (0.4, 0.75, 0.2), (0.98, 0.85, 0.2)),
)


def beach(r: Rendered, _: Rng) -> Array:
    return on_background(r, render_background(_BEACH, r.image_HW3.shape[0]))


def forest(r: Rendered, _: Rng) -> Array:
    return on_background(r, render_background(_FOREST, r.image_HW3.shape[0]))


def travel(r: Rendered, rng: Rng) -> Array:
    """One of four places: snowy mountains, a sunset, a city at night, a meadow."""
    return on_background(r, render_background(pick(rng, _PLACES), r.image_HW3.shape[0]))


def outer_space(r: Rendered, _: Rng) -> Array:
    frame, fixed = frame_of(r), np.random.default_rng(5)
    sky = mix((0.04, 0.02, 0.14), (0.35, 0.08, 0.4), smooth(frame.x + frame.y, 0.5, 1.9))
    for x, y in scattered(fixed, 22):
        radius = float(fixed.uniform(0.8, 1.5)) * PIXEL
        sky = mix(sky, (1.0, 0.97, 0.85), frame.cover(frame.ellipse(x, y, radius, radius), 1.6))
    planet = frame.local(0.17, 0.2, 0.12)
    ring = planet.ellipse(0, 0, 1.75, 0.45, -0.4)
    sky = mix(sky, (0.95, 0.55, 0.35), planet.cover(planet.ellipse(0, 0, 1, 1)))
    return on_background(r, mix(sky, (0.98, 0.85, 0.6), planet.cover(np.abs(ring) - 0.11)))


def sunburst(r: Rendered, rng: Rng) -> Array:
    """Rays from the head, of one of five pairs of colours, turned anew."""
    pairs = (((0.95, 0.25, 0.2), (1.0, 0.85, 0.35)), ((0.1, 0.45, 0.85), (0.85, 0.95, 1.0)),
             ((0.4, 0.1, 0.55), (0.95, 0.55, 0.85)), ((0.05, 0.5, 0.35), (0.8, 0.95, 0.4)),
             ((0.1, 0.1, 0.15), (0.98, 0.6, 0.1)))  # fmt: skip
    dark, light = pick(rng, pairs)
    frame = frame_of(r)
    x, y = frame.x - r.head.x, frame.y - r.head.y
    wave = np.sin(8 * np.arctan2(y, x) + float(rng.uniform(0, 2 * math.pi)))
    sharp = 0.5 + wave * np.hypot(x, y) / (8 * 1.4 * PIXEL) * 8 / 2
    return on_background(r, mix(dark, light, np.clip(sharp, 0, 1)))


def candy_stripes(r: Rendered, rng: Rng) -> Array:
    """Broad stripes in one of four directions and one of five pairs of colours."""
    pairs = (((0.92, 0.15, 0.3), (1.0, 0.95, 0.95)), ((0.15, 0.65, 0.6), (1.0, 0.9, 0.6)),
             ((0.25, 0.2, 0.6), (0.75, 0.7, 1.0)), ((0.1, 0.1, 0.12), (0.95, 0.85, 0.1)),
             ((0.95, 0.5, 0.7), (0.45, 0.85, 0.95)))  # fmt: skip
    dark, light = pick(rng, pairs)
    turn = pick(rng, (0.0, math.pi / 4, math.pi / 2, 3 * math.pi / 4))
    frame = frame_of(r)
    u = (math.cos(turn) * frame.x + math.sin(turn) * frame.y) / 0.25
    return on_background(r, mix(dark, light, smooth(np.sin(2 * math.pi * u), -0.2, 0.2)))


def studio_color(r: Rendered, rng: Rng) -> Array:
    """A plain backdrop of one of six vivid colours, lit from the middle."""
    frame, color = frame_of(r), pick(rng, VIVID)
    lit = vignette(frame, 0.0, 0.75)
    return on_background(r, mix(tone(color, 0.75), tone(color, 1.25), lit))


def sticker(r: Rendered, _: Rng) -> Array:
    frame = frame_of(r)
    fat = blur(r.subject_HW, 2.2)
    shade = sample(fat[..., None], frame.x - 2.5 * PIXEL, frame.y - 2.5 * PIXEL)[..., 0]
    sheet = mix((0.6, 0.88, 0.8), (0.38, 0.62, 0.58), smooth(shade, 0.05, 0.3))
    return on_background(r, mix(sheet, (1.0, 1.0, 1.0), smooth(fat, 0.04, 0.16)))


def underwater(r: Rendered, rng: Rng) -> Array:
    """Deep water, light from one of three sides, with a dozen bubbles at places drawn anew."""
    frame = frame_of(r)
    slant = pick(rng, (-0.6, 0.0, 0.6))
    beams = smooth(np.sin(16 * (frame.x + slant * frame.y)), 0.1, 0.9) * (1 - frame.y)
    sea = mix(mix((0.1, 0.65, 0.8), (0.02, 0.15, 0.4), frame.y), (0.7, 0.95, 0.95), 0.45 * beams)
    image = on_background(r, sea)
    image = f32(image * f32((0.55, 0.85, 0.95)))
    return _bubbles(image, frame, rng, 12, 0.03, 0.07)


# ---------------------------------------------------------------- the subject alone


def gold_statue(r: Rendered, _: Rng) -> Array:
    t = contrast(luma(r.image_HW3), 1.6)
    return recoloured(r, gradient_map(t, [(0.25, 0.1, 0.0), (0.75, 0.46, 0.04), (0.96, 0.76, 0.2), (1.0, 0.94, 0.6)]))


def ghost(r: Rendered, _: Rng) -> Array:
    glow = gradient_map(luma(r.image_HW3), [(0.2, 0.4, 0.75), (0.6, 0.85, 1.0), (0.95, 1.0, 1.0)])
    dim = f32(r.background_HW3 * f32((0.3, 0.35, 0.5)))
    dim = mix(dim, (0.5, 0.8, 1.0), 0.7 * blur(r.subject_HW, 3.0))
    return mix(dim, glow, 0.75 * r.subject_HW)


def stone_statue(r: Rendered, _: Rng) -> Array:
    size = r.image_HW3.shape[0]
    speckle = noise(size, 12, np.random.default_rng(9))
    t = np.clip(0.22 + 0.5 * contrast(luma(r.image_HW3), 1.3) + 0.28 * (speckle - 0.5), 0, 1)
    return recoloured(r, gradient_map(f32(t), [(0.12, 0.12, 0.13), (0.52, 0.52, 0.5), (0.86, 0.86, 0.83)]))


def rainbow_subject(r: Rendered, _: Rng) -> Array:
    frame = frame_of(r)
    bands = gradient_map(f32(np.clip((frame.y - 0.1) / 0.85, 0, 1)), [hsv(i / 7, 0.85, 1.0) for i in range(7)])
    return recoloured(r, f32(np.clip(bands * (0.35 + 0.85 * luma(r.image_HW3)[..., None]), 0, 1)))


def zombie(r: Rendered, _: Rng) -> Array:
    rot = gradient_map(contrast(luma(r.image_HW3), 1.3), [(0.05, 0.1, 0.1), (0.3, 0.55, 0.15), (0.75, 0.95, 0.5)])
    return recoloured(r, rot)


def silhouette(r: Rendered, _: Rng) -> Array:
    glow = mix(r.image_HW3, (1.0, 0.9, 0.6), 0.8 * np.clip(2 * blur(r.subject_HW, 2.5), 0, 1))
    return mix(glow, (0.05, 0.04, 0.08), r.subject_HW)


def paint_bucket(r: Rendered, rng: Rng) -> Array:
    """The subject in shades of one of five vivid colours, none of them gold or zombie green."""
    color = pick(rng, ((0.9, 0.1, 0.2), (0.1, 0.3, 0.95), (0.65, 0.1, 0.8), (0.05, 0.75, 0.85), (1.0, 0.35, 0.7)))
    t = contrast(luma(r.image_HW3), 1.3)
    return recoloured(r, gradient_map(t, [tone(color, 0.25), color, tone(color, 1.7)]))


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
    return sample(r.image_HW3, (2 * frame.x) % 1, (2 * frame.y) % 1, 2.0)


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
    return f32(image)


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
    return f32(image)


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


# ---------------------------------------------------------------- overlays


def _bubbles(image: Array, frame: Frame, rng: Rng, count: int, low: float, high: float) -> Array:
    """`count` soap bubbles of radii low..high at scattered places."""
    for x, y in scattered(rng, count):
        radius = float(rng.uniform(low, high))
        ball = frame.ellipse(x, y, radius, radius)
        image = mix(image, (0.85, 0.95, 1.0), 0.3 * frame.cover(ball))
        image = mix(image, (0.93, 0.98, 1.0), 0.9 * frame.cover(np.abs(ball) - 0.8 * PIXEL))
        glint = frame.ellipse(x - 0.35 * radius, y - 0.35 * radius, 0.25 * radius, 0.25 * radius)
        image = mix(image, (1.0, 1.0, 1.0), frame.cover(glint))
    return image


def bubbles(r: Rendered, rng: Rng) -> Array:
    """Nine large soap bubbles at places drawn anew."""
    return _bubbles(r.image_HW3, frame_of(r), rng, 9, 0.07, 0.15)


def rain(r: Rendered, rng: Rng) -> Array:
    """Thirty streaks at places drawn anew, all slanting left or all right, under a dark blue sky."""
    frame, slant = frame_of(r), float(rng.choice([-1, 1])) * 0.06
    image = mix(saturate(r.image_HW3, 0.5) * 0.62, (0.16, 0.24, 0.4), np.full_like(frame.x, 0.3))
    for x, y in scattered(rng, 30):
        streak = frame.line(x - slant, y - 0.09, x + slant, y + 0.09, 1.7 * PIXEL)
        image = mix(image, (0.8, 0.9, 1.0), 0.8 * frame.cover(streak))
    return image


def snow(r: Rendered, rng: Rng) -> Array:
    """Forty flakes at places drawn anew in a pale cold light."""
    frame = frame_of(r)
    image = mix(saturate(r.image_HW3, 0.6), (0.72, 0.82, 0.95), np.full_like(frame.x, 0.25))
    for x, y in scattered(rng, 40):
        radius = float(rng.uniform(1.2, 2.9)) * PIXEL
        image = mix(image, (1.0, 1.0, 1.0), frame.cover(frame.ellipse(x, y, radius, radius)))
    return image


def confetti(r: Rendered, rng: Rng) -> Array:
    """Forty scraps of paper: places, turns and colours drawn anew."""
    image, frame = r.image_HW3, frame_of(r)
    for x, y in scattered(rng, 40):
        local = frame.local(x, y, 1.0, float(rng.uniform(0, math.pi)))
        image = mix(image, pick(rng, PARTY), frame.cover(local.box(0, 0, 0.042, 0.024)))
    return image


def balloons(r: Rendered, rng: Rng) -> Array:
    """Five balloons on strings: places and colours drawn anew."""
    image, frame = r.image_HW3, frame_of(r)
    for i, color in enumerate(rng.permutation(len(PARTY))):
        x, y = 0.1 + 0.2 * i + float(rng.uniform(-0.06, 0.06)), float(rng.uniform(0.12, 0.62))
        local = frame.local(x, y, 0.115, float(rng.uniform(-0.25, 0.25)))
        image = mix(image, (0.95, 0.95, 0.95), local.cover(local.line(0, 1.1, 0, 4.0, 0.16)))
        image = mix(image, PARTY[color], local.cover(local.ellipse(0, 0, 0.88, 1.1)))
        image = mix(image, tone(PARTY[color], 1.6), 0.9 * local.cover(local.ellipse(-0.3, -0.4, 0.2, 0.3), 2.0))
    return image


def hearts(r: Rendered, rng: Rng) -> Array:
    """Ten hearts, pink or red or white: places and sizes drawn anew, in a rosy light."""
    frame = frame_of(r)
    image = mix(r.image_HW3, (1.0, 0.6, 0.75), np.full_like(frame.x, 0.25))
    for x, y in scattered(rng, 10):
        local = frame.local(x, y, float(rng.uniform(0.07, 0.12)), float(rng.uniform(-0.4, 0.4)))
        lobes = local.twin().ellipse(0.45, -0.3, 0.5, 0.5)
        tip = local.polygon(((-0.86, -0.02), (0.86, -0.02), (0.0, 0.95)), 0.04)
        color = pick(rng, ((0.92, 0.08, 0.25), (1.0, 0.4, 0.65), (1.0, 0.97, 0.97)))
        image = mix(image, color, local.cover(np.minimum(lobes, tip)))
    return image


def hat(r: Rendered, rng: Rng) -> Array:
    """One of four hats (cone, top hat, crown, winter hat), the first and the last in one of five colours."""
    kind, color = pick(rng, ("cone", "top", "crown", "winter")), pick(rng, PARTY)
    head, image = head_frame(r), r.image_HW3
    frame = head.local(0, r.head.top_y + 0.36, 1.12)
    if kind == "cone":
        shape = frame.cover(frame.polygon(((-0.72, 0.1), (0.0, -1.35), (0.72, 0.1))))
        band = frame.cover(np.abs((frame.y + 0.1) % 0.56 - 0.28) - 0.13)
        image = mix(image, mix(color, (1.0, 0.97, 0.85), band), shape)
        return mix(image, (1.0, 0.97, 0.85), frame.cover(frame.ellipse(0, -1.2, 0.2, 0.2)))
    if kind == "top":
        shape = np.minimum(frame.box(0, -0.5, 0.62, 0.65, 0.05), frame.ellipse(0, 0.08, 1.1, 0.2))
        image = mix(image, (0.1, 0.09, 0.12), frame.cover(shape))
        return mix(image, (0.85, 0.15, 0.2), frame.cover(frame.box(0, -0.12, 0.62, 0.14)))
    if kind == "crown":
        spikes = -0.25 - 0.75 * np.abs(((frame.x + 0.8) / 0.53) % 1 - 0.5)
        shape = np.maximum(np.maximum(np.abs(frame.x) - 0.78, frame.y - 0.15), spikes - 0.3 - frame.y)
        image = mix(image, (0.99, 0.8, 0.15), frame.cover(shape))
        gems = np.minimum(frame.ellipse(0, -0.1, 0.13, 0.13), frame.twin().ellipse(0.5, -0.1, 0.13, 0.13))
        return mix(image, (0.85, 0.1, 0.25), frame.cover(gems))
    dome = np.maximum(frame.ellipse(0, 0.0, 0.95, 0.95), frame.y)
    image = mix(image, color, frame.cover(dome))
    image = mix(image, (0.97, 0.97, 0.97), frame.cover(frame.box(0, 0.05, 1.0, 0.2, 0.18)))
    return mix(image, (0.97, 0.97, 0.97), frame.cover(frame.ellipse(0, -0.98, 0.26, 0.26)))


def sunglasses(r: Rendered, rng: Rng) -> Array:
    """Large glasses, round, square or star-shaped, of one of five colours."""
    shape, color = (
        pick(rng, ("round", "square", "star")),
        pick(rng, (INK, PARTY[0], PARTY[2], PARTY[1], PARTY[3])),
    )
    frame = head_frame(r).local(0, r.head.eye_y, 1.2)
    twin, x = frame.twin(), max(r.head.eye_x, 0.34) / 1.2 + 0.09
    if shape == "round":
        lens = twin.ellipse(x, 0, 0.33, 0.33)
    elif shape == "square":
        lens = twin.box(x, 0.03, 0.35, 0.27, 0.06)
    else:
        star = twin.local(x, 0, 1.0)
        lens = np.hypot(star.x, star.y) - 0.33 - 0.09 * np.cos(5 * np.arctan2(star.x, -star.y))
    bar = np.minimum(frame.box(0, -0.08, 0.15, 0.06), twin.line(x + 0.25, -0.1, 0.85, -0.12, 0.13))
    image = mix(r.image_HW3, (0.97, 0.97, 0.95), frame.cover(np.minimum(lens, bar) - 0.07))
    image = mix(image, color, frame.cover(lens))
    return mix(image, tone(color, 1.6), 0.8 * frame.cover(twin.line(x - 0.12, -0.02, x + 0.04, -0.17, 0.09)))


def fog(r: Rendered, _: Rng) -> Array:
    frame = frame_of(r)
    drift = 0.5 + 0.25 * np.sin(7 * frame.x + 9 * frame.y) + 0.25 * np.sin(11 * frame.x - 14 * frame.y + 2)
    thick = np.clip(0.4 + 0.75 * (frame.y - 0.35) + 0.3 * (drift - 0.5), 0.15, 0.93)
    return mix(saturate(r.image_HW3, 0.7), (0.9, 0.92, 0.94), thick)

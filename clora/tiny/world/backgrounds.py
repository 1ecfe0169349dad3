"""The backgrounds of the scenes: patterns, landscapes, rooms.

Shape legend: H = W = size, 3 = RGB in [0, 1], all arrays float32.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from clora.tiny.world.drawing import WHITE, Array, Frame, Rgb, f32, hsv, mix, tone

BACKGROUNDS = (
    "gradient", "hills", "room", "stripes", "checker", "dots", "sunset", "beach", "forest", "city", "night",
    "bokeh", "mountains", "meadow", "waves",
)  # fmt: skip


@dataclass(frozen=True)
class Background:
    """A background: its kind, four colours, and the figures that place its parts (`seed` the small ones)."""

    kind: str
    colors: tuple[Rgb, Rgb, Rgb, Rgb]
    horizon: float = 0.6
    scale: float = 1.0
    angle: float = 0.5
    shift: float = 0.3
    seed: int = 0


def _ridge(frame: Frame, height: float, amplitude: float, waves: float, phase: float) -> Array:
    """Signed distance to the ground below a wavy line."""
    line = amplitude * (np.sin(6.28 * waves * frame.x + phase) + 0.5 * np.sin(13.1 * waves * frame.x + 2 * phase))
    return f32(height + line - frame.y)


def _spots(frame: Frame, rng: np.random.Generator, count: int, low: float, high: float, top: float) -> Array:
    """Signed distance to `count` scattered discs of radii low..high whose centres lie above y = top."""
    x, y = rng.uniform(0, 1, count), rng.uniform(0, top, count)
    radius = rng.uniform(low, high, count)
    discs = [frame.ellipse(float(a), float(b), float(r), float(r)) for a, b, r in zip(x, y, radius, strict=True)]
    return f32(functools.reduce(np.minimum, discs))


def _pattern(background: Background, frame: Frame) -> Array:
    """Stripes, checker, dots and waves, of periods of at least a tenth of the image."""
    a, b, _, _ = background.colors
    period = 0.16 * background.scale * (1.35 if background.kind == "waves" else 1.0)
    cos, sin = math.cos(background.angle), math.sin(background.angle)
    u = (cos * frame.x + sin * frame.y) / period + background.shift
    v = (cos * frame.y - sin * frame.x) / period
    edge = 1.3 * frame.px / period  # one pixel of blur in the units of u and v

    def square(t: Any) -> Array:
        return f32(np.clip(0.5 + (0.25 - np.abs((t % 1.0) - 0.5)) / edge, 0, 1))

    if background.kind == "stripes":
        cover = square(u)
    elif background.kind == "checker":
        first, second = square(u * 0.6), square(v * 0.6)
        cover = f32(first + second - 2 * first * second)
    elif background.kind == "waves":
        cover = square(u + 0.35 * np.sin(3.0 * v))
    else:
        du, dv = (u % 1.0) - 0.5, (v % 1.0) - 0.5
        cover = f32(np.clip(0.5 + (0.3 - np.sqrt(du * du + dv * dv)) / edge, 0, 1))
    return mix(a, b, cover)


def _sky(frame: Frame, top: Rgb, low: Rgb, horizon: float) -> Array:
    return mix(top, low, np.clip(frame.y / horizon, 0, 1))


def _landscape(background: Background, frame: Frame) -> Array:
    """Outdoor kinds: a sky, and layers of ground in front of it."""
    a, b, c, d = background.colors
    horizon, shift, kind = background.horizon, background.shift, background.kind
    rng = np.random.default_rng(background.seed)
    image = _sky(frame, a, b, max(horizon, 0.3))
    sun = frame.ellipse(0.15 + 0.7 * shift, 0.2, 0.08, 0.08)
    if kind == "hills":
        image = mix(image, (1.0, 0.93, 0.6), frame.cover(sun))
        image = mix(image, tone(c, 1.3), frame.cover(_ridge(frame, horizon - 0.06, 0.05, 1.0, 6 * shift)))
        return mix(image, c, frame.cover(_ridge(frame, horizon + 0.12, 0.05, 0.8, 9 * shift + 2)))
    if kind == "mountains":
        for i in range(3):
            centre, top = (shift + 0.4 * i) % 1.2 - 0.1, horizon - 0.42 + 0.07 * ((i * 7) % 3)
            rise = top + 1.3 * np.abs(frame.x - centre) - frame.y
            image = mix(image, tone(d, 0.85 + 0.1 * i), frame.cover(rise * 0.6))
            image = mix(image, WHITE, frame.cover(np.maximum(rise * 0.6, frame.y - top - 0.1)))
        return mix(image, c, frame.cover(_ridge(frame, horizon + 0.1, 0.02, 0.9, 7 * shift)))
    if kind == "sunset":
        low = frame.ellipse(0.15 + 0.7 * shift, horizon - 0.03, 0.15, 0.15)
        glow = np.exp(-8.0 * np.maximum(low, 0))
        image = mix(mix(image, (1.0, 0.85, 0.5), 0.6 * glow), (1.0, 0.9, 0.55), frame.cover(low))
        return mix(image, tone(c, 0.5), frame.cover(_ridge(frame, horizon + 0.04, 0.02, 1.2, 6 * shift)))
    if kind == "beach":
        image = mix(image, (1.0, 0.95, 0.7), frame.cover(sun))
        sea = mix((0.1, 0.45, 0.7), (0.3, 0.75, 0.8), np.clip((frame.y - horizon) / 0.25, 0, 1))
        image = mix(image, sea, frame.cover(horizon - frame.y))
        shore = _ridge(frame, horizon + 0.2, 0.015, 1.5, 5 * shift)
        return mix(mix(image, WHITE, frame.cover(shore - 0.015)), (0.93, 0.83, 0.6), frame.cover(shore + 0.015))
    if kind == "forest":
        image = mix(image, tone(c, 0.9), frame.cover(_ridge(frame, horizon + 0.15, 0.02, 1.0, 6 * shift)))
        for i in range(6):
            centre, high = (i + 0.6 * float(rng.uniform())) / 5.5 - 0.04, 0.33 + 0.2 * float(rng.uniform())
            base = horizon + 0.2 + 0.05 * float(rng.uniform())
            image = mix(image, (0.3, 0.2, 0.13), frame.cover(frame.box(centre, base, 0.022, 0.07)))
            tree = ((centre, base - high), (centre + 0.12, base), (centre - 0.12, base))
            image = mix(image, tone(d, 0.6 + 0.4 * float(rng.uniform())), frame.cover(frame.polygon(tree)))
        return image
    if kind in ("city", "night"):
        if kind == "night":
            image = mix(image, (1.0, 0.98, 0.85), frame.cover(_spots(frame, rng, 12, 0.011, 0.02, horizon)))
            moon = np.maximum(sun, -frame.ellipse(0.11 + 0.7 * shift, 0.18, 0.07, 0.07))
            image = mix(image, (1.0, 0.97, 0.8), frame.cover(moon))
            return mix(image, c, frame.cover(_ridge(frame, horizon + 0.12, 0.04, 0.9, 6 * shift)))
        for i in range(7):
            wide, high = 0.07 + 0.02 * float(rng.uniform()), 0.15 + 0.4 * float(rng.uniform())
            block = frame.box(i / 6.2, 1.0, wide, 1.0 - horizon + high)
            image = mix(image, tone(c, 0.6 + 0.4 * float(rng.uniform())), frame.cover(block))
            gap_x = np.abs((frame.x - i / 6.2 + 0.055) % 0.11 - 0.055) - 0.026
            window = np.maximum(np.maximum(block + 0.02, gap_x), np.abs(frame.y % 0.14 - 0.07) - 0.03)
            image = mix(image, (1.0, 0.88, 0.5), 0.75 * frame.cover(window))
        return image
    # meadow: a field with flowers
    image = mix(
        image,
        mix(tone(c, 1.2), tone(c, 0.75), frame.y),
        frame.cover(_ridge(frame, horizon, 0.03, 0.7, 6 * shift)),
    )
    flipped = Frame(frame.x, f32(1.0 - frame.y), frame.px)
    flowers = _spots(flipped, rng, 12, 0.02, 0.032, 1.0 - horizon - 0.06)
    return mix(image, d, frame.cover(flowers))


def render_background(background: Background, size: int = 64) -> Array:
    """The background alone: (size, size, 3) float32 in [0, 1]."""
    frame = Frame.unit(size)
    a, b, c, d = background.colors
    if background.kind in ("stripes", "checker", "dots", "waves"):
        image = _pattern(background, frame)
    elif background.kind == "gradient":
        cos, sin = math.cos(background.angle), math.sin(background.angle)
        image = mix(a, b, np.clip(0.5 + cos * (frame.x - 0.5) + sin * (frame.y - 0.5), 0, 1))
    elif background.kind == "room":
        floor = frame.cover(background.horizon + 0.12 - frame.y)
        image = mix(mix(a, tone(a, 0.85), frame.x), mix(c, tone(c, 0.8), frame.y), floor)
        skirting = frame.cover(frame.box(0.5, background.horizon + 0.11, 0.6, 0.025))
        x = 0.16 if background.shift < 0.5 else 0.84
        image = mix(mix(image, WHITE, skirting), WHITE, frame.cover(frame.box(x, 0.3, 0.125, 0.165)))
        inside = mix(b, tone(b, 1.4), np.clip(4 * frame.y - 0.6, 0, 1))
        image = mix(image, inside, frame.cover(frame.box(x, 0.3, 0.095, 0.135)))
        image = mix(image, WHITE, frame.cover(frame.box(x, 0.3, 0.013, 0.14)))
    elif background.kind == "bokeh":
        rng = np.random.default_rng(background.seed)
        image = _sky(frame, a, b, 1.0)
        for color in (c, d, tone(b, 1.4)):
            image = mix(image, color, 0.6 * frame.cover(_spots(frame, rng, 4, 0.05, 0.12, 1.0), 3.0))
    else:
        image = _landscape(background, frame)
    return np.clip(image, 0, 1).astype(np.float32)


def sample_background(rng: np.random.Generator, kind: str | None = None) -> Background:
    """A background drawn at random, of the given kind or of any of `BACKGROUNDS`."""
    kind = kind or str(rng.choice(BACKGROUNDS))
    hue = float(rng.uniform())
    soft, deep = float(rng.uniform(0.2, 0.5)), float(rng.uniform(0.4, 0.65))
    other = hue + float(rng.choice([0.0, 0.08, -0.08, 0.4, 0.5]))
    a, b = hsv(hue, soft, float(rng.uniform(0.75, 0.97))), hsv(other, deep, float(rng.uniform(0.6, 0.85)))
    c, d = hsv(float(rng.uniform(0.2, 0.42)), 0.5, 0.65), hsv(float(rng.uniform()), 0.45, 0.95)
    day = hsv(float(rng.uniform(0.52, 0.62)), float(rng.uniform(0.35, 0.6)), 0.95)
    pale = hsv(float(rng.uniform(0.5, 0.6)), 0.12, 0.98)
    if kind in ("hills", "mountains", "beach", "meadow", "forest"):
        a, b = day, pale
        if kind == "mountains":
            d = hsv(float(rng.uniform(0.58, 0.72)), 0.25, 0.6)
        if kind == "forest":
            d = hsv(float(rng.uniform(0.27, 0.45)), 0.55, 0.55)
    elif kind == "sunset":
        a, b = hsv(float(rng.uniform(0.7, 0.95)), 0.5, 0.6), hsv(float(rng.uniform(0.02, 0.1)), 0.65, 0.97)
    elif kind == "city":
        a, b = hsv(hue, 0.35, 0.85), hsv(other, 0.25, 0.97)
        c = hsv(float(rng.uniform(0.55, 0.75)), 0.3, 0.5)
    elif kind == "night":
        a, b = hsv(float(rng.uniform(0.6, 0.75)), 0.7, 0.22), hsv(float(rng.uniform(0.58, 0.7)), 0.6, 0.45)
        c = hsv(float(rng.uniform(0.35, 0.7)), 0.45, 0.2)
    elif kind == "room":
        b, c = day, hsv(float(rng.uniform(0.04, 0.1)), 0.45, float(rng.uniform(0.45, 0.75)))
    elif kind == "bokeh":
        a, b = hsv(hue, 0.6, 0.3), hsv(other, 0.5, 0.5)
        c, d = hsv(hue + 0.1, 0.5, 0.9), hsv(hue + 0.5, 0.45, 0.9)
    return Background(
        kind, (a, b, c, d), float(rng.uniform(0.45, 0.65)), float(rng.uniform(0.9, 1.6)),
        float(rng.uniform(0, math.pi)), float(rng.uniform()), int(rng.integers(1 << 30)),
    )  # fmt: skip

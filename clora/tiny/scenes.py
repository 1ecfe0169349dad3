"""Procedural portraits and animals on varied backgrounds: the sources of the tiny world.

Everything is drawn with signed distances (negative inside), turned into coverage over about one pixel, so
that edges are anti-aliased at any size. Coordinates: x to the right and y down, the image is the unit square;
a `Frame` holds them moved, turned and scaled so that a head is about one unit in radius.
Shape legend: H = W = size, 3 = RGB in [0, 1], all arrays float32.
"""

from __future__ import annotations

import colorsys
import functools
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]
Rgb = tuple[float, float, float]

KINDS = ("portrait", "animal")
BACKGROUNDS = (
    "gradient", "hills", "room", "stripes", "checker", "dots", "sunset", "beach", "forest", "city", "night",
    "bokeh", "mountains", "meadow", "waves",
)  # fmt: skip
SPECIES = ("cat", "dog", "rabbit", "bear", "fox", "panda", "lion", "mouse", "pig", "owl", "bird")
HAIR_STYLES = (
    "short",
    "side",
    "fringe",
    "bob",
    "long",
    "bun",
    "ponytail",
    "curly",
    "spiky",
    "mohawk",
    "bald",
)
WHITE: Rgb = (0.97, 0.97, 0.95)
DARK: Rgb = (0.13, 0.11, 0.13)


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


@dataclass(frozen=True)
class Scene:
    """All parameters of a picture; `x`, `y`, `radius` place the head in the unit square, `tilt` in radians.

    `style` is the hair style or the species, `pose` is "head" or "body" (animals). `main`, `second`, `third`
    and `fourth` are skin, hair, clothes and their trimmings, or fur, light fur, markings and collar.
    """

    kind: str
    background: Background
    x: float
    y: float
    radius: float
    tilt: float
    style: str
    pose: str
    main: Rgb
    second: Rgb
    third: Rgb
    fourth: Rgb
    eyes: Rgb
    mouth: str
    extras: tuple[str, ...]
    flip: bool


class HeadPose(NamedTuple):
    """The head: centre and radius in the unit square, tilt in radians; eyes and top in radii from there."""

    x: float
    y: float
    radius: float
    tilt: float
    eye_x: float
    eye_y: float
    top_y: float


class Rendered(NamedTuple):
    """A rendered scene. Masks are soft alphas in [0, 1]; `background_HW3` is the background on its own.

    `hair_HW` is hair or fur, `clothes_HW` clothes or collar, both as they are seen (not hidden parts).
    """

    image_HW3: Array
    subject_HW: Array
    background_HW3: Array
    hair_HW: Array
    clothes_HW: Array
    head: HeadPose


# ---------------------------------------------------------------- drawing


def f32(values: Any) -> Array:
    """The values as a float32 array (no copy where they are one already)."""
    return np.asarray(values, dtype=np.float32)


@functools.lru_cache(maxsize=8)
def unit_grid(size: int) -> tuple[Array, Array]:
    """Pixel centres of the unit square: x and y, each (size, size) float32 in (0, 1), read-only."""
    line = ((np.arange(size, dtype=np.float32) + np.float32(0.5)) / np.float32(size)).astype(np.float32)
    x_HW, y_HW = np.meshgrid(line, line)
    x_HW.setflags(write=False)
    y_HW.setflags(write=False)
    return x_HW, y_HW


@dataclass(frozen=True)
class Frame:
    """Coordinates (H, W) of every pixel in some local system, and the pixel pitch `px` in its units."""

    x: Array
    y: Array
    px: float

    @staticmethod
    def unit(size: int) -> Frame:
        """The unit square itself."""
        x_HW, y_HW = unit_grid(size)
        return Frame(x_HW, y_HW, 1.0 / size)

    def local(self, x: float, y: float, scale: float, tilt: float = 0.0, flip: bool = False) -> Frame:
        """Coordinates around (x, y), in units of `scale`, turned by `tilt` radians, `flip` mirrors x."""
        cos, sin = math.cos(tilt) / scale, math.sin(tilt) / scale
        dx, dy = self.x - x, self.y - y
        side = -1.0 if flip else 1.0
        return Frame(f32(side * (cos * dx + sin * dy)), f32(cos * dy - sin * dx), self.px / scale)

    def twin(self) -> Frame:
        """The same with |x|: one shape drawn at x > 0 appears on both sides."""
        return Frame(f32(np.abs(self.x)), self.y, self.px)

    def ellipse(self, x: float, y: float, rx: float, ry: float, turn: float = 0.0) -> Array:
        """Signed distance (approximate away from the edge) to an ellipse turned by `turn` radians."""
        dx, dy = self.x - x, self.y - y
        if turn:
            cos, sin = math.cos(turn), math.sin(turn)
            dx, dy = cos * dx + sin * dy, cos * dy - sin * dx
        if rx == ry:
            return f32(np.sqrt(dx * dx + dy * dy) - rx)
        ax, ay = dx / rx, dy / ry
        near = np.sqrt(ax * ax + ay * ay)
        grad = np.sqrt((ax / rx) ** 2 + (ay / ry) ** 2)
        return f32(near * (near - 1.0) / np.maximum(grad, 1e-4))

    def box(self, x: float, y: float, rx: float, ry: float, corner: float = 0.0) -> Array:
        """Signed distance to a box of half sizes rx, ry with rounded corners."""
        dx, dy = np.abs(self.x - x) - (rx - corner), np.abs(self.y - y) - (ry - corner)
        outside = np.sqrt(np.maximum(dx, 0) ** 2 + np.maximum(dy, 0) ** 2)
        return f32(outside + np.minimum(np.maximum(dx, dy), 0) - corner)

    def line(self, x0: float, y0: float, x1: float, y1: float, width: float) -> Array:
        """Signed distance to a segment with round ends, `width` thick."""
        ux, uy = x1 - x0, y1 - y0
        dx, dy = self.x - x0, self.y - y0
        along = np.clip((dx * ux + dy * uy) / max(ux * ux + uy * uy, 1e-9), 0, 1)
        return f32(np.sqrt((dx - along * ux) ** 2 + (dy - along * uy) ** 2) - width / 2)

    def polygon(self, points: tuple[tuple[float, float], ...], corner: float = 0.0) -> Array:
        """Signed distance to a convex polygon, listed clockwise on the screen and grown by `corner`."""
        sides = []
        for (x0, y0), (x1, y1) in zip(points, points[1:] + points[:1], strict=True):
            length = math.hypot(x1 - x0, y1 - y0)
            sides.append(((y1 - y0) * (self.x - x0) - (x1 - x0) * (self.y - y0)) / length)
        return f32(functools.reduce(np.maximum, sides) - corner)

    def cover(self, distance: Any, soft: float = 1.2) -> Array:
        """Coverage in [0, 1] of a signed distance, rising over `soft` pixels."""
        return f32(np.clip(0.5 - distance / (soft * self.px), 0, 1))


def mix(a_HW3: Array | Rgb, b_HW3: Array | Rgb, weight_HW: Any) -> Array:
    """a + weight (b - a): a and b are (H, W, 3) or one colour, weight is (H, W) in [0, 1]."""
    first, second = f32(a_HW3), f32(b_HW3)
    return f32(first + weight_HW[..., None] * (second - first))


def hsv(hue: float, saturation: float, value: float) -> Rgb:
    """A colour by hue (any float, period 1), saturation and value."""
    return colorsys.hsv_to_rgb(hue % 1.0, saturation, value)


def tone(color: Rgb, factor: float) -> Rgb:
    """The colour darker (factor < 1) or, beyond 1, mixed towards white."""
    if factor <= 1.0:
        return (color[0] * factor, color[1] * factor, color[2] * factor)
    w = factor - 1.0
    return (color[0] + w * (1 - color[0]), color[1] + w * (1 - color[1]), color[2] + w * (1 - color[2]))


class _Canvas:
    """An image under construction, and the masks of what has been painted on it."""

    def __init__(self, background_HW3: Array) -> None:
        self.image = background_HW3.copy()
        shape = self.image.shape[:2]
        self.subject: Array = np.zeros(shape, np.float32)
        self.parts: dict[str, Array] = {
            "hair": np.zeros(shape, np.float32),
            "clothes": np.zeros(shape, np.float32),
        }

    def paint(self, cover_HW: Array, color: Rgb | Array, part: str = "") -> None:
        """Lay a colour over the image where `cover_HW` says; it joins `part` and leaves the other parts."""
        self.image = mix(self.image, color, cover_HW)
        self.subject = self.subject + cover_HW * (1 - self.subject)
        for name, mask in self.parts.items():
            self.parts[name] = mask + cover_HW * ((1.0 if name == part else 0.0) - mask)


def _shaded(frame: Frame, color: Rgb, amount: float = 0.13) -> Array:
    """The colour lit softly from the upper left of a frame about one unit in radius: (H, W, 3)."""
    light = 1.0 - amount * np.clip(0.55 * frame.x + 0.8 * frame.y, -1.5, 1.5)
    return f32(np.clip(light[..., None] * f32(color), 0, 1))


# ---------------------------------------------------------------- backgrounds


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


# ---------------------------------------------------------------- portraits


def _hair_back(canvas: _Canvas, frame: Frame, style: str, color: Rgb) -> None:
    """The hair that lies behind the head and the shoulders' edge."""
    dark = _shaded(frame, tone(color, 0.85))
    if style == "long":
        canvas.paint(frame.cover(frame.box(0, 0.35, 1.0, 1.35, 0.8)), dark, "hair")
    elif style == "bob":
        canvas.paint(frame.cover(frame.box(0, -0.1, 1.02, 0.95, 0.55)), dark, "hair")
    elif style == "bun":
        canvas.paint(frame.cover(frame.ellipse(0, -1.15, 0.4, 0.36)), dark, "hair")
    elif style == "ponytail":
        canvas.paint(frame.cover(frame.ellipse(1.0, 0.2, 0.3, 0.85, -0.25)), dark, "hair")
    elif style in ("curly", "spiky"):
        turn = np.arctan2(frame.y + 0.15, frame.x)
        bumps = np.abs(np.sin(4.5 * turn)) if style == "curly" else 1.6 * (1 - np.abs(np.sin(4.5 * turn)))
        radius = 0.98 + 0.14 * bumps
        ball = np.sqrt(frame.x**2 + (frame.y + 0.15) ** 2) - radius
        canvas.paint(frame.cover(np.maximum(ball, frame.y - (0.5 if style == "curly" else 0.0))), dark, "hair")
    elif style == "mohawk":
        canvas.paint(frame.cover(frame.ellipse(0, -0.95, 0.24, 0.55)), dark, "hair")


def _hair_front(canvas: _Canvas, frame: Frame, style: str, color: Rgb) -> None:
    """The hair in front of the forehead: a cap, less an opening for the face."""
    if style in ("bald", "mohawk"):
        return
    cap = frame.ellipse(0, -0.1, 0.87, 1.0)
    if style in ("fringe", "bob"):
        shape = np.maximum(cap, frame.y + 0.36 - 0.12 * frame.x**2)
        shape = np.minimum(shape, np.maximum(np.maximum(cap, 0.66 - np.abs(frame.x)), frame.y - 0.2))
    else:
        opening = {"side": 0.3, "long": -0.12, "ponytail": -0.2}.get(style, 0.0)
        shape = np.maximum(np.maximum(cap, -frame.ellipse(opening, 0.42, 0.8, 0.95)), frame.y - 0.2)
    canvas.paint(frame.cover(shape), _shaded(frame, color, 0.2), "hair")


def _clothes(canvas: _Canvas, frame: Frame, scene: Scene) -> None:
    """Neck, shoulders and what they wear."""
    skin = scene.main
    canvas.paint(frame.cover(frame.box(0, 1.05, 0.32, 0.6, 0.2)), _shaded(frame, tone(skin, 0.82)))
    body = frame.ellipse(0, 2.35, 1.55, 1.12)
    body = np.minimum(body, frame.box(0, 3.9, 1.55, 1.6, 0.2))
    cover = frame.cover(body)
    color: Array | Rgb = _shaded(frame.local(0, 2.0, 1.0), scene.third)
    if "stripes" in scene.extras:
        stripe = frame.cover(np.abs((frame.y + 0.1 * frame.x**2) % 0.56 - 0.28) - 0.13)
        color = mix(color, scene.fourth, stripe)
    canvas.paint(cover, color, "clothes")
    if "vneck" in scene.extras:
        notch = ((-0.4, 1.1), (0.4, 1.1), (0.0, 1.85))
        canvas.paint(cover * frame.cover(frame.polygon(notch)), _shaded(frame, tone(skin, 0.88)))
    elif "collar" in scene.extras:
        flap = frame.twin().polygon(((0.02, 1.3), (0.4, 1.15), (0.55, 1.45), (0.25, 1.75)))
        canvas.paint(frame.cover(flap), tone(scene.fourth, 1.0), "clothes")
    elif "scarf" in scene.extras:
        canvas.paint(frame.cover(frame.box(0, 1.3, 0.62, 0.24, 0.22)), _shaded(frame, scene.fourth), "clothes")
        canvas.paint(frame.cover(frame.box(0.3, 1.75, 0.17, 0.4, 0.1)), tone(scene.fourth, 0.85), "clothes")
    else:
        neckline = np.maximum(frame.ellipse(0, 1.12, 0.42, 0.36), -body - 2.0)
        canvas.paint(cover * frame.cover(neckline), _shaded(frame, tone(skin, 0.85)))


def _face(canvas: _Canvas, frame: Frame, scene: Scene) -> None:
    """Brows, eyes, nose, cheeks and mouth of a person."""
    twin, skin = frame.twin(), scene.main
    blush = np.exp(-((twin.x - 0.45) ** 2 + (frame.y - 0.3) ** 2) / 0.035)
    canvas.image = mix(canvas.image, (0.95, 0.4, 0.38), 0.28 * blush * frame.cover(frame.ellipse(0, 0, 0.78, 0.98)))
    canvas.paint(frame.cover(twin.ellipse(0.32, 0.0, 0.17, 0.14)), WHITE)
    canvas.paint(frame.cover(twin.ellipse(0.32, 0.0, 0.115, 0.125)), tone(scene.eyes, 0.75))
    canvas.paint(frame.cover(twin.ellipse(0.32, 0.01, 0.06, 0.06)), DARK)
    brow = tone(scene.second, 0.65) if scene.style != "bald" else tone(skin, 0.5)
    lift = {"smile": 0.03, "open": 0.06, "flat": 0.0, "grin": 0.03}[scene.mouth]
    canvas.paint(frame.cover(twin.line(0.18, -0.25 - lift, 0.48, -0.26, 0.1)), brow)
    canvas.paint(frame.cover(frame.line(0.02, 0.12, 0.05, 0.24, 0.11)), tone(skin, 0.8))
    lips = (0.72, 0.26, 0.26)
    if scene.mouth == "open":
        canvas.paint(frame.cover(frame.ellipse(0, 0.52, 0.18, 0.15)), (0.5, 0.12, 0.14))
    elif scene.mouth == "flat":
        canvas.paint(frame.cover(frame.line(-0.2, 0.52, 0.2, 0.5, 0.12)), lips)
    else:
        smile = np.maximum(frame.ellipse(0, 0.42, 0.34, 0.25), 0.45 - frame.y)
        if scene.mouth == "smile":
            smile = np.maximum(np.abs(frame.ellipse(0, 0.38, 0.34, 0.22)) - 0.055, 0.42 - frame.y)
        canvas.paint(frame.cover(smile), lips)
        if scene.mouth == "grin":
            canvas.paint(frame.cover(frame.box(0, 0.485, 0.24, 0.05, 0.03)), WHITE)


def _portrait(canvas: _Canvas, frame: Frame, scene: Scene) -> HeadPose:
    skin = _shaded(frame, scene.main)
    _hair_back(canvas, frame, scene.style, scene.second)
    _clothes(canvas, frame, scene)
    canvas.paint(frame.cover(frame.twin().ellipse(0.78, 0.05, 0.16, 0.2)), tone(scene.main, 0.88))
    canvas.paint(frame.cover(frame.ellipse(0, 0, 0.78, 0.98)), skin)
    if "beard" in scene.extras:
        beard = np.maximum(frame.ellipse(0, 0.04, 0.8, 1.0), -frame.ellipse(0, 0.05, 0.64, 0.72))
        beard = np.minimum(np.maximum(beard, 0.1 - frame.y), frame.ellipse(0, 0.52, 0.32, 0.24))
        canvas.paint(frame.cover(beard), _shaded(frame, tone(scene.second, 0.9)), "hair")
    _face(canvas, frame, scene)
    _hair_front(canvas, frame, scene.style, scene.second)
    if "glasses" in scene.extras:
        ring = np.abs(frame.twin().ellipse(0.34, 0.0, 0.25, 0.22)) - 0.05
        bridge = np.minimum(
            frame.line(-0.1, -0.02, 0.1, -0.02, 0.09), frame.twin().line(0.58, -0.04, 0.78, -0.08, 0.09)
        )
        canvas.paint(frame.cover(np.minimum(ring, bridge)), DARK)
    if "beanie" in scene.extras:
        dome = np.maximum(frame.ellipse(0, -0.42, 0.9, 0.82), frame.y + 0.5)
        canvas.paint(frame.cover(dome), _shaded(frame, scene.fourth))
        canvas.paint(frame.cover(frame.box(0, -0.5, 0.92, 0.15, 0.14)), tone(scene.fourth, 0.75))
        canvas.paint(frame.cover(frame.ellipse(0, -1.28, 0.19, 0.19)), tone(scene.fourth, 1.5))
    elif "cap" in scene.extras:
        dome = np.maximum(frame.ellipse(0, -0.4, 0.88, 0.78), frame.y + 0.45)
        canvas.paint(frame.cover(dome), _shaded(frame, scene.fourth))
        canvas.paint(frame.cover(frame.ellipse(0.4, -0.46, 0.85, 0.15)), tone(scene.fourth, 0.7))
    return HeadPose(scene.x, scene.y, scene.radius, scene.tilt, 0.33, 0.0, -0.98)


# ---------------------------------------------------------------- animals


def _ears(canvas: _Canvas, frame: Frame, scene: Scene) -> None:
    twin, species = frame.twin(), scene.style
    fur, inner = scene.main, tone(scene.second, 0.95)
    pink: Rgb = (0.93, 0.62, 0.62)
    if species in ("cat", "fox", "owl"):
        high = {"cat": 1.35, "fox": 1.5, "owl": 1.15}[species]
        outer = ((0.12, -0.75), (0.72, -high), (0.95, -0.2))
        canvas.paint(frame.cover(twin.polygon(outer, 0.06)), _shaded(frame, fur), "hair")
        if species != "owl":
            canvas.paint(frame.cover(twin.polygon(((0.36, -0.75), (0.69, -high + 0.22), (0.82, -0.45)))), pink)
    elif species == "rabbit":
        canvas.paint(frame.cover(twin.ellipse(0.42, -1.35, 0.27, 0.75, 0.16)), _shaded(frame, fur), "hair")
        canvas.paint(frame.cover(twin.ellipse(0.43, -1.33, 0.13, 0.52, 0.16)), pink)
    elif species == "dog":
        canvas.paint(frame.cover(twin.ellipse(0.98, -0.05, 0.3, 0.68, -0.2)), _shaded(frame, scene.third), "hair")
    elif species == "pig":
        canvas.paint(
            frame.cover(twin.polygon(((0.3, -0.8), (0.95, -1.1), (0.95, -0.4)), 0.06)),
            tone(fur, 0.85),
            "hair",
        )
    else:
        big = 0.52 if species == "mouse" else 0.34
        at = (0.85, -0.75) if species == "mouse" else (0.7, -0.74)
        color = DARK if species == "panda" else fur
        canvas.paint(frame.cover(twin.ellipse(at[0], at[1], big, big)), _shaded(frame, color), "hair")
        if species != "panda":
            canvas.paint(frame.cover(twin.ellipse(at[0], at[1], 0.6 * big, 0.6 * big)), pink if big > 0.5 else inner)


def _animal_face(canvas: _Canvas, frame: Frame, scene: Scene) -> None:
    twin, species = frame.twin(), scene.style
    pale = _shaded(frame, scene.second)
    if species == "panda":
        canvas.paint(frame.cover(twin.ellipse(0.42, -0.05, 0.27, 0.34, -0.5)), DARK, "hair")
    elif species == "fox":
        cheeks = np.maximum(twin.ellipse(0.62, 0.42, 0.62, 0.44, -0.5), frame.ellipse(0, 0.0, 1.05, 0.88))
        canvas.paint(frame.cover(cheeks), pale, "hair")
    elif species == "owl":
        canvas.paint(frame.cover(twin.ellipse(0.4, -0.1, 0.44, 0.44)), pale, "hair")
    elif "patch" in scene.extras:
        patch = np.maximum(frame.ellipse(0.42, -0.15, 0.42, 0.5), frame.ellipse(0, 0, 0.95, 0.86))
        canvas.paint(frame.cover(patch), scene.third, "hair")
    if "tabby" in scene.extras:
        marks = np.minimum(frame.line(0, -0.8, 0, -0.45, 0.14), twin.line(0.3, -0.74, 0.24, -0.48, 0.13))
        marks = np.minimum(marks, twin.line(0.9, 0.1, 0.65, 0.12, 0.12))
        canvas.paint(frame.cover(marks), tone(scene.main, 0.6), "hair")
    eye_r = {"owl": 0.25, "mouse": 0.18}.get(species, 0.2)
    eye_x, eye_y = 0.42 if species != "dog" else 0.38, -0.08
    white = species in ("cat", "owl", "panda", "fox")
    if white:
        canvas.paint(frame.cover(twin.ellipse(eye_x, eye_y, eye_r, eye_r * 0.92)), tone(scene.eyes, 1.25))
    pupil = (0.1, 0.17) if species == "cat" else (0.13, 0.14) if white else (0.14, 0.165)
    canvas.paint(frame.cover(twin.ellipse(eye_x, eye_y, pupil[0], pupil[1])), DARK)
    canvas.paint(0.9 * frame.cover(frame.twin().ellipse(eye_x + 0.04, eye_y - 0.06, 0.05, 0.05)), WHITE)
    if species == "owl":
        canvas.paint(frame.cover(frame.polygon(((-0.16, 0.12), (0.16, 0.12), (0.0, 0.48)), 0.03)), (0.95, 0.65, 0.2))
        return
    if species == "pig":
        canvas.paint(frame.cover(frame.ellipse(0, 0.32, 0.36, 0.27)), tone(scene.main, 0.85))
        canvas.paint(frame.cover(twin.ellipse(0.14, 0.32, 0.07, 0.11)), tone(scene.main, 0.5))
    else:
        wide = {"dog": 0.42, "bear": 0.42, "fox": 0.26}.get(species, 0.36)
        canvas.paint(frame.cover(frame.ellipse(0, 0.38, wide, 0.3)), pale, "hair")
        nose = {"cat": (0.13, 0.09), "rabbit": (0.12, 0.09), "mouse": (0.14, 0.12)}.get(species, (0.19, 0.14))
        small = species in ("cat", "rabbit", "mouse")
        canvas.paint(frame.cover(frame.ellipse(0, 0.22, nose[0], nose[1])), (0.86, 0.45, 0.48) if small else DARK)
    if scene.mouth == "open" and species != "pig":
        canvas.paint(frame.cover(frame.ellipse(0, 0.56, 0.14, 0.17)), (0.88, 0.38, 0.42))
    else:
        drop = 0.12 if species == "pig" else 0.0
        curve = np.maximum(np.abs(twin.ellipse(0.14, 0.42 + drop, 0.15, 0.13)) - 0.045, 0.44 + drop - frame.y)
        canvas.paint(frame.cover(curve), tone(scene.main, 0.35))


def _animal_body(canvas: _Canvas, frame: Frame, scene: Scene) -> None:
    """Tail, trunk and paws: a bust in the "head" pose, the whole sitting animal in the "body" pose."""
    twin, species = frame.twin(), scene.style
    fur = DARK if species == "panda" else scene.main
    shaded = _shaded(frame.local(0, 1.6, 1.0), fur, 0.18)
    belly = _shaded(frame.local(0, 1.6, 1.0), scene.second, 0.15)
    if scene.pose == "head":
        canvas.paint(frame.cover(frame.ellipse(0, 2.1, 1.15, 1.4)), shaded, "hair")
        canvas.paint(frame.cover(frame.ellipse(0, 2.1, 0.62, 1.1)), belly, "hair")
        return
    if species == "fox":
        canvas.paint(frame.cover(frame.ellipse(1.25, 1.75, 0.38, 0.85, 0.5)), tone(fur, 0.9), "hair")
        canvas.paint(frame.cover(frame.ellipse(1.5, 1.22, 0.22, 0.34, 0.5)), WHITE, "hair")
    elif species in ("cat", "mouse", "lion", "dog"):
        width = 0.2 if species != "mouse" else 0.14
        tail = np.maximum(np.abs(frame.ellipse(1.05, 1.7, 0.5, 0.62)) - width / 1.6, 0.85 - frame.x)
        canvas.paint(frame.cover(tail), tone(fur if species != "mouse" else (0.9, 0.6, 0.6), 0.85), "hair")
    elif species == "rabbit":
        canvas.paint(frame.cover(frame.ellipse(0.88, 2.15, 0.27, 0.27)), WHITE, "hair")
    canvas.paint(frame.cover(frame.ellipse(0, 1.6, 0.86, 1.05)), shaded, "hair")
    trunk = scene.main if species == "panda" else scene.second
    canvas.paint(frame.cover(frame.ellipse(0, 1.4, 0.55, 0.6)), trunk if species == "panda" else belly, "hair")
    if species == "owl":
        canvas.paint(frame.cover(twin.ellipse(0.78, 1.55, 0.27, 0.75, 0.12)), tone(fur, 0.75), "hair")
        canvas.paint(frame.cover(twin.ellipse(0.3, 2.6, 0.22, 0.12)), (0.95, 0.65, 0.2))
        return
    canvas.paint(frame.cover(twin.ellipse(0.62, 2.45, 0.36, 0.22)), tone(fur, 0.88), "hair")
    canvas.paint(frame.cover(twin.line(0.25, 1.85, 0.25, 2.42, 0.4)), tone(fur, 0.93), "hair")


def _bird(canvas: _Canvas, frame: Frame, scene: Scene) -> HeadPose:
    """A bird seen from the side, facing x > 0 of the frame; the frame is centred on its head."""
    fur, pale, orange = scene.main, scene.second, (0.95, 0.62, 0.18)
    body = frame.local(-0.55, 1.25, 1.0)
    for x in (-0.75, -0.35):
        canvas.paint(frame.cover(frame.line(x, 2.2, x + 0.05, 3.0, 0.14)), tone(orange, 0.85))
        canvas.paint(frame.cover(frame.line(x - 0.1, 3.0, x + 0.32, 3.0, 0.15)), tone(orange, 0.85))
    canvas.paint(frame.cover(frame.ellipse(-2.15, 1.35, 0.9, 0.28, -0.25)), tone(fur, 0.7), "hair")
    canvas.paint(frame.cover(frame.ellipse(-0.6, 1.25, 1.3, 1.05, 0.35)), _shaded(body, fur), "hair")
    canvas.paint(frame.cover(frame.ellipse(0.0, 1.45, 0.6, 0.75, 0.5)), _shaded(body, pale), "hair")
    canvas.paint(frame.cover(frame.polygon(((0.6, -0.25), (1.4, 0.08), (0.6, 0.3)), 0.03)), orange)
    if "patch" in scene.extras:
        crest = np.minimum(frame.ellipse(-0.25, -0.95, 0.17, 0.5, -0.4), frame.ellipse(-0.6, -0.75, 0.15, 0.45, -0.8))
        canvas.paint(frame.cover(crest), scene.third, "hair")
    canvas.paint(frame.cover(frame.ellipse(0, 0, 0.78, 0.78)), _shaded(frame, fur), "hair")
    canvas.paint(frame.cover(frame.ellipse(-0.95, 1.25, 0.85, 0.52, 0.3)), _shaded(body, scene.third), "hair")
    canvas.paint(frame.cover(frame.ellipse(0.25, -0.12, 0.24, 0.24)), WHITE)
    canvas.paint(frame.cover(frame.ellipse(0.3, -0.12, 0.14, 0.14)), DARK)
    return HeadPose(scene.x, scene.y, scene.radius, scene.tilt, 0.3, -0.12, -0.78)


def _animal(canvas: _Canvas, frame: Frame, scene: Scene) -> HeadPose:
    if scene.style == "bird":
        return _bird(canvas, frame, scene)
    _animal_body(canvas, frame, scene)
    if "collar" in scene.extras:
        canvas.paint(frame.cover(frame.ellipse(0, 0.8, 0.66, 0.26)), scene.fourth, "clothes")
    if scene.style == "lion":
        turn = np.arctan2(frame.y, frame.x)
        mane = np.sqrt(frame.x**2 + frame.y**2) - 1.18 - 0.1 * np.sin(11 * turn)
        canvas.paint(frame.cover(mane), _shaded(frame, scene.third, 0.2), "hair")
    _ears(canvas, frame, scene)
    wide = {"fox": 1.0, "pig": 1.0, "bear": 0.98, "panda": 1.02, "rabbit": 0.86, "mouse": 0.88}.get(scene.style, 0.95)
    canvas.paint(frame.cover(frame.ellipse(0, 0, wide, 0.86)), _shaded(frame, scene.main, 0.16), "hair")
    _animal_face(canvas, frame, scene)
    return HeadPose(scene.x, scene.y, scene.radius, scene.tilt, 0.41, -0.08, -0.86)


# ---------------------------------------------------------------- sampling and rendering

_SKIN: tuple[Rgb, ...] = (
    (0.98, 0.84, 0.73),
    (0.94, 0.76, 0.62),
    (0.85, 0.63, 0.47),
    (0.68, 0.46, 0.32),
    (0.47, 0.31, 0.22),
)
_HAIR: tuple[Rgb, ...] = (
    (0.16, 0.12, 0.11), (0.33, 0.2, 0.12), (0.52, 0.32, 0.17), (0.87, 0.7, 0.36), (0.76, 0.35, 0.16),
    (0.22, 0.15, 0.13), (0.42, 0.26, 0.16), (0.93, 0.8, 0.5), (0.72, 0.71, 0.72),
    (0.75, 0.35, 0.6), (0.25, 0.45, 0.7),
)  # fmt: skip
_EYES: tuple[Rgb, ...] = ((0.35, 0.22, 0.12), (0.25, 0.5, 0.75), (0.3, 0.6, 0.3), (0.85, 0.65, 0.2))
_CREAM, _SNOW, _GREY, _BROWN, _TAN, _ORANGE = (
    (0.97, 0.9, 0.78), (0.95, 0.94, 0.92), (0.58, 0.58, 0.62), (0.5, 0.33, 0.2), (0.82, 0.63, 0.42),
    (0.92, 0.55, 0.22),
)  # fmt: skip
_FUR: dict[str, tuple[Rgb, ...]] = {
    "cat": (_ORANGE, _GREY, (0.25, 0.23, 0.25), _CREAM, _TAN),
    "dog": (_TAN, _BROWN, _SNOW, (0.75, 0.5, 0.3), _GREY),
    "rabbit": (_SNOW, _GREY, _TAN, (0.66, 0.5, 0.4)),
    "bear": (_BROWN, (0.4, 0.26, 0.18), (0.72, 0.5, 0.32), _SNOW),
    "fox": (_ORANGE, (0.87, 0.42, 0.16), (0.68, 0.68, 0.74)),
    "panda": (_SNOW,),
    "lion": ((0.93, 0.74, 0.4), (0.86, 0.66, 0.36)),
    "mouse": (_GREY, (0.75, 0.73, 0.75), (0.66, 0.53, 0.44)),
    "pig": ((0.96, 0.72, 0.74), (0.93, 0.63, 0.62)),
    "owl": (_BROWN, _GREY, (0.66, 0.46, 0.3)),
    "bird": ((0.25, 0.55, 0.85), (0.88, 0.3, 0.28), (0.97, 0.8, 0.25), (0.4, 0.7, 0.4), (0.6, 0.45, 0.75)),
}


def _pick(rng: np.random.Generator, colors: tuple[Rgb, ...]) -> Rgb:
    """One of the colours, jittered a little so that no two pictures share a palette."""
    base = np.asarray(colors[int(rng.integers(len(colors)))]) * rng.uniform(0.93, 1.06) + rng.normal(0, 0.012, 3)
    red, green, blue = np.clip(base, 0, 1)
    return float(red), float(green), float(blue)


def _vivid(rng: np.random.Generator) -> Rgb:
    return hsv(float(rng.uniform()), float(rng.uniform(0.35, 0.75)), float(rng.uniform(0.5, 0.92)))


def sample_scene(seed: int, kind: str | None = None) -> Scene:
    """The scene of a seed, always the same one; `kind` is "portrait", "animal" or None for either."""
    if kind is not None and kind not in KINDS:
        raise ValueError(f"kind {kind!r} is not one of {KINDS}")
    rng = np.random.default_rng(seed)
    drawn = KINDS[int(rng.integers(2))]
    kind = kind or drawn
    background = sample_background(rng)
    x, tilt = float(np.clip(rng.normal(0.5, 0.06), 0.36, 0.64)), float(rng.normal(0, 0.08))
    flip = bool(rng.integers(2))
    eyes = _pick(rng, _EYES)
    extras: list[str] = []
    if kind == "portrait":
        style, pose = str(rng.choice(HAIR_STYLES)), "head"
        mouth = str(rng.choice(("smile", "smile", "grin", "open", "flat")))
        main, second, third, fourth = _pick(rng, _SKIN), _pick(rng, _HAIR), _vivid(rng), _vivid(rng)
        extras.append(str(rng.choice(("crew", "vneck", "collar", "scarf"))))
        extras += [name for name, p in (("stripes", 0.25), ("glasses", 0.2)) if rng.uniform() < p]
        if style in ("short", "side", "bald", "spiky", "mohawk", "curly") and rng.uniform() < 0.35:
            extras.append("beard")
        if style in ("short", "long", "bob", "fringe", "ponytail") and rng.uniform() < 0.2:
            extras.append(str(rng.choice(("beanie", "cap"))))
        radius, y = float(rng.uniform(0.215, 0.28)), float(rng.uniform(0.4, 0.48))
    else:
        style, pose = str(rng.choice(SPECIES)), str(rng.choice(("head", "body")))
        mouth = str(rng.choice(("smile", "open")))
        main = _pick(rng, _FUR[style])
        pale = tone(main, 1.6) if rng.uniform() < 0.5 else _pick(rng, (_CREAM, _SNOW))
        second = pale if min(main) < 0.85 or style == "panda" else tone(main, 0.85)
        third = tone(main, 0.65) if rng.uniform() < 0.6 else _pick(rng, (_BROWN, _GREY, (0.3, 0.22, 0.2)))
        if style == "bird":
            third = tone(main, 0.7)
        elif style == "lion":
            third = _pick(rng, ((0.6, 0.33, 0.14), (0.72, 0.42, 0.18), (0.4, 0.24, 0.14)))
        fourth = _vivid(rng)
        if style in ("cat", "dog", "rabbit", "bird", "mouse") and rng.uniform() < 0.45:
            extras.append("patch")
        if style == "cat" and "patch" not in extras and rng.uniform() < 0.6:
            extras.append("tabby")
        if style not in ("owl", "bird", "lion") and rng.uniform() < 0.35:
            extras.append("collar")
        radius, y = float(rng.uniform(0.23, 0.29)), float(rng.uniform(0.42, 0.52))
        if style == "bird":
            radius, y = float(rng.uniform(0.13, 0.18)), float(rng.uniform(0.3, 0.38))
            x += 0.08 if not flip else -0.08
        elif pose == "body":
            radius, y = float(rng.uniform(0.16, 0.2)), float(rng.uniform(0.36, 0.44))
        if style == "rabbit":
            y += 0.07
    return Scene(kind, background, x, y, radius, tilt, style, pose, main, second, third, fourth, eyes, mouth,
                 tuple(extras), flip)  # fmt: skip


def render(scene: Scene, size: int = 64) -> Rendered:
    """Draw a scene at size x size pixels (size >= 32); see `Rendered` for shapes and ranges."""
    if size < 32:
        raise ValueError(f"size must be at least 32, got {size}")
    background_HW3 = render_background(scene.background, size)
    canvas = _Canvas(background_HW3)
    frame = Frame.unit(size).local(scene.x, scene.y, scene.radius, scene.tilt, scene.flip)
    head = (_portrait if scene.kind == "portrait" else _animal)(canvas, frame, scene)
    hair, clothes = (np.clip(canvas.parts[name], 0, 1).astype(np.float32) for name in ("hair", "clothes"))
    image_HW3 = np.clip(canvas.image, 0, 1).astype(np.float32)
    return Rendered(image_HW3, np.clip(canvas.subject, 0, 1).astype(np.float32), background_HW3, hair, clothes, head)

"""Drawing by signed distances (negative inside), turned into coverage over about one pixel.

So edges are anti-aliased at any size. x runs to the right and y down, the image is the unit square; a `Frame` holds
the coordinates moved, turned and scaled, so that a head is about one unit in radius.

Shape legend: H = W = size, 3 = RGB in [0, 1], all arrays float32.
"""

from __future__ import annotations

import colorsys
import functools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]
Rgb = tuple[float, float, float]

WHITE: Rgb = (0.97, 0.97, 0.95)
DARK: Rgb = (0.13, 0.11, 0.13)


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


class Canvas:
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


def shaded(frame: Frame, color: Rgb, amount: float = 0.13) -> Array:
    """The colour lit softly from the upper left of a frame about one unit in radius: (H, W, 3)."""
    light = 1.0 - amount * np.clip(0.55 * frame.x + 0.8 * frame.y, -1.5, 1.5)
    return f32(np.clip(light[..., None] * f32(color), 0, 1))

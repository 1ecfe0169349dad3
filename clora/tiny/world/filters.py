"""Filters and small tools of the effects, on (H, W, 3) float32 images about [0, 1].

Places are in the unit square and widths in "pixels of a 64-pixel image", so that a picture looks the same at any size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from clora.tiny.world.drawing import Array, Frame, Rgb, f32, mix
from clora.tiny.world.scenes import Rendered

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


def soap_bubbles(image: Array, frame: Frame, rng: Rng, count: int, low: float, high: float) -> Array:
    """`count` soap bubbles of radii low..high at scattered places."""
    for x, y in scattered(rng, count):
        radius = float(rng.uniform(low, high))
        ball = frame.ellipse(x, y, radius, radius)
        image = mix(image, (0.85, 0.95, 1.0), 0.3 * frame.cover(ball))
        image = mix(image, (0.93, 0.98, 1.0), 0.9 * frame.cover(np.abs(ball) - 0.8 * PIXEL, 1.6))
        glint = frame.ellipse(x - 0.35 * radius, y - 0.35 * radius, 0.25 * radius, 0.25 * radius)
        image = mix(image, (1.0, 1.0, 1.0), frame.cover(glint))
    return image

"""The edits on which the tiny base is trained (and which feed the general stream): an instruction, and the picture.

None is an effect of `clora.tiny.effects.table`. Some leave the outcome open ("add a red circle" does not say where).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clora.tiny.world.drawing import Frame, unit_grid
from clora.tiny.world.filters import frame_of, sample
from clora.tiny.world.scenes import Rendered

Image = NDArray[Any]
Field = NDArray[Any]
Edit = Callable[[Rendered, np.random.Generator], tuple[str, Image]]

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.86, 0.16, 0.16), "orange": (0.96, 0.55, 0.14), "yellow": (0.97, 0.86, 0.25),
    "green": (0.20, 0.66, 0.30), "teal": (0.13, 0.62, 0.62), "blue": (0.18, 0.36, 0.85),
    "purple": (0.52, 0.24, 0.74), "pink": (0.97, 0.55, 0.72), "brown": (0.45, 0.29, 0.17),
    "black": (0.07, 0.07, 0.09), "white": (0.97, 0.97, 0.97), "gray": (0.52, 0.53, 0.55),
}  # fmt: skip
PLACES: dict[str, tuple[float, float]] = {
    "top left": (0.24, 0.24),
    "top right": (0.76, 0.24),
    "bottom left": (0.24, 0.76),
    "bottom right": (0.76, 0.76),
    "center": (0.5, 0.5),
}


def _colour(rng: np.random.Generator) -> tuple[str, Image]:
    name = str(rng.choice(list(COLOURS)))
    return name, np.asarray(COLOURS[name], np.float32)


def _two_colours(rng: np.random.Generator) -> tuple[str, Image, str, Image]:
    a, b = rng.choice(list(COLOURS), 2, replace=False)
    return str(a), np.asarray(COLOURS[a], np.float32), str(b), np.asarray(COLOURS[b], np.float32)


def _cover(frame: Frame, distance: Any) -> Field:
    """Anti-aliased coverage (H, W, 1) of the set where `distance` (in units of the image side) is negative."""
    return frame.cover(distance, 1.5)[..., None]


def _over(image: Image, cover: Field, colour: Image) -> Image:
    return np.asarray((image * (1 - cover) + colour * cover), np.float32)


def blur(image: Image, sigma: float) -> Image:
    """Gaussian blur by `sigma` pixels of an image (H, W, C), edges repeated.

    Its weights are fp64, those of `filters.blur` fp32: the base was trained on these pictures, so they stay bit for bit
    what they were; for the same reason `_over` is no `mix`.
    """
    radius = int(np.ceil(2.5 * sigma))
    kernel = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    kernel /= kernel.sum()
    for axis in (0, 1):
        pad = [(radius, radius) if a == axis else (0, 0) for a in range(image.ndim)]
        padded = np.pad(image, pad, mode="edge")
        image = sum(k * np.take(padded, range(i, i + image.shape[axis]), axis) for i, k in enumerate(kernel))
    return np.asarray(image, np.float32)


def _identity(r: Rendered, rng: np.random.Generator) -> tuple[str, Image]:
    return str(rng.choice(["keep the image unchanged", "do not change anything"])), r.image_HW3


def _brightness(r: Rendered, rng: np.random.Generator) -> tuple[str, Image]:
    word, amount = [("a little", 0.14), ("", 0.25), ("a lot", 0.4)][rng.integers(3)]
    if rng.random() < 0.5:
        return f"make the image brighter {word}".strip(), r.image_HW3 + amount * (1 - r.image_HW3)
    return f"make the image darker {word}".strip(), r.image_HW3 * (1 - amount * 1.4)


def _contrast(r: Rendered, rng: np.random.Generator) -> tuple[str, Image]:
    if rng.random() < 0.5:
        return "increase the contrast", (r.image_HW3 - 0.5) * 1.6 + 0.5
    return "reduce the contrast", (r.image_HW3 - 0.5) * 0.5 + 0.5


def _saturation(r: Rendered, rng: np.random.Generator) -> tuple[str, Image]:
    grey = r.image_HW3.mean(-1, keepdims=True)
    if rng.random() < 0.5:
        return "make the colors stronger", grey + 1.8 * (r.image_HW3 - grey)
    return "make the colors weaker", grey + 0.4 * (r.image_HW3 - grey)


def _tint(r: Rendered, rng: np.random.Generator) -> tuple[str, Image]:
    name, colour = _colour(rng)
    return f"tint the image {name}", r.image_HW3 * 0.6 + 0.4 * colour


def _lighting(r: Rendered, rng: np.random.Generator) -> tuple[str, Image]:
    name, colour = _colour(rng)
    x, y = unit_grid(len(r.image_HW3))
    side, ramp = [("left", 1 - x), ("right", x), ("top", 1 - y), ("bottom", y)][rng.integers(4)]
    return f"add {name} light from the {side}", _over(r.image_HW3, 0.75 * ramp[..., None] ** 1.5, colour)


def _recolour_background(r: Rendered, rng: np.random.Generator) -> tuple[str, Image]:
    name, colour = _colour(rng)
    subject = r.subject_HW[..., None]
    return f"make the background {name}", _over(r.image_HW3, 1 - subject, colour)


def _pattern_background(r: Rendered, rng: np.random.Generator) -> tuple[str, Image]:
    a, first, b, second = _two_colours(rng)
    x, y = unit_grid(len(r.image_HW3))
    count = int(rng.integers(4, 8))
    waves = {
        "horizontal stripes": np.sin(2 * np.pi * count * y),
        "vertical stripes": np.sin(2 * np.pi * count * x),
        "diagonal stripes": np.sin(2 * np.pi * count * 0.8 * (x + y)),
        "checks": np.sin(np.pi * count * x) * np.sin(np.pi * count * y) * 1.6,
        "rings": np.sin(2 * np.pi * count * 1.4 * np.hypot(x - 0.5, y - 0.5)),
        "dots": 1.2 - 4.2 * np.hypot(x * count % 1 - 0.5, y * count % 1 - 0.5),
    }
    word = str(rng.choice(list(waves)))
    mix = (0.5 + 0.5 * np.tanh(2.2 * waves[word]))[..., None]
    background = first * mix + second * (1 - mix)
    subject = r.subject_HW[..., None]
    return f"fill the background with {a} and {b} {word}", _over(background, subject, r.image_HW3)


def _gradient_background(r: Rendered, rng: np.random.Generator) -> tuple[str, Image]:
    a, first, b, second = _two_colours(rng)
    y = frame_of(r).y
    background = first * (1 - y[..., None]) + second * y[..., None]
    subject = r.subject_HW[..., None]
    return f"make the background fade from {a} to {b}", _over(background, subject, r.image_HW3)


def _recolour_subject(r: Rendered, rng: np.random.Generator) -> tuple[str, Image]:
    name, colour = _colour(rng)
    luminance = r.image_HW3.mean(-1, keepdims=True)
    shaded = np.clip(colour * (0.35 + 1.1 * luminance), 0, 1)
    return f"paint the subject {name}", _over(r.image_HW3, 0.85 * r.subject_HW[..., None], shaded)


def _outline(r: Rendered, rng: np.random.Generator) -> tuple[str, Image]:
    name, colour = _colour(rng)
    soft = blur(r.subject_HW[..., None], 1.6)
    rim = np.clip(1.6 * (1 - np.abs(soft - 0.5) * 3.2), 0, 1)
    return f"draw a {name} outline around the subject", _over(r.image_HW3, rim, colour)


def _isolate(r: Rendered, rng: np.random.Generator) -> tuple[str, Image]:
    name, colour = _colour(rng)
    return f"cover the subject with {name}", _over(r.image_HW3, r.subject_HW[..., None], colour)


def _remove(r: Rendered, rng: np.random.Generator) -> tuple[str, Image]:
    return "remove the subject", r.background_HW3


def _shift(r: Rendered, rng: np.random.Generator) -> tuple[str, Image]:
    x, y = unit_grid(len(r.image_HW3))
    word, amount = [("a little", 0.12), ("a lot", 0.3)][rng.integers(2)]
    side, dx, dy = [("left", 1, 0), ("right", -1, 0), ("up", 0, 1), ("down", 0, -1)][rng.integers(4)]
    moved = sample(r.image_HW3, x + amount * dx, y + amount * dy)
    return f"move the image {side} {word}", moved


def _zoom(r: Rendered, rng: np.random.Generator) -> tuple[str, Image]:
    frame = frame_of(r)
    x, y = frame.x, frame.y
    if rng.random() < 0.5:
        word, scale = [("a little", 0.8), ("a lot", 0.55)][rng.integers(2)]
        return f"zoom in {word}", sample(r.image_HW3, 0.5 + (x - 0.5) * scale, 0.5 + (y - 0.5) * scale)
    name, colour = _colour(rng)
    scale = 1.6
    u, v = 0.5 + (x - 0.5) * scale, 0.5 + (y - 0.5) * scale
    inside = _cover(frame, np.maximum(np.abs(x - 0.5), np.abs(y - 0.5)) - 0.5 / scale)
    return f"make the image smaller on {name}", _over(
        np.broadcast_to(colour, r.image_HW3.shape), inside, sample(r.image_HW3, u, v)
    )


def _flip(r: Rendered, rng: np.random.Generator) -> tuple[str, Image]:
    image = r.image_HW3
    word, result = [
        ("flip the image left to right", image[:, ::-1]),
        ("turn the image upside down", image[::-1]),
        ("rotate the image to the left", np.rot90(image, 1)),
        ("rotate the image to the right", np.rot90(image, -1)),
        ("swap the left and right halves", np.roll(image, image.shape[1] // 2, axis=1)),
        ("swap the top and bottom halves", np.roll(image, image.shape[0] // 2, axis=0)),
    ][rng.integers(6)]
    return word, result


def _tilt(r: Rendered, rng: np.random.Generator) -> tuple[str, Image]:
    x, y = unit_grid(len(r.image_HW3))
    side, angle = [("left", -0.35), ("right", 0.35)][rng.integers(2)]
    c, s = np.cos(angle), np.sin(angle)
    u, v = 0.5 + c * (x - 0.5) + s * (y - 0.5), 0.5 - s * (x - 0.5) + c * (y - 0.5)
    return f"tilt the image to the {side}", sample(r.image_HW3, u, v)


def _wave(r: Rendered, rng: np.random.Generator) -> tuple[str, Image]:
    x, y = unit_grid(len(r.image_HW3))
    if rng.random() < 0.5:
        return "bend the image in waves", sample(r.image_HW3, x + 0.05 * np.sin(12 * y), y)
    return "stretch the image wider", sample(r.image_HW3, 0.5 + (x - 0.5) * 0.6, y)


def _copies(r: Rendered, rng: np.random.Generator) -> tuple[str, Image]:
    """A small copy of the image in a corner, or the image repeated in a row."""
    frame = frame_of(r)
    x, y = frame.x, frame.y
    place = str(rng.choice(["top left", "top right", "bottom left", "bottom right"]))
    cx, cy = PLACES[place]
    u, v = 0.5 + (x - cx) * 2.5, 0.5 + (y - cy) * 2.5
    inside = _cover(frame, np.maximum(np.abs(x - cx), np.abs(y - cy)) - 0.2)
    small = sample(blur(r.image_HW3, 0.8), u, v)
    return f"paste a small copy at the {place}", _over(r.image_HW3, inside, small)


def _blur(r: Rendered, rng: np.random.Generator) -> tuple[str, Image]:
    word, sigma = [("a little", 1.2), ("a lot", 3.0)][rng.integers(2)]
    if rng.random() < 0.5:
        return f"blur the image {word}", blur(r.image_HW3, sigma)
    blurred = blur(r.image_HW3, sigma + 0.6)
    return f"blur the background {word}", _over(blurred, r.subject_HW[..., None], r.image_HW3)


def _sharpen(r: Rendered, rng: np.random.Generator) -> tuple[str, Image]:
    return "make the image sharper", r.image_HW3 + 1.2 * (r.image_HW3 - blur(r.image_HW3, 1.5))


def _border(r: Rendered, rng: np.random.Generator) -> tuple[str, Image]:
    name, colour = _colour(rng)
    frame = frame_of(r)
    x, y = frame.x, frame.y
    word, width = [("thin", 0.06), ("thick", 0.14)][rng.integers(2)]
    edge = np.maximum(np.abs(x - 0.5), np.abs(y - 0.5)) - 0.5 + width
    return f"add a {word} {name} border", _over(r.image_HW3, _cover(frame, -edge), colour)


def _half(r: Rendered, rng: np.random.Generator) -> tuple[str, Image]:
    name, colour = _colour(rng)
    frame = frame_of(r)
    x, y = frame.x, frame.y
    side, field = [("left", x), ("right", 1 - x), ("top", y), ("bottom", 1 - y)][rng.integers(4)]
    return f"cover the {side} half with {name}", _over(r.image_HW3, _cover(frame, field - 0.5), colour)


def _shape_distance(shape: str, x: Field, y: Field, cx: float, cy: float, radius: float) -> Field:
    dx, dy = x - cx, y - cy
    if shape == "circle":
        return np.hypot(dx, dy) - radius
    if shape == "square":
        return np.asarray(np.maximum(np.abs(dx), np.abs(dy)) - radius * 0.9, np.float32)
    if shape == "triangle":
        return np.maximum(dy - radius * 0.7, np.abs(dx) * 0.866 - dy * 0.5 - radius * 0.55)
    if shape == "ring":
        return np.abs(np.hypot(dx, dy) - radius) - radius * 0.3
    angle = np.arctan2(dx, -dy)  # star
    return np.asarray(np.hypot(dx, dy) - radius * (0.72 + 0.4 * np.cos(5 * angle)), np.float32)


_SHAPES = ("circle", "square", "triangle", "star", "ring")


def _shape(r: Rendered, rng: np.random.Generator) -> tuple[str, Image]:
    """One shape; half of the time its place is left open."""
    name, colour = _colour(rng)
    shape = str(rng.choice(_SHAPES))
    frame = frame_of(r)
    x, y = frame.x, frame.y
    if rng.random() < 0.5:
        place = str(rng.choice(list(PLACES)))
        cx, cy = PLACES[place]
        text = f"add a {name} {shape} at the {place}"
    else:
        cx, cy = rng.uniform(0.2, 0.8, 2)
        text = f"add a {name} {shape}"
    return text, _over(r.image_HW3, _cover(frame, _shape_distance(shape, x, y, cx, cy, 0.15)), colour)


def _many(r: Rendered, rng: np.random.Generator) -> tuple[str, Image]:
    """Many small things at random places."""
    name, colour = _colour(rng)
    what = str(rng.choice(["dots", "stars", "squares", "lines", "rings"]))
    frame = frame_of(r)
    x, y = frame.x, frame.y
    word, count = [("a few", 5), ("many", 14)][rng.integers(2)]
    image = r.image_HW3
    angle = rng.uniform(0, np.pi)
    for _ in range(count):
        cx, cy = rng.uniform(0.05, 0.95, 2)
        if what == "lines":
            along = np.abs((x - cx) * np.cos(angle) + (y - cy) * np.sin(angle)) - 0.1
            across = np.abs(-(x - cx) * np.sin(angle) + (y - cy) * np.cos(angle)) - 0.015
            distance = np.maximum(along, across)
        else:
            distance = _shape_distance({"dots": "circle"}.get(what, what[:-1]), x, y, cx, cy, 0.06)
        image = _over(image, _cover(frame, distance), colour)
    return f"add {word} {name} {what}", image


def _lines(r: Rendered, rng: np.random.Generator) -> tuple[str, Image]:
    name, colour = _colour(rng)
    frame = frame_of(r)
    x, y = frame.x, frame.y
    count = int(rng.integers(4, 9))
    offset = rng.uniform()
    word, phase = [
        ("horizontal lines", y),
        ("vertical lines", x),
        ("slanted lines", (x + y) * 0.7),
    ][rng.integers(3)]
    distance = (np.abs((phase * count + offset) % 1 - 0.5) - 0.12) / count
    return f"draw {name} {word} over the image", _over(r.image_HW3, _cover(frame, distance), colour)


def _net(r: Rendered, rng: np.random.Generator) -> tuple[str, Image]:
    name, colour = _colour(rng)
    frame = frame_of(r)
    x, y = frame.x, frame.y
    count = int(rng.integers(3, 7))
    distance = np.minimum(np.abs(x * count % 1 - 0.5), np.abs(y * count % 1 - 0.5)) - 0.09
    return f"draw a {name} grid over the image", _over(r.image_HW3, _cover(frame, distance / count), colour)


def _channels(r: Rendered, rng: np.random.Generator) -> tuple[str, Image]:
    word, order = [
        ("swap red and blue", (2, 1, 0)),
        ("swap red and green", (1, 0, 2)),
        ("swap green and blue", (0, 2, 1)),
    ][rng.integers(3)]
    return word, r.image_HW3[..., list(order)]


def _ink(r: Rendered, rng: np.random.Generator) -> tuple[str, Image]:
    """A plain two-colour drawing: dark parts in one colour, light parts in another."""
    a, dark, b, light = _two_colours(rng)
    grey = r.image_HW3.mean(-1, keepdims=True)
    mix = 0.5 + 0.5 * np.tanh(6 * (grey - float(np.median(grey))))
    return f"draw the dark parts in {a} and the light parts in {b}", dark * (1 - mix) + light * mix


def _coarse(r: Rendered, rng: np.random.Generator) -> tuple[str, Image]:
    """Coarser colours along one axis: the image as broad bands."""
    size = r.image_HW3.shape[0]
    count = 8
    bands = r.image_HW3.reshape(count, size // count, size, 3).mean(1)
    if rng.random() < 0.5:
        return "smear the image into rows", np.repeat(bands, size // count, axis=0)
    columns = r.image_HW3.reshape(size, count, size // count, 3).mean(2)
    return "smear the image into columns", np.repeat(columns, size // count, axis=1)


# Geometry is the hardest for a small model: flips, shifts and zooms are drawn more often.
EDITS: dict[Edit, float] = {
    _identity: 1.0,
    _brightness: 1.0,
    _contrast: 0.7,
    _saturation: 0.7,
    _tint: 1.0,
    _lighting: 0.8,
    _recolour_background: 1.5,
    _pattern_background: 2.0,
    _gradient_background: 1.0,
    _recolour_subject: 2.0,
    _outline: 1.5,
    _isolate: 0.8,
    _remove: 0.8,
    _shift: 2.0,
    _zoom: 2.0,
    _flip: 4.0,
    _tilt: 1.5,
    _wave: 1.5,
    _copies: 1.2,
    _blur: 1.0,
    _sharpen: 0.6,
    _border: 1.0,
    _half: 0.8,
    _shape: 2.0,
    _many: 2.0,
    _lines: 1.2,
    _net: 1.0,
    _channels: 1.0,
    _ink: 1.2,
    _coarse: 0.8,
}

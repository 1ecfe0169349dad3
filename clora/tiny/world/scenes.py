"""Procedural portraits and animals on varied backgrounds: the sources of the tiny world.

Shape legend: H = W = size, 3 = RGB in [0, 1], all arrays float32.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from clora.tiny.world.backgrounds import render_background, sample_background
from clora.tiny.world.drawing import Array, Canvas, Frame, Rgb, hsv, tone
from clora.tiny.world.figures import HAIR_STYLES, SPECIES, HeadPose, Scene, animal, portrait

KINDS = ("portrait", "animal")


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
    canvas = Canvas(background_HW3)
    frame = Frame.unit(size).local(scene.x, scene.y, scene.radius, scene.tilt, scene.flip)
    head = (portrait if scene.kind == "portrait" else animal)(canvas, frame, scene)
    hair, clothes = (np.clip(canvas.parts[name], 0, 1).astype(np.float32) for name in ("hair", "clothes"))
    image_HW3 = np.clip(canvas.image, 0, 1).astype(np.float32)
    return Rendered(image_HW3, np.clip(canvas.subject, 0, 1).astype(np.float32), background_HW3, hair, clothes, head)

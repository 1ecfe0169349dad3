"""The subjects of the scenes: people and animals, painted on a canvas in the frame of their head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from clora.tiny.world.backgrounds import Background
from clora.tiny.world.drawing import DARK, WHITE, Array, Canvas, Frame, Rgb, mix, shaded, tone

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


# ---------------------------------------------------------------- portraits


def _hair_back(canvas: Canvas, frame: Frame, style: str, color: Rgb) -> None:
    """The hair that lies behind the head and the shoulders' edge."""
    dark = shaded(frame, tone(color, 0.85))
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


def _hair_front(canvas: Canvas, frame: Frame, style: str, color: Rgb) -> None:
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
    canvas.paint(frame.cover(shape), shaded(frame, color, 0.2), "hair")


def _clothes(canvas: Canvas, frame: Frame, scene: Scene) -> None:
    """Neck, shoulders and what they wear."""
    skin = scene.main
    canvas.paint(frame.cover(frame.box(0, 1.05, 0.32, 0.6, 0.2)), shaded(frame, tone(skin, 0.82)))
    body = frame.ellipse(0, 2.35, 1.55, 1.12)
    body = np.minimum(body, frame.box(0, 3.9, 1.55, 1.6, 0.2))
    cover = frame.cover(body)
    color: Array | Rgb = shaded(frame.local(0, 2.0, 1.0), scene.third)
    if "stripes" in scene.extras:
        stripe = frame.cover(np.abs((frame.y + 0.1 * frame.x**2) % 0.56 - 0.28) - 0.13)
        color = mix(color, scene.fourth, stripe)
    canvas.paint(cover, color, "clothes")
    if "vneck" in scene.extras:
        notch = ((-0.4, 1.1), (0.4, 1.1), (0.0, 1.85))
        canvas.paint(cover * frame.cover(frame.polygon(notch)), shaded(frame, tone(skin, 0.88)))
    elif "collar" in scene.extras:
        flap = frame.twin().polygon(((0.02, 1.3), (0.4, 1.15), (0.55, 1.45), (0.25, 1.75)))
        canvas.paint(frame.cover(flap), tone(scene.fourth, 1.0), "clothes")
    elif "scarf" in scene.extras:
        canvas.paint(frame.cover(frame.box(0, 1.3, 0.62, 0.24, 0.22)), shaded(frame, scene.fourth), "clothes")
        canvas.paint(frame.cover(frame.box(0.3, 1.75, 0.17, 0.4, 0.1)), tone(scene.fourth, 0.85), "clothes")
    else:
        neckline = np.maximum(frame.ellipse(0, 1.12, 0.42, 0.36), -body - 2.0)
        canvas.paint(cover * frame.cover(neckline), shaded(frame, tone(skin, 0.85)))


def _face(canvas: Canvas, frame: Frame, scene: Scene) -> None:
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


def portrait(canvas: Canvas, frame: Frame, scene: Scene) -> HeadPose:
    skin = shaded(frame, scene.main)
    _hair_back(canvas, frame, scene.style, scene.second)
    _clothes(canvas, frame, scene)
    canvas.paint(frame.cover(frame.twin().ellipse(0.78, 0.05, 0.16, 0.2)), tone(scene.main, 0.88))
    canvas.paint(frame.cover(frame.ellipse(0, 0, 0.78, 0.98)), skin)
    if "beard" in scene.extras:
        beard = np.maximum(frame.ellipse(0, 0.04, 0.8, 1.0), -frame.ellipse(0, 0.05, 0.64, 0.72))
        beard = np.minimum(np.maximum(beard, 0.1 - frame.y), frame.ellipse(0, 0.52, 0.32, 0.24))
        canvas.paint(frame.cover(beard), shaded(frame, tone(scene.second, 0.9)), "hair")
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
        canvas.paint(frame.cover(dome), shaded(frame, scene.fourth))
        canvas.paint(frame.cover(frame.box(0, -0.5, 0.92, 0.15, 0.14)), tone(scene.fourth, 0.75))
        canvas.paint(frame.cover(frame.ellipse(0, -1.28, 0.19, 0.19)), tone(scene.fourth, 1.5))
    elif "cap" in scene.extras:
        dome = np.maximum(frame.ellipse(0, -0.4, 0.88, 0.78), frame.y + 0.45)
        canvas.paint(frame.cover(dome), shaded(frame, scene.fourth))
        canvas.paint(frame.cover(frame.ellipse(0.4, -0.46, 0.85, 0.15)), tone(scene.fourth, 0.7))
    return HeadPose(scene.x, scene.y, scene.radius, scene.tilt, 0.33, 0.0, -0.98)


# ---------------------------------------------------------------- animals


def _ears(canvas: Canvas, frame: Frame, scene: Scene) -> None:
    twin, species = frame.twin(), scene.style
    fur, inner = scene.main, tone(scene.second, 0.95)
    pink: Rgb = (0.93, 0.62, 0.62)
    if species in ("cat", "fox", "owl"):
        high = {"cat": 1.35, "fox": 1.5, "owl": 1.15}[species]
        outer = ((0.12, -0.75), (0.72, -high), (0.95, -0.2))
        canvas.paint(frame.cover(twin.polygon(outer, 0.06)), shaded(frame, fur), "hair")
        if species != "owl":
            canvas.paint(frame.cover(twin.polygon(((0.36, -0.75), (0.69, -high + 0.22), (0.82, -0.45)))), pink)
    elif species == "rabbit":
        canvas.paint(frame.cover(twin.ellipse(0.42, -1.35, 0.27, 0.75, 0.16)), shaded(frame, fur), "hair")
        canvas.paint(frame.cover(twin.ellipse(0.43, -1.33, 0.13, 0.52, 0.16)), pink)
    elif species == "dog":
        canvas.paint(frame.cover(twin.ellipse(0.98, -0.05, 0.3, 0.68, -0.2)), shaded(frame, scene.third), "hair")
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
        canvas.paint(frame.cover(twin.ellipse(at[0], at[1], big, big)), shaded(frame, color), "hair")
        if species != "panda":
            canvas.paint(frame.cover(twin.ellipse(at[0], at[1], 0.6 * big, 0.6 * big)), pink if big > 0.5 else inner)


def _animal_face(canvas: Canvas, frame: Frame, scene: Scene) -> None:
    twin, species = frame.twin(), scene.style
    pale = shaded(frame, scene.second)
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


def _animal_body(canvas: Canvas, frame: Frame, scene: Scene) -> None:
    """Tail, trunk and paws: a bust in the "head" pose, the whole sitting animal in the "body" pose."""
    twin, species = frame.twin(), scene.style
    fur = DARK if species == "panda" else scene.main
    coat = shaded(frame.local(0, 1.6, 1.0), fur, 0.18)
    belly = shaded(frame.local(0, 1.6, 1.0), scene.second, 0.15)
    if scene.pose == "head":
        canvas.paint(frame.cover(frame.ellipse(0, 2.1, 1.15, 1.4)), coat, "hair")
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
    canvas.paint(frame.cover(frame.ellipse(0, 1.6, 0.86, 1.05)), coat, "hair")
    trunk = scene.main if species == "panda" else scene.second
    canvas.paint(frame.cover(frame.ellipse(0, 1.4, 0.55, 0.6)), trunk if species == "panda" else belly, "hair")
    if species == "owl":
        canvas.paint(frame.cover(twin.ellipse(0.78, 1.55, 0.27, 0.75, 0.12)), tone(fur, 0.75), "hair")
        canvas.paint(frame.cover(twin.ellipse(0.3, 2.6, 0.22, 0.12)), (0.95, 0.65, 0.2))
        return
    canvas.paint(frame.cover(twin.ellipse(0.62, 2.45, 0.36, 0.22)), tone(fur, 0.88), "hair")
    canvas.paint(frame.cover(twin.line(0.25, 1.85, 0.25, 2.42, 0.4)), tone(fur, 0.93), "hair")


def _bird(canvas: Canvas, frame: Frame, scene: Scene) -> HeadPose:
    """A bird seen from the side, facing x > 0 of the frame; the frame is centred on its head."""
    fur, pale, orange = scene.main, scene.second, (0.95, 0.62, 0.18)
    body = frame.local(-0.55, 1.25, 1.0)
    for x in (-0.75, -0.35):
        canvas.paint(frame.cover(frame.line(x, 2.2, x + 0.05, 3.0, 0.14)), tone(orange, 0.85))
        canvas.paint(frame.cover(frame.line(x - 0.1, 3.0, x + 0.32, 3.0, 0.15)), tone(orange, 0.85))
    canvas.paint(frame.cover(frame.ellipse(-2.15, 1.35, 0.9, 0.28, -0.25)), tone(fur, 0.7), "hair")
    canvas.paint(frame.cover(frame.ellipse(-0.6, 1.25, 1.3, 1.05, 0.35)), shaded(body, fur), "hair")
    canvas.paint(frame.cover(frame.ellipse(0.0, 1.45, 0.6, 0.75, 0.5)), shaded(body, pale), "hair")
    canvas.paint(frame.cover(frame.polygon(((0.6, -0.25), (1.4, 0.08), (0.6, 0.3)), 0.03)), orange)
    if "patch" in scene.extras:
        crest = np.minimum(frame.ellipse(-0.25, -0.95, 0.17, 0.5, -0.4), frame.ellipse(-0.6, -0.75, 0.15, 0.45, -0.8))
        canvas.paint(frame.cover(crest), scene.third, "hair")
    canvas.paint(frame.cover(frame.ellipse(0, 0, 0.78, 0.78)), shaded(frame, fur), "hair")
    canvas.paint(frame.cover(frame.ellipse(-0.95, 1.25, 0.85, 0.52, 0.3)), shaded(body, scene.third), "hair")
    canvas.paint(frame.cover(frame.ellipse(0.25, -0.12, 0.24, 0.24)), WHITE)
    canvas.paint(frame.cover(frame.ellipse(0.3, -0.12, 0.14, 0.14)), DARK)
    return HeadPose(scene.x, scene.y, scene.radius, scene.tilt, 0.3, -0.12, -0.78)


def animal(canvas: Canvas, frame: Frame, scene: Scene) -> HeadPose:
    if scene.style == "bird":
        return _bird(canvas, frame, scene)
    _animal_body(canvas, frame, scene)
    if "collar" in scene.extras:
        canvas.paint(frame.cover(frame.ellipse(0, 0.8, 0.66, 0.26)), scene.fourth, "clothes")
    if scene.style == "lion":
        turn = np.arctan2(frame.y, frame.x)
        mane = np.sqrt(frame.x**2 + frame.y**2) - 1.18 - 0.1 * np.sin(11 * turn)
        canvas.paint(frame.cover(mane), shaded(frame, scene.third, 0.2), "hair")
    _ears(canvas, frame, scene)
    wide = {"fox": 1.0, "pig": 1.0, "bear": 0.98, "panda": 1.02, "rabbit": 0.86, "mouse": 0.88}.get(scene.style, 0.95)
    canvas.paint(frame.cover(frame.ellipse(0, 0, wide, 0.86)), shaded(frame, scene.main, 0.16), "hair")
    _animal_face(canvas, frame, scene)
    return HeadPose(scene.x, scene.y, scene.radius, scene.tilt, 0.41, -0.08, -0.86)

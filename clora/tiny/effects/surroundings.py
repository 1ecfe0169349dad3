"""Effects around and on the subject: frames, backgrounds, the subject alone."""

from __future__ import annotations

import math

import numpy as np

from clora.tiny.world.backgrounds import Background, render_background
from clora.tiny.world.drawing import Array, Rgb, f32, hsv, mix, tone
from clora.tiny.world.filters import (
    PARTY,
    PIXEL,
    VIVID,
    Rng,
    blur,
    contrast,
    frame_of,
    gradient_map,
    inside,
    luma,
    noise,
    on_background,
    pick,
    recoloured,
    sample,
    scattered,
    smooth,
    soap_bubbles,
    vignette,
)
from clora.tiny.world.scenes import Rendered

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
    return blur(mix(image, (0.95, 0.94, 0.9), frame.cover(np.maximum(hole_x, hole_y))), 0.55)


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
    return mix(image, r.image_HW3, frame.cover(window + scallop, 2.0))


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
    return blur(image, 0.75)


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
    return soap_bubbles(image, frame, rng, 12, 0.03, 0.07)


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

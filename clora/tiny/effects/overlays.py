"""Effects that add things over the picture: weather, decoration, accessories."""

from __future__ import annotations

import math

import numpy as np

from clora.tiny.world.drawing import Array, mix, tone
from clora.tiny.world.filters import (
    INK,
    PARTY,
    PIXEL,
    Rng,
    frame_of,
    head_frame,
    pick,
    saturate,
    scattered,
    soap_bubbles,
)
from clora.tiny.world.scenes import Rendered

# ---------------------------------------------------------------- overlays


def bubbles(r: Rendered, rng: Rng) -> Array:
    """Nine large soap bubbles at places drawn anew."""
    return soap_bubbles(r.image_HW3, frame_of(r), rng, 9, 0.07, 0.15)


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
        image = mix(image, pick(rng, PARTY), frame.cover(local.box(0, 0, 0.048, 0.032), 2.8))
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

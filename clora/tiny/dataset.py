"""The tiny world as a user's dataset on disk: pairs of PNGs per effect, held-out sources, general instructions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from clora.tiny.effects import EFFECTS, apply_effect
from clora.tiny.images import to_uint8
from clora.tiny.instructions import generic_edit
from clora.tiny.world.scenes import render, sample_scene

# Scenes by use; the ranges never meet, nor those of the base's training (clora.tiny.images).
TRAIN_SCENES, EVAL_SCENES, GENERAL_SCENES = 10_000_000_000, 20_000_000_000, 30_000_000_000

# What a demo of a few minutes shows: effects of every kind, five of them random, of which its teachers can do
# all but pencil_sketch's fine lines. Most of those that draw one
# colour or place for the whole picture are still beyond teachers of twice the steps (docs/TINY_WORLD.md).
FIRST_EFFECTS = ("sepia", "pencil_sketch", "stained_glass", "polaroid", "beach", "gold_statue", "mirror_half", "rain",
                 "grayscale", "oil_paint", "flower_wreath", "snow")  # fmt: skip

# Bad at every scene when they were last taught, for twice the demo's updates (docs/TINY_WORLD.md).
LAST_EFFECTS = ("color_frame", "invert", "neon_edges", "risograph", "sunburst", "swirl", "travel",
                "duotone", "candy_stripes")  # fmt: skip


def effect_names(count: int) -> list[str]:
    """`count` effects, the same for every caller: `FIRST_EFFECTS`, the rest, evenly spread over the families, and
    `LAST_EFFECTS`."""
    by_family: dict[str, list[str]] = {}
    for name, effect in EFFECTS.items():
        if name not in FIRST_EFFECTS + LAST_EFFECTS:
            by_family.setdefault(effect.family, []).append(name)
    order = list(FIRST_EFFECTS)
    while any(by_family.values()):
        for names in by_family.values():
            if names:
                order.append(names.pop(0))
    order += LAST_EFFECTS
    if not 1 <= count <= len(order):
        raise ValueError(f"the tiny world has {len(order)} effects, not {count}")
    return order[:count]


def write_effect_pairs(folder: Path, name: str, count: int, size: int = 64) -> None:
    """`folder/{source,target}/NNN.png`: `count` pairs of one effect, deterministic; the targets of a random effect
    are independent draws."""
    effect = EFFECTS[name]
    index = list(EFFECTS).index(name)
    for side in ("source", "target"):
        (folder / side).mkdir(parents=True, exist_ok=True)
    for i in range(count):
        # Every effect has its own sources, as in real life.
        rendered = render(sample_scene(TRAIN_SCENES + index * 1000 + i), size)
        target = apply_effect(effect, rendered, np.random.default_rng((index, i)))
        _save(rendered.image_HW3, folder / "source" / f"{i:03d}.png")
        _save(target, folder / "target" / f"{i:03d}.png")


def write_eval_sources(folder: Path, count: int, size: int = 64, first: int = EVAL_SCENES) -> dict[int, Path]:
    """Held-out scenes as PNGs, by scene seed, from seed `first` on."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {}
    for seed in range(first, first + count):
        paths[seed] = folder / f"{seed - first:03d}.png"
        _save(render(sample_scene(seed), size).image_HW3, paths[seed])
    return paths


def write_general(folder: Path, count: int, instructions: int = 4, size: int = 64) -> None:
    """`count` images with `instructions` generic instructions each: `metadata.jsonl` and `images/`, no targets."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows = []
    for i in range(count):
        rendered = render(sample_scene(GENERAL_SCENES + i), size)
        _save(rendered.image_HW3, folder / "images" / f"{i:03d}.png")
        for k in range(instructions):
            text, _ = generic_edit(rendered, np.random.default_rng((i, k)))
            rows.append({"source_images": [f"images/{i:03d}.png"], "prompt": text})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def effect_config(names: Sequence[str], pairs: Path) -> list[dict[str, str]]:
    """The `effects` section of a configuration for effects written below `pairs`."""
    return [
        {
            "name": name,
            "prompt": EFFECTS[name].prompt,
            "student_prompt": EFFECTS[name].student_prompt,
            "criteria": EFFECTS[name].criteria,
            "pairs": str(pairs / name),
        }
        for name in names
    ]


def _save(image: NDArray[np.float32], path: Path) -> None:
    Image.fromarray(to_uint8(image)).save(path, optimize=True)

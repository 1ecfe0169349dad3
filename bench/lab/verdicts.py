"""How often is the verdict right? `python -m bench.lab.verdicts [--scenes N] [--json]`, ten minutes of a CPU.

Truths of every effect that the bounds have not seen, disturbed in ways whose verdict is known, on scenes that set no
bound: the share judged good by kind of disturbance, the reasons given, and VSA and the detail error that stand beside
it. Named are the effects whose round trip through the autoencoder is refused, and those that a blur, a mosaic or a mean
passes for. `--picture FILE` draws the cases nearest to the bound of detail, for the eye.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from clora.backbones.base import Backbone
from clora.backbones.load import load_backbone
from clora.data.image_grid import grid_image
from clora.evaluate.metrics.detail import detail
from clora.evaluate.metrics.image import detail_error, disturbed, hf_ratio
from clora.evaluate.truths import KEPT, Truths, bad_cases, subject_structure
from clora.tiny.images import to_uint8
from clora.tiny.world.drawing import Array, f32

FIRST_SCENE = 70_000  # those that bounds were set on begin at 70,300
SIZE = (64, 64)
FORGED = ("blur 1.5", "mosaic 4", "mean 30 %")  # should be bad; effects that let them pass are named
OFTEN = 0.5  # of an effect's images: from here on it is named


def round_trip(backbone: Backbone, images_NHW3: Array) -> Array:
    """The images as the base's autoencoder gives them back: the best that a model on that base can do."""
    latents, grid = backbone.encode_targets([Image.fromarray(to_uint8(image)) for image in images_NHW3], SIZE)
    return f32(backbone.decode(latents, grid).permute(0, 2, 3, 1).clamp(0, 1).numpy())


def mosaic(images_NHW3: Array, size: int) -> Array:
    """Blocks of size x size pixels, each of its mean colour."""
    count, height, width, channels = images_NHW3.shape
    blocks = images_NHW3.reshape(count, height // size, size, width // size, size, channels).mean(axis=(2, 4))
    return f32(blocks.repeat(size, axis=1).repeat(size, axis=2))


def kinds(truths: Truths, effect: str, other: str, backbone: Backbone, rng: np.random.Generator) -> dict[str, Array]:
    """Images (N, H, W, 3) by kind: fresh truths as they are, disturbed, and what is no truth at all."""
    random = truths.is_random(effect)
    clean = truths.fresh_draws(effect, 2 if random else 1, first=100)

    def each(blur: float, noise: float, light: float) -> Array:
        return np.stack([disturbed(image, rng, max(blur, 1e-3), noise, light) for image in clean])

    found = {
        "truth": clean,
        "autoencoder": round_trip(backbone, clean),
        "gentle (blur .6, noise .02, light 4 %)": each(0.6, 0.02, 0.04),
        "disturbed (blur .8, noise .03, light 6 %)": each(0.8, 0.03, 0.06),
        "light 6 %": each(0, 0, 0.06),
        "moved by a pixel": f32(np.concatenate([clean[:, :, :1], clean[:, :, :-1]], axis=2)),
    }
    found |= {f"noise {noise}": each(0, noise, 0) for noise in (0.03, 0.06)}
    found |= {f"blur {blur}": each(blur, 0, 0) for blur in (0.8, 1, 1.5, 2)}
    found |= {f"mosaic {size}": mosaic(clean, size) for size in (2, 4)}
    if random:
        mean = truths.fresh_draws(effect, 24, first=200).mean(axis=0)
        found |= {f"mean {share} %": f32(clean + share / 100 * (mean - clean)) for share in (10, 30, 50, 100)}
    return found | {"source": truths.rendered.image_HW3[None], "another effect": truths.draws[other][:1]}


class Judged(NamedTuple):
    """One image: its verdict, and the figures that stand beside it."""

    effect: str
    reason: str
    vsa: float
    detail_error: float


def judge(images: Array, truths: Truths, effect: str) -> list[Judged]:
    verdicts = bad_cases(images, truths, effect)
    draws = truths.draws[effect]
    ratios = [hf_ratio(image, draws[truths.nearest_draw(image, effect)]) for image in images]
    return [
        Judged(
            effect,
            verdict.reason,
            0.0 if verdict.bad else subject_structure(image, truths, effect),
            detail_error([ratio]),
        )
        for image, verdict, ratio in zip(images, verdicts, ratios, strict=True)
    ]


class Case(NamedTuple):
    """An image near the bound of detail, beside its truth; `margin` is what it keeps over the bound, 1 at it."""

    margin: float
    label: str
    truth: Array
    image: Array


def borderline(images: dict[str, Array], truths: Truths, effect: str) -> list[Case]:
    bound, draws = truths.calibration(effect).kept, truths.draws[effect]
    return [
        Case(detail(images[kind][0], draws).kept / bound, f"{effect}, {kind}", images["truth"][0], images[kind][0])
        for kind in ("autoencoder", "disturbed (blur .8, noise .03, light 6 %)", "blur 1", *FORGED[:2])
    ]


def summary(rows: list[Judged]) -> dict[str, Any]:
    """Share judged good, its means of VSA (bad cases count 0) and of the detail error, and the reasons."""
    return {
        "good": round(float(np.mean([row.reason == "" for row in rows])), 4),
        "vsa": round(float(np.mean([row.vsa for row in rows])), 2),
        "detail_error_db": round(float(np.mean([row.detail_error for row in rows])), 2),
        "images": len(rows),
        "reasons": dict(Counter(row.reason for row in rows if row.reason).most_common()),
    }


def good_by_effect(rows: list[Judged]) -> dict[str, float]:
    names = dict.fromkeys(row.effect for row in rows)
    return {name: float(np.mean([row.reason == "" for row in rows if row.effect == name])) for name in names}


def measure(num_scenes: int) -> tuple[dict[str, Any], list[Case]]:
    """All figures, and the cases near the bound."""
    backbone = load_backbone("tiny", "cpu", torch.float32)
    judged: dict[str, list[Judged]] = {}
    cases: list[Case] = []
    for seed in range(FIRST_SCENE, FIRST_SCENE + num_scenes):
        truths, rng = Truths(seed), np.random.default_rng(seed)
        names = truths.names[1:]
        for place, effect in enumerate(names):
            images = kinds(truths, effect, names[(place + 1 + seed) % len(names)], backbone, rng)
            for kind, one in images.items():
                judged.setdefault(kind, []).extend(judge(one, truths, effect))
            cases += borderline(images, truths, effect)
        print(f"scene {seed}", file=sys.stderr)
    forged = {kind: good_by_effect(judged[kind]) for kind in FORGED}
    autoencoder = good_by_effect(judged["autoencoder"])
    return {
        "effects": len(autoencoder),
        "scenes": [FIRST_SCENE, FIRST_SCENE + num_scenes - 1],
        "kinds": {kind: summary(rows) for kind, rows in judged.items()},
        "autoencoder_refused": {name: round(share, 2) for name, share in autoencoder.items() if share < 1},
        "passes_for": {
            kind: [name for name, share in shares.items() if share >= OFTEN] for kind, shares in forged.items()
        },
    }, cases


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--scenes", type=int, default=6)
    parser.add_argument("--picture", type=Path, help="also draw the cases nearest to the bound of detail")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout instead of a table")
    arguments = parser.parse_args()
    started = time.perf_counter()
    figures, cases = measure(arguments.scenes)
    where = {
        "bench": "lab.verdicts",
        "command": f"python -m bench.lab.verdicts --scenes {arguments.scenes} --json",
        "device": platform.machine(),
        "threads": torch.get_num_threads(),
        "seconds": round(time.perf_counter() - started),
        "kept": KEPT,
    }
    if arguments.picture is not None:
        near = sorted(cases, key=lambda case: abs(case.margin - 1))[:24]
        near.sort(key=lambda case: case.margin)
        labels = [f"{case.margin:.2f} {case.label}" for case in near]
        grid_image([[case.truth, case.image] for case in near], ["truth", "judged"], labels).save(arguments.picture)
    if arguments.json:
        print(json.dumps(where | figures, indent=1))
        return
    for kind, row in figures["kinds"].items():
        print("{kind:42s} good {good:6.1%}  VSA {vsa:.2f}  detail {detail_error_db:5.2f} dB".format(kind=kind, **row))
    print("the autoencoder's image refused:", figures["autoencoder_refused"])
    print("passes for the truth:", figures["passes_for"])


if __name__ == "__main__":
    main()

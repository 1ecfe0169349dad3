"""How good the tiny base is: `python -m bench.lab.tiny_base [--json]`.

Reconstruction PSNR of the autoencoder on held-out scenes and on every effect's images, and the transformer's velocity
error on held-out generic edits, by edit and noise level (0 is perfect; about 2 is the error of knowing nothing).
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from clora.backbones.base import Backbone
from clora.backbones.cond import make_cond
from clora.backbones.load import load_backbone
from clora.method.flow import add_noise, velocity_target
from clora.tiny.edits import EDITS
from clora.tiny.effects import EFFECTS, apply_effect
from clora.tiny.images import to_uint8
from clora.tiny.world.scenes import render, sample_scene

HELD_OUT = 50_000_000_000
SIGMAS = (0.95, 0.8, 0.5, 0.2)
SIZE = (64, 64)


def reconstruction(backbone: Backbone, images: list[NDArray[np.uint8]]) -> float:
    """Mean PSNR in dB of decoded against original images."""
    latents, grid = backbone.encode_targets([Image.fromarray(image) for image in images], SIZE)
    decoded = backbone.decode(latents, grid).permute(0, 2, 3, 1).numpy()
    mse = ((decoded - np.stack(images) / 255.0) ** 2).mean(axis=(1, 2, 3))
    return float((-10 * np.log10(mse)).mean())


@torch.no_grad()
def velocity_errors(backbone: Backbone, scenes: int) -> dict[str, list[float]]:
    """Mean squared velocity error of every generic edit at each of `SIGMAS`."""
    errors: dict[str, list[float]] = {}
    for edit in EDITS:
        sources, targets, texts = [], [], []
        for k in range(scenes):
            rendered = render(sample_scene(HELD_OUT + k))
            text, edited = edit(rendered, np.random.default_rng(k))
            sources.append(Image.fromarray(to_uint8(rendered.image_HW3)))
            targets.append(Image.fromarray(to_uint8(edited)))
            texts.append(text)
        embedded = backbone.encode_prompts(texts, [[source] for source in sources])
        reference, grid = backbone.encode_references(sources)
        x0, _ = backbone.encode_targets(targets, SIZE)
        cond = make_cond(embedded, [(reference, grid)], grid)
        row = []
        for sigma in SIGMAS:
            eps = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
            level = torch.full((scenes,), sigma)
            velocity = backbone.velocity(add_noise(x0, eps, level), level, cond)
            row.append(float((velocity - velocity_target(x0, eps)).square().mean()))
        errors[edit.__name__.lstrip("_")] = row
    return errors


def measure(scenes: int) -> dict[str, Any]:
    """All figures, on `scenes` held-out scenes."""
    backbone = load_backbone("tiny", "cpu", torch.float32)
    rendered = [render(sample_scene(HELD_OUT + k)) for k in range(scenes)]
    effects: dict[str, list[NDArray[np.uint8]]] = defaultdict(list)
    for k, one in enumerate(rendered):
        for name, effect in EFFECTS.items():
            effects[name].append(to_uint8(apply_effect(effect, one, np.random.default_rng(k))))
    psnr = {name: reconstruction(backbone, images) for name, images in effects.items()}
    return {
        "psnr_scenes": reconstruction(backbone, [to_uint8(one.image_HW3) for one in rendered]),
        "psnr_effects": dict(sorted(psnr.items(), key=lambda item: item[1])),
        "sigmas": SIGMAS,
        "velocity_error": velocity_errors(backbone, scenes),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scenes", type=int, default=16)
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args()
    figures = measure(arguments.scenes)
    if arguments.json:
        print(json.dumps(figures, indent=1))
        return
    print(f"autoencoder: {figures['psnr_scenes']:.1f} dB on scenes; effects, worst first:")
    print("  " + ", ".join(f"{name} {value:.1f}" for name, value in figures["psnr_effects"].items()))
    print("velocity error at sigma " + ", ".join(map(str, SIGMAS)))
    for name, row in figures["velocity_error"].items():
        print(f"  {name:20s} " + "  ".join(f"{value:.3f}" for value in row))


if __name__ == "__main__":
    main()

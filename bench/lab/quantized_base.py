"""What does an int8 base cost (`base.quantize`)? `python -m bench.lab.quantized_base [--json]`, two minutes of a CPU.

Effects of the collection that the tiny base brings along, on its weights in fp32, in bf16 and in int8 under either:
bad-case rate and PSNR against the known truth on held-out scenes, the same noise everywhere, PSNR against the images of
the fp32 base, and how far the losses of some distillation steps are from those on the fp32 base (the teacher is the
collection; data and random numbers are the same). Seconds are of processor time, on one thread.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from rich.console import Console

from bench.lab.extend import Images, encode, sample
from bench.training.cycle_models import steps_of
from clora.config import Config, build_config, collection_lora
from clora.distill.check import check_training
from clora.distill.run import make_distillation, open_bank
from clora.distill.step import full_step
from clora.distill.targets import targets_from_pairs
from clora.distill.workspace import open_base, open_workspace
from clora.evaluate.baselines import COLLECTION, collection_method
from clora.evaluate.exact import MethodScores, evaluate_methods
from clora.evaluate.metrics.image import PSNR_CAP, as_image, psnr
from clora.evaluate.statistics import bootstrap_interval
from clora.lora.catalogue import CatalogueEntry, read_catalogue
from clora.lora.files import read_lora
from clora.lora.frozen_linear import weight_bytes
from clora.method.routing import Stream
from clora.tiny.dataset import effect_config, write_effect_pairs, write_eval_sources

VARIANTS = {
    "fp32": ("float32", "none"),
    "int8 in fp32": ("float32", "int8"),
    "bf16": ("bfloat16", "none"),
    "int8 in bf16": ("bfloat16", "int8"),
}
EXACT = "fp32"
DISTILLED, PAIRS = 6, 4  # effects that the distillation steps draw from, and their pairs
STREAMS: tuple[Stream, ...] = ("effect", "general")
Losses = list[dict[str, float]]


def collection_file() -> Path:
    found = collection_lora("tiny")
    assert found is not None
    return found


def make_config(folder: Path, names: list[str], variant: str) -> Config:
    """Distillation of these effects of the collection, taught by it."""
    dtype, quantize = VARIANTS[variant]
    values = {
        "base": {"model": "tiny", "dtype": dtype, "quantize": quantize},
        "output_dir": "run",
        "effects": [row | {"lora": str(collection_file())} for row in effect_config(names, Path("data"))],
        "train": {"coarse_steps": 0, "kernels": "reference"},
    }
    return build_config(values, folder)


def edit(
    config: Config, effects: list[CatalogueEntry], num_steps: int, scenes: dict[int, Path], console: Console
) -> tuple[Images, int, float]:
    """The collection's images of some of its effects, bytes of the transformer's weights, and seconds of an image."""
    workspace = open_base(config, console)
    num_bytes = weight_bytes(workspace.backbone.transformer)
    examples = encode(workspace, {entry.name: {"student": entry.prompt} for entry in effects}, scenes)
    workspace.backbone.free_encoders()
    modules = read_lora(collection_file(), workspace.adapters.module_shapes).modules
    workspace.adapters.add_lora(COLLECTION, modules)
    method = collection_method(num_steps, config.schedule.shift, config.schedule.sampler)
    started = time.process_time()
    images = sample(workspace, method, examples)
    return images, num_bytes, (time.process_time() - started) / len(images)


def distil(config: Config, num_steps: int, console: Console) -> tuple[Losses, float]:
    """The losses of the first full steps of each stream, and seconds of a step."""
    workspace = open_workspace(check_training(config), console)
    workspace = replace(workspace, effects=targets_from_pairs(workspace.effects))
    bank = open_bank(workspace)
    distillation = make_distillation(workspace, bank)
    steps = [step for stream in STREAMS for step in islice(steps_of(distillation.batches, stream), num_steps)]
    losses: Losses = []
    started = time.process_time()
    for step in steps:
        figures = full_step(distillation, step)
        losses.append({name: float(value) for name, value in figures.items() if name.endswith("_loss")})
    return losses, (time.process_time() - started) / len(steps)


def measure(num_effects: int, num_scenes: int, num_steps: int) -> dict[str, Any]:
    console = Console(stderr=True)
    catalogue = read_catalogue(collection_file())
    effects = catalogue.effects[:: -(-len(catalogue.effects) // num_effects)]
    names = [entry.name for entry in effects[:DISTILLED]]
    images: dict[str, Images] = {}
    losses: dict[str, Losses] = {}
    rows: dict[str, dict[str, Any]] = {}
    with TemporaryDirectory() as folder:
        for name in names:
            write_effect_pairs(Path(folder) / "data" / name, name, PAIRS)
        scenes = write_eval_sources(Path(folder) / "held_out", num_scenes)
        for variant in VARIANTS:
            console.print(variant)
            config = make_config(Path(folder), names, variant)
            images[variant], num_bytes, edit_seconds = edit(
                config, effects, catalogue.schedule.num_steps, scenes, console
            )
            losses[variant], step_seconds = distil(config, num_steps, console)
            seconds = {"seconds_per_image": round(edit_seconds, 3), "seconds_per_step": round(step_seconds, 2)}
            rows[variant] = {"weights": variant, "weight_bytes": num_bytes, **seconds}
    scores = evaluate_methods(images)
    for variant, row in rows.items():
        row |= quality(scores[variant], scores[EXACT])
        row["psnr_to_fp32"] = round(psnr_to(images[variant], images[EXACT]), 2)
        row["loss_gaps"] = loss_gaps(losses[variant], losses[EXACT])
    return {
        "effects": [entry.name for entry in effects],
        "scenes": num_scenes,
        "distilled_effects": names,
        "distillation_steps": len(STREAMS) * num_steps,
        "rows": list(rows.values()),
    }


def quality(scores: MethodScores, exact: MethodScores) -> dict[str, Any]:
    """Figures against the truth, and the change of the bad-case rate with its interval, effects drawn anew."""
    changes = {(name,): [scores.per_effect[name].bcr - one.bcr] for name, one in exact.per_effect.items()}
    return {
        "bcr": round(scores.bcr, 4),
        "bcr_change": round(scores.bcr - exact.bcr, 4),
        "bcr_change_interval": [round(x, 4) for x in bootstrap_interval(changes)],
        "psnr": None if scores.psnr is None else round(scores.psnr, 2),
        "outputs": scores.num_outputs,
    }


def psnr_to(images: Images, exact: Images) -> float:
    """Mean PSNR (dB) between two sets of images of the same names."""
    pairs = [(one, other) for key in exact for one, other in zip(images[key], exact[key], strict=True)]
    return float(np.mean([min(psnr(as_image(one), as_image(other)), PSNR_CAP) for one, other in pairs]))


def loss_gaps(losses: Losses, exact: Losses) -> dict[str, float]:
    """Of every loss the mean distance from `exact` over the steps that have it, relative to its mean there."""
    gaps = {}
    for name in sorted({name for one in exact for name in one}):
        pairs = [(one[name], other[name]) for one, other in zip(losses, exact, strict=True) if name in other]
        distance = np.mean([abs(one - other) for one, other in pairs])
        gaps[name] = round(float(distance / np.mean([other for _, other in pairs])), 5)
    return gaps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--effects", type=int, default=25, help="of the collection's 50, evenly spread")
    parser.add_argument("--scenes", type=int, default=4)
    parser.add_argument("--steps", type=int, default=2, help="of distillation, in each stream")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    started = time.process_time()
    figures = measure(arguments.effects, arguments.scenes, arguments.steps)
    if arguments.json:
        where = {"bench": "quantized_base", "device": platform.machine(), "torch": torch.__version__}
        print(json.dumps(where | figures | {"seconds": round(time.process_time() - started, 1)}, indent=1))
        return
    for row in figures["rows"]:
        print(
            "{weights:13s} {weight_bytes:>9d} bytes  BCR {bcr:.4f} ({bcr_change:+.4f})  PSNR {psnr} dB, to fp32"
            " {psnr_to_fp32} dB  {seconds_per_image} s an image, {seconds_per_step} s a step".format(**row)
        )
        gaps = (f"{name} {gap:.2%}" for name, gap in row["loss_gaps"].items())
        print("              losses from fp32: " + ", ".join(gaps))


if __name__ == "__main__":
    main()

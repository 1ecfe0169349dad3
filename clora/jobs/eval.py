"""`clora eval`: a collection on a user's own pairs, against their target images.

Where the truth is known exactly (the tiny world) `clora demo` scores against it; here the pair's target is the only
truth there is. It fits effects with one valid outcome; for others read `unchanged` and look at the grid.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track

from clora.config import Config, EffectConfig
from clora.data.dataset import effect_pairs, in_batches
from clora.data.examples import Example
from clora.data.image_grid import grid_image
from clora.data.images import cover_crop, load_image
from clora.distill.workspace import OpenBase, open_base
from clora.errors import raise_faults
from clora.evaluate.baselines import COLLECTION
from clora.evaluate.metrics.image import hf_ratio, l1, psnr, ssim
from clora.inference.sampling import Method, sample_method
from clora.lora.catalogue import read_catalogue
from clora.lora.files import read_lora

Image = NDArray[np.float32]


def evaluate_collection(config: Config, lora: Path, console: Console | None = None) -> dict[str, Any]:
    """Edit up to `eval.num_samples` sources of every effect once per seed and compare with their targets.

    Returns `{"effects": {name: figures}, "mean": {steps: figures}, "grid": path}` with figures l1, psnr (dB), ssim,
    hf_ratio and `unchanged`, the share of outputs nearer to the source than to the target; the means for each count
    of `eval.num_steps`, the effects for the first. The catalogue gives the shift, and the count where none is set.
    The grid (source, target, an output for each count) and `eval.json` are written to `output_dir/eval`. Raises
    `InputErrors` for effects the collection does not hold.
    """
    console = console or Console(stderr=True)
    catalogue = read_catalogue(lora)
    known = {entry.name: entry for entry in catalogue.effects}
    raise_faults(
        [
            f"effect {e.name}: is not in {lora}; it holds {', '.join(known)}"
            for e in config.effects
            if e.name not in known
        ]
    )
    workspace = open_base(config, console)
    held = {e.name: _encode(workspace, config, e, known[e.name].prompt) for e in config.effects}
    workspace.backbone.free_encoders()
    workspace.adapters.add_lora(COLLECTION, read_lora(lora, workspace.adapters.module_shapes).modules)
    shift = config.schedule.model_copy(update={"shift": catalogue.schedule.shift})
    config = config.model_copy(update={"schedule": shift})
    counts = list(dict.fromkeys(config.eval.num_steps or [catalogue.schedule.num_steps]))
    figures: dict[int, dict[str, Figures]] = {steps: {} for steps in counts}
    rows: list[list[Image]] = []
    for name, pairs in track(held.items(), "evaluating", console=console, transient=True):
        shown: list[Image] = []
        for steps in counts:
            method = Method(COLLECTION, 1, steps, 1.0, True, "student", lambda effects: [COLLECTION])
            triples = _sample(workspace, config, method, pairs)
            figures[steps][name] = _figures(triples)
            shown = [*(shown or triples[0][:2]), triples[0][2]]
        rows.append(shown)
    folder = config.output_dir / "eval"
    folder.mkdir(parents=True, exist_ok=True)
    columns = ["source", "target", *(f"{steps} steps" for steps in counts)]
    grid_image(rows, columns, list(held)).save(folder / "grid.png")
    mean = {str(steps): _mean(figures[steps].values()) for steps in counts}
    answer = {"effects": figures[counts[0]], "mean": mean, "grid": str(folder / "grid.png")}
    (folder / "eval.json").write_text(json.dumps(answer, indent=1) + "\n")
    return answer


Figures = dict[str, float]
FIGURES = ("l1", "psnr", "ssim", "hf_ratio", "unchanged")


def _encode(workspace: OpenBase, config: Config, effect: EffectConfig, prompt: str) -> list[tuple[Example, Path]]:
    """The effect's examples with the collection's own prompt, and the files of their targets."""
    pairs = effect_pairs(config, effect)[: config.eval.num_samples]
    return [
        (workspace.encoder.encode(pair, effect.name, {"student": prompt}), pair.target)
        for pair in pairs
        if pair.target is not None
    ]


def _sample(
    workspace: OpenBase, config: Config, method: Method, pairs: list[tuple[Example, Path]]
) -> list[tuple[Image, Image, Image]]:
    """(source, target, output) of every pair and seed, each (H, W, 3) in [0, 1] at the output's size."""
    target_of = {id(example): target for example, target in pairs}
    triples = []
    for batch in in_batches([example for example, _ in pairs], config.eval.batch_size):
        for seed in config.eval.seeds:
            seeds = [seed * 100_003 + k for k in range(len(batch))]
            images = sample_method(workspace.backbone, config, method, batch, seeds)
            for example, image in zip(batch, images, strict=True):
                size = (image.shape[2], image.shape[1])
                source, target = (_pixels(path, size) for path in (example.sources[-1], target_of[id(example)]))
                triples.append((source, target, image.permute(1, 2, 0).cpu().numpy()))
    return triples


def _pixels(path: Path, size: tuple[int, int]) -> Image:
    return np.asarray(cover_crop(load_image(path), size), np.float32) / np.float32(255)


def _mean(rows: Collection[Figures]) -> Figures:
    return {key: float(np.mean([row[key] for row in rows])) for key in FIGURES}


def _figures(triples: list[tuple[Image, Image, Image]]) -> Figures:
    rows = [
        (
            l1(output, target),
            psnr(output, target),
            ssim(output, target),
            hf_ratio(output, target),
            float(l1(output, source) < l1(output, target)),
        )
        for source, target, output in triples
    ]
    return {key: float(value) for key, value in zip(FIGURES, np.mean(rows, axis=0), strict=True)}

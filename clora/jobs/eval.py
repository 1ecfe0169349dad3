"""`clora eval`: a collection on a user's own pairs, against their target images.

Where the truth is known exactly (the tiny world) `clora demo` scores against it; here the pair's target is the only
truth there is. It fits effects with one valid outcome; for others read `unchanged` and look at the grid.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track

from clora.config import Config
from clora.data.dataset import read_effects
from clora.data.examples import Example
from clora.data.image_grid import grid_image
from clora.data.images import cover_crop, load_image
from clora.data.pairs import Pair
from clora.distill.opened import OpenBase
from clora.distill.workspace import open_base
from clora.errors import did_you_mean, raise_faults
from clora.evaluate.baselines import COLLECTION, Method, collection_method, sample_examples
from clora.evaluate.metrics.image import (
    PSNR_CAP,
    detail_error,
    geometric_mean,
    hf_ratio,
    l1,
    psnr,
    ssim,
)
from clora.lora.catalogue import read_catalogue
from clora.lora.files import read_lora

Image = NDArray[np.float32]


def evaluate_collection(config: Config, lora: Path, console: Console | None = None) -> dict[str, Any]:
    """Edit up to `eval.num_samples` sources of every effect once per seed and compare with their targets.

    Returns `{"effects": {name: figures}, "mean": {steps: figures}, "grid": path}` with figures l1, psnr (dB, an exact
    copy counts `PSNR_CAP`), ssim, `unchanged`, the share of outputs nearer to the source than to the target, and the
    detail of all outputs together: hf_ratio, the geometric mean, and detail_error in dB; the means for each count of
    `eval.num_steps`, the effects for the first. The catalogue gives the shift, and the count where none is set. The
    grid (source, target, an output for each count) and `eval.json` are written to
    `output_dir/eval`. Raises `InputErrors` for effects that the collection does not hold, or that have no pairs to
    compare with, before the base is loaded.
    """
    console = console or Console(stderr=True)
    catalogue = read_catalogue(lora)
    known = {entry.name: entry for entry in catalogue.effects}
    pairs = _read_all(config, lora, set(known))
    workspace = open_base(config, console)
    held = {
        name: [workspace.encoder.encode(pair, name, {"student": known[name].prompt}) for pair in found]
        for name, found in pairs.items()
    }
    workspace.backbone.free_encoders()
    workspace.adapters.add_lora(COLLECTION, read_lora(lora, workspace.adapters.module_shapes).modules)
    counts = list(dict.fromkeys(config.eval.num_steps or [catalogue.schedule.num_steps]))
    figures: dict[int, dict[str, Figures]] = {steps: {} for steps in counts}
    rows: list[list[Image]] = []
    for name, examples in track(held.items(), "evaluating", console=console, transient=True):
        shown: list[Image] = []
        for steps in counts:
            method = collection_method(steps, catalogue.schedule.shift, catalogue.sampler)
            triples = _sample(workspace, config, method, examples, pairs[name])
            figures[steps][name] = _figures(triples)
            shown = [*(shown or triples[0][:2]), triples[0][2]]
        rows.append(shown)
    folder = config.output_dir / "eval"
    folder.mkdir(parents=True, exist_ok=True)
    columns = ["source", "target", *(f"{steps} steps" for steps in counts)]
    grid_image(rows, columns, list(held)).save(folder / "grid.png")
    mean = {str(steps): _mean(figures[steps].values()) for steps in counts}
    answer = {"effects": figures[counts[0]], "mean": mean, "grid": str(folder / "grid.png")}
    (folder / "eval.json").write_text(json.dumps(answer, indent=1, allow_nan=False) + "\n")
    return answer


Figures = dict[str, float]
FIGURES = ("l1", "psnr", "ssim", "unchanged")


def _read_all(config: Config, lora: Path, known: Collection[str]) -> dict[str, list[Pair]]:
    """The pairs of every effect, `eval.num_samples` at most; all faults in one error."""
    faults = [] if config.effects else ["effects: are none; name those to evaluate, with their pairs"]
    for effect in config.effects:
        if effect.name not in known:
            faults.append(f"effect {effect.name}: is not in {lora}; {did_you_mean(effect.name, known)}")
    held = [effect for effect in config.effects if effect.name in known]
    pairs = read_effects(config, held, {effect.name for effect in held}, faults, [])
    raise_faults(faults)
    return {name: found[: config.eval.num_samples] for name, found in pairs.items()}


def _sample(
    workspace: OpenBase, config: Config, method: Method, examples: Sequence[Example], pairs: Sequence[Pair]
) -> list[tuple[Image, Image, Image]]:
    """(source, target, output) of every example and seed, each (H, W, 3) in [0, 1] at the output's size."""
    triples = []
    for seed in config.eval.seeds:
        seeds = [seed * 100_003 + k for k in range(len(examples))]
        for place, output in sample_examples(workspace.backbone, method, examples, seeds, config.eval.batch_size):
            pair, size = pairs[place], (output.shape[1], output.shape[0])
            assert pair.target is not None  # `read_pairs` asked for it
            triples.append((_pixels(pair.sources[-1], size), _pixels(pair.target, size), output))
    return triples


def _pixels(path: Path, size: tuple[int, int]) -> Image:
    return np.asarray(cover_crop(load_image(path), size), np.float32) / np.float32(255)


def _mean(rows: Collection[Figures]) -> Figures:
    means = {key: float(np.mean([row[key] for row in rows])) for key in (*FIGURES, "detail_error")}
    return means | {"hf_ratio": geometric_mean([row["hf_ratio"] for row in rows])}


def _figures(triples: list[tuple[Image, Image, Image]]) -> Figures:
    rows = [
        (
            l1(output, target),
            min(psnr(output, target), PSNR_CAP),
            ssim(output, target),
            float(l1(output, source) < l1(output, target)),
        )
        for source, target, output in triples
    ]
    ratios = [hf_ratio(output, target) for _, target, output in triples]
    means = {key: float(value) for key, value in zip(FIGURES, np.mean(rows, axis=0), strict=True)}
    return means | {"hf_ratio": geometric_mean(ratios), "detail_error": detail_error(ratios)}

"""Exact verdicts in a benchmark of the tiny world: the truth of every picture is known, so that nobody is asked.

A test picture is called by the number of its scene (`20000000003.png`) and must be that scene as the world draws it. An
effect is one of the world's, or two of them in turn (`sepia + snow`). Verdicts and figures are those of `exact`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from clora.data.images import load_image
from clora.errors import raise_faults
from clora.evaluate.bench_rows import ExactVerdict
from clora.evaluate.benchmark import Benchmark, Cell
from clora.evaluate.exact import score_pair
from clora.evaluate.metrics.image import detail_error
from clora.evaluate.truths import Truths, ambiguous
from clora.tiny.effects import EFFECTS, find_effect
from clora.tiny.images import to_uint8
from clora.tiny.world.scenes import render, sample_scene


def check_scenes(bench: Benchmark, found: Sequence[Cell]) -> None:
    """Raise `InputErrors` with every picture that is no scene of the tiny world, and every effect that it lacks."""
    faults = []
    for source in dict.fromkeys(cell.source for cell in found):
        seen = _pixels(load_image(source))
        if not source.stem.isdigit() or seen.shape[0] != seen.shape[1] or seen.shape[0] < 64:
            faults.append(f"{source}: exact verdicts need a square picture called by its scene's number; rename it")
        elif not np.array_equal(seen, to_uint8(render(sample_scene(int(source.stem)), len(seen)).image_HW3)):
            faults.append(f"{source}: is not scene {source.stem} of the tiny world; write it with `write_eval_sources`")
    for effect in bench.effects:
        try:
            find_effect(effect.name)
        except ValueError as error:
            faults.append(f"effect {effect.name}: {error}")
    raise_faults(faults)


def exact_verdicts(bench: Benchmark, found: Sequence[Cell], on_done: Callable[[], None]) -> dict[Cell, ExactVerdict]:
    """A verdict on each cell, among all effects of the world; the truths of one scene are in memory at a time."""
    composed = [effect.name for effect in bench.effects if effect.name not in EFFECTS]
    verdicts: dict[Cell, ExactVerdict] = {}
    by_source: dict[tuple[int, int], list[Cell]] = {}
    for cell in found:
        by_source.setdefault((int(cell.source.stem), load_image(cell.path).width), []).append(cell)
    for (scene, size), cells in by_source.items():
        truths = Truths(scene, [*EFFECTS, *composed], size=size)
        for name in dict.fromkeys(cell.effect for cell in cells):
            own = [cell for cell in cells if cell.effect == name]
            verdicts |= zip(own, _verdicts(truths, name, own), strict=True)
            for _ in own:
                on_done()
    return verdicts


def _verdicts(truths: Truths, effect: str, own: Sequence[Cell]) -> list[ExactVerdict]:
    if ambiguous(truths, effect):
        return [ExactVerdict(None, "ambiguous")] * len(own)
    scores = score_pair([_pixels(load_image(cell.path)) for cell in own], truths, effect)
    exact = scores.psnr or (None,) * len(own)
    columns = zip(scores.bad, scores.reasons, scores.vsa, exact, scores.hf_ratio, strict=True)
    return [ExactVerdict(bad, why, vsa, psnr, detail_error([hf])) for bad, why, vsa, psnr, hf in columns]


def _pixels(image: object) -> NDArray[np.uint8]:
    return np.asarray(image, np.uint8)

"""Exact scores of a method on the tiny world: bad-case rate, subject alignment, distances to the truth.

Pure functions over images; nothing here runs a model. Measures are in `clora.evaluate.metrics`.
Images are (H, W, 3), float32 in [0, 1] or uint8. A *pair* is one effect on one source, an output per seed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clora.evaluate.metrics.image import (
    PSNR_CAP,
    as_image,
    detail_error,
    geometric_mean,
    hf_ratio,
    l1,
    psnr,
    ssim,
)
from clora.evaluate.statistics import Difference, Groups, bootstrap_interval, paired_difference
from clora.evaluate.truths import Truths, ambiguous, bad_cases, subject_structure

Pair = tuple[str, int]  # effect, source seed
Outputs = Mapping[Pair, Sequence[NDArray[Any]]]
REFERENCE = "collection"  # the method that others are compared with, where it is among them


@dataclass(frozen=True)
class PairScores:
    """All outputs of one effect on one source; the tuples run over the outputs."""

    effect: str
    source_seed: int
    bad: tuple[bool, ...]
    reasons: tuple[str, ...]
    nearest: tuple[str, ...]
    vsa: tuple[float, ...]
    hf_ratio: tuple[float, ...]
    l1: tuple[float, ...]  # empty for a random effect, as psnr and ssim
    psnr: tuple[float, ...]
    ssim: tuple[float, ...]
    energy_distance: float | None  # random effects with two outputs or more


# The figures that stand together, and their values output by output: each alone can be flattered.
FIGURES: dict[str, Callable[[PairScores], Sequence[float]]] = {
    "bcr": lambda pair: pair.bad,
    "vsa": lambda pair: pair.vsa,
    "detail_error": lambda pair: [detail_error([ratio]) for ratio in pair.hf_ratio],
}


@dataclass(frozen=True)
class Scores:
    """Means over outputs. None stands where nothing defines a figure.

    `bcr` in [0, 1]; `vsa` in [0, 5]; `detail_error` in dB, see `clora.evaluate.metrics.image.detail_error`;
    `hf_ratio` the geometric mean of the ratios behind it; `l1`, `psnr` (dB) and `ssim` over
    deterministic effects only; `energy_distance` over the pairs of random effects.
    """

    bcr: float
    vsa: float
    detail_error: float
    hf_ratio: float
    l1: float | None
    psnr: float | None
    ssim: float | None
    energy_distance: float | None
    num_outputs: int


@dataclass(frozen=True)
class MethodScores(Scores):
    """`Scores` of a method, and the 95 % interval of its bad-case rate (`bootstrap_interval`: effects and sources).

    `left_out` are the pairs whose truth cannot be told from another class: they are in none of the figures.
    `reasons` counts bad cases by reason, `confusions` the wrong outputs by effect and nearest class.
    `differences` are those to `reference`, a method that made the same outputs, by `FIGURES`; empty where none was
    named.
    """

    bcr_interval: tuple[float, float]
    left_out: tuple[Pair, ...]
    reasons: dict[str, int]
    confusions: dict[str, dict[str, int]]
    per_effect: dict[str, Scores]
    reference: str = ""
    differences: dict[str, Difference] = field(default_factory=dict)

    @property
    def num_left_out(self) -> int:
        return len(self.left_out)


def score_pair(outputs: Sequence[NDArray[Any]], truths: Truths, effect: str) -> PairScores:
    """Scores of the outputs of an effect on the source of `truths`, one output per seed, at least one."""
    if not outputs:
        raise ValueError(f"effect {effect!r} on source {truths.source_seed} has no output to score")
    images = [as_image(output) for output in outputs]
    verdicts = bad_cases(np.stack(images), truths, effect)
    draws, exact = truths.draws[effect], not truths.is_random(effect)
    return PairScores(
        effect=effect,
        source_seed=truths.source_seed,
        bad=tuple(verdict.bad for verdict in verdicts),
        reasons=tuple(verdict.reason for verdict in verdicts),
        nearest=tuple(verdict.nearest for verdict in verdicts),
        vsa=tuple(
            0.0 if verdict.bad else subject_structure(image, truths, effect)
            for image, verdict in zip(images, verdicts, strict=True)
        ),
        hf_ratio=tuple(hf_ratio(image, draws[truths.nearest_draw(image, effect)]) for image in images),
        l1=tuple(l1(image, draws[0]) for image in images if exact),
        psnr=tuple(min(psnr(image, draws[0]), PSNR_CAP) for image in images if exact),
        ssim=tuple(ssim(image, draws[0]) for image in images if exact),
        energy_distance=None if exact or len(images) < 2 else truths.energy_distance(np.stack(images), effect),
    )


def evaluate_outputs(outputs: Outputs, truths: Mapping[int, Truths]) -> MethodScores:
    """Scores of one method: `outputs[effect, source_seed]` lists its images, one per seed.

    `truths[source_seed]` must hold every effect of the outputs. Ambiguous pairs are left out and named.
    Raises ValueError when a pair has no image, a source no truths, or nothing is left to score.
    """
    pairs: list[PairScores] = []
    left_out: list[Pair] = []
    for (effect, seed), images in outputs.items():
        if seed not in truths:
            raise ValueError(f"source {seed} has outputs but no truths")
        if ambiguous(truths[seed], effect):
            left_out.append((effect, seed))
        else:
            pairs.append(score_pair(images, truths[seed], effect))
    return summarise(pairs, left_out)


def evaluate_methods(
    methods: Mapping[str, Outputs],
    effects: Sequence[str] | None = None,
    num_draws: int = 32,
    size: int = 64,
    reference: str | Mapping[str, str] = REFERENCE,
) -> dict[str, MethodScores]:
    """`evaluate_outputs` of several methods, with the truths of only one source in memory at a time.

    `effects` are the classes an output may be mistaken for, besides the source: the whole world when None.
    Each method's paired differences to the method named `reference`, or to its own of `reference`, stand with its
    figures where both have a pair, with as many outputs.
    """
    pairs: dict[str, list[PairScores]] = {name: [] for name in methods}
    left_out: dict[str, list[Pair]] = {name: [] for name in methods}
    for seed in sorted({seed for outputs in methods.values() for _, seed in outputs}):
        truths = Truths(seed, effects, num_draws, size)
        scored = sorted({effect for outputs in methods.values() for effect, source in outputs if source == seed})
        unclear = {effect for effect in scored if ambiguous(truths, effect)}
        for name, outputs in methods.items():
            for effect in (effect for effect, source in outputs if source == seed):
                if effect in unclear:
                    left_out[name].append((effect, seed))
                else:
                    pairs[name].append(score_pair(outputs[effect, seed], truths, effect))
    scores = {name: summarise(pairs[name], left_out[name]) for name in methods}
    for name, row in scores.items():
        other = reference if isinstance(reference, str) else reference.get(name, "")
        if other in methods and other != name:
            scores[name] = replace(row, reference=other, differences=differences(pairs[name], pairs[other]))
    return scores


def differences(ours: Sequence[PairScores], reference: Sequence[PairScores]) -> dict[str, Difference]:
    """Paired differences of `FIGURES`, ours minus the reference's, over the pairs that both have outputs of.

    Empty when there are none. Raises ValueError when a pair has more outputs of one than of the other.
    """
    others = {(pair.effect, pair.source_seed): pair for pair in reference}
    both = [(pair, others[key]) for pair in ours if (key := (pair.effect, pair.source_seed)) in others]
    if not both:
        return {}
    return {
        name: paired_difference(_groups([a for a, _ in both], values), _groups([b for _, b in both], values))
        for name, values in FIGURES.items()
    }


def _groups(pairs: Sequence[PairScores], values: Callable[[PairScores], Sequence[float]]) -> Groups:
    return {(pair.effect, pair.source_seed): values(pair) for pair in pairs}


def summarise(pairs: Sequence[PairScores], left_out: Sequence[Pair] = ()) -> MethodScores:
    """The figures of a method from those of its pairs. Raises ValueError when there are none."""
    if not pairs:
        raise ValueError(f"no output is left to score ({len(left_out)} ambiguous pairs left out)")
    pairs = sorted(pairs, key=lambda pair: (pair.effect, pair.source_seed))
    by_effect: dict[str, list[PairScores]] = {}
    confusions: dict[str, dict[str, int]] = {}
    for pair in pairs:
        by_effect.setdefault(pair.effect, []).append(pair)
        for nearest in pair.nearest:
            if nearest != pair.effect:
                row = confusions.setdefault(pair.effect, {})
                row[nearest] = row.get(nearest, 0) + 1
    overall = _scores(pairs)
    return MethodScores(
        **vars(overall),
        bcr_interval=bootstrap_interval(_groups(pairs, FIGURES["bcr"])),
        left_out=tuple(sorted(left_out)),
        reasons=dict(Counter(reason for pair in pairs for reason in pair.reasons if reason)),
        confusions=confusions,
        per_effect={effect: _scores(rows) for effect, rows in by_effect.items()},
    )


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def _scores(pairs: Sequence[PairScores]) -> Scores:
    bad = [flag for pair in pairs for flag in pair.bad]
    ratios = [value for pair in pairs for value in pair.hf_ratio]
    return Scores(
        bcr=float(np.mean(bad)),
        vsa=float(np.mean([value for pair in pairs for value in pair.vsa])),
        detail_error=detail_error(ratios),
        hf_ratio=geometric_mean(ratios),
        l1=_mean([value for pair in pairs for value in pair.l1]),
        psnr=_mean([value for pair in pairs for value in pair.psnr]),
        ssim=_mean([value for pair in pairs for value in pair.ssim]),
        energy_distance=_mean([pair.energy_distance for pair in pairs if pair.energy_distance is not None]),
        num_outputs=len(bad),
    )

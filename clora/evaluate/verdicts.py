"""Verdicts on outputs by a source's `Truths`: bad cases, and how much of the subject is kept.

docs/METRICS.md has the rules and how often they are right. Images are (H, W, 3) float32 RGB in [0, 1], H = W a
multiple of 64. Shape legend: N images, H W pixels.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from clora.evaluate.metrics.detail import detail, detail_nearby
from clora.evaluate.metrics.distance import embed
from clora.evaluate.truths import SOURCE, Calibration, Truths
from clora.tiny.world.drawing import Array, f32

CONFUSED = 0.25  # a pair is ambiguous when more than this share of fresh draws is mistaken

Reason = Literal["", "wrong effect", "untouched", "too far", "mixed", "averaged", "soft", "noisy"]


class BadCase(NamedTuple):
    """A verdict: `nearest` class, `distance` D to the asked effect's truth, `reason` ("" for a good case)."""

    bad: bool
    nearest: str
    distance: float
    reason: Reason


def bad_cases(outputs_NHW3: Array, truths: Truths, effect: str) -> list[BadCase]:
    """A verdict on each output (N, H, W, 3) of an effect. An output is bad when, in this order,

    - its nearest truth is another effect's ("wrong effect") or the source ("untouched");
    - it is farther from its truth than 1.5 times the median of twelve disturbed fresh draws ("too far");
    - the same by 2 times, looking only where outcomes differ ("mixed": colours or places that no outcome has);
    - there it lies between outcomes rather than at one: 1.75 times as far from the nearest as they are, measured by
      its distance from their mean, or nearer to their mean than 0.9 times any draw ("averaged");
    - it keeps less than 0.6 of the fine detail that a fresh draw keeps, even if moved by a pixel: "soft" when it has
      less energy of detail than the truth, otherwise "noisy", as it also is with more than twice a fresh draw's.

    Raises ValueError for an effect that `truths` does not hold, or an image that is not finite.
    """
    if effect not in truths.names[1:]:
        raise ValueError(f"effect {effect!r} is not among the truths of source {truths.source_seed}")
    bounds, own, draws = truths.calibration(effect), truths.names.index(effect), truths.draws[effect]
    outputs = f32(outputs_NHW3)
    distances = truths.class_distances(embed(outputs))
    apart, away = truths.randomness(outputs, effect)
    verdicts = []
    for image, row, gap, decided in zip(outputs, distances, apart, away, strict=True):
        nearest = truths.names[int(row.argmin())]
        reason: Reason = "untouched" if nearest == SOURCE else "wrong effect"
        if nearest == effect:
            reason = _misplaced(bounds, float(row[own]), float(gap), float(decided)) or _coarse(bounds, image, draws)
        verdicts.append(BadCase(reason != "", nearest, float(row[own]), reason))
    return verdicts


def _misplaced(bounds: Calibration, distance: float, apart: float, away: float) -> Reason:
    """Whether an output is where no outcome is."""
    if distance > bounds.far:
        return "too far"
    if apart > bounds.mixed:
        return "mixed"
    return "averaged" if apart > bounds.between * away or away < bounds.decided else ""


def _coarse(bounds: Calibration, output: Array, draws_KHW3: Array) -> Reason:
    """Whether an output lacks the detail of its truth, or has other detail in its place."""
    found = detail(output, draws_KHW3)
    if found.kept < bounds.kept:
        found = detail_nearby(output, draws_KHW3)
    if found.energy > bounds.noisy:
        return "noisy"
    return "" if found.kept >= bounds.kept else "soft" if found.energy < 1 else "noisy"


def bad_case(output: Array, truths: Truths, effect: str) -> BadCase:
    """The verdict of `bad_cases` on one output (H, W, 3)."""
    return bad_cases(output[None], truths, effect)[0]


def vsa(output: Array, truths: Truths, effect: str) -> float:
    """Subject alignment, 0 to 5: zero for a bad case, otherwise 5 x the detail of the subject that is kept.

    See `clora.evaluate.metrics.detail.detail`: at each place against whichever valid outcome is most alike there,
    over the subject as it lies in the nearest outcome, and over the same figure of fresh draws.
    """
    if bad_case(output, truths, effect).bad:
        return 0.0
    return subject_structure(output, truths, effect)


def subject_structure(output: Array, truths: Truths, effect: str) -> float:
    """`vsa` without its first clause: 5 x detail kept, whether or not the output is a bad case."""
    kept = truths.subject_detail(f32(output), effect).kept / truths.calibration(effect).subject
    return 5.0 * min(max(kept, 0.0), 1.0)


def ambiguous(truths: Truths, effect: str) -> bool:
    """Whether more than a quarter of fresh, gently disturbed truths would be taken for another class."""
    return truths.calibration(effect).confused > CONFUSED

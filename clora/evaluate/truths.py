"""The truth of one source of the tiny world, and verdicts on outputs: bad cases and subject alignment.

docs/METRICS.md has the rules and how often they are right. Images are (H, W, 3) float32 RGB in [0, 1],
H = W a multiple of 64. Shape legend: N images, K draws of an effect, F features, H W pixels.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from clora.evaluate.metrics.detail import Detail, detail, detail_nearby
from clora.evaluate.metrics.distance import cityblock, embed, energy_distance, places
from clora.evaluate.metrics.image import LUMA, disturbed
from clora.tiny.effects.table import EFFECTS, Effect, apply_effect, find_effect
from clora.tiny.world.drawing import Array, f32
from clora.tiny.world.scenes import Rendered, render, sample_scene

SOURCE = "source"  # the class of the untouched source
STALE_DRAWS = 64  # so many repeated outcomes in a row: an effect has no others
NUM_FRESH = 12  # fresh draws behind every bound
NUM_SEEN = 48  # and fresh draws that no bound on where outcomes differ may refuse
# Bounds, as multiples of the median over fresh draws; the figures behind them are in docs/METRICS.md.
TOO_FAR = 1.5  # of a disturbed draw's D
MIXED = 2.0  # of its distance where outcomes differ
BETWEEN = 1.75  # of that distance over the distance from the mean outcome
DECIDED = 0.9  # of the least distance from the mean outcome that any draw has
KEPT = 0.6  # of the detail that an undisturbed draw keeps
NOISY = 2.0  # of the energy of detail of the liveliest undisturbed draw
SEEN = 1.1  # no bound is tighter than this times the worst undisturbed draw
CONFUSED = 0.25  # a pair is ambiguous when more than this share of fresh draws is mistaken

Reason = Literal["", "wrong effect", "untouched", "too far", "mixed", "averaged", "soft", "noisy"]


def _rng(effect: str, source_seed: int, purpose: int, index: int) -> np.random.Generator:
    return np.random.default_rng((zlib.crc32(effect.encode()), source_seed, purpose, index))


def _bound(factor: float, disturbed_N: Array, clean_N: Array) -> float:
    """So many times the median disturbed draw, or what the worst of the undisturbed ones needs."""
    return max(factor * float(np.median(disturbed_N)), SEEN * float(clean_N.max()))


class Calibration(NamedTuple):
    """What `Truths` learned from fresh, disturbed draws of one effect; see `Truths.calibration`."""

    far: float  # a good outcome's D to its nearest draw is at most this
    mixed: float  # the same, only where outcomes differ (inf for deterministic effects)
    between: float  # and over its distance from the mean outcome there (inf for deterministic effects)
    decided: float  # a good outcome is at least this far from the mean outcome there (-inf for deterministic ones)
    confused: float  # share of fresh draws, gently disturbed, nearest to another class
    kept: float  # a good outcome keeps at least this much detail
    noisy: float  # and has at most this much energy of detail
    subject: float  # detail of the subject that a fresh draw keeps


class Truths:
    """All that is needed to judge outputs on one source: draws of every effect, embedded once.

    `effects` names the classes an output may be mistaken for (all of `EFFECTS` when None), besides the
    untouched source; `find_effect` says what may be named. A random effect gets up to `num_draws` *distinct* draws, so
    one with few outcomes has them all. Draws depend on the seed and the effect's name alone. Not for several threads
    at once.
    """

    def __init__(self, source_seed: int, effects: Sequence[str] | None = None, num_draws: int = 32,
                 size: int = 64) -> None:  # fmt: skip
        chosen = list(EFFECTS) if effects is None else list(effects)
        self.source_seed = source_seed
        self.rendered: Rendered = render(sample_scene(source_seed), size)
        self.names = [SOURCE, *chosen]
        self.draws: dict[str, Array] = {SOURCE: self.rendered.image_HW3[None]}
        self._indices: dict[str, list[int]] = {}
        for name in chosen:
            self.draws[name], self._indices[name] = self._distinct(find_effect(name), num_draws)
        self.features: dict[str, Array] = {}
        stacked = embed(np.concatenate([self.draws[name] for name in self.names]))
        starts = np.cumsum([0, *(len(self.draws[name]) for name in self.names)])
        for name, start, end in zip(self.names, starts[:-1], starts[1:], strict=True):
            self.features[name] = stacked[start:end]
        self._all_features, self._starts = stacked, starts[:-1]
        self._calibrations: dict[str, Calibration] = {}
        self._references: dict[str, Array] = {}

    def _distinct(self, effect: Effect, limit: int) -> tuple[Array, list[int]]:
        """Distinct draws (K, H, W, 3) and the index of each in the effect's stream."""
        found: dict[bytes, int] = {}
        images: list[Array] = []
        index = stale = 0
        limit = limit if effect.random else 1
        while len(images) < limit and stale < STALE_DRAWS:
            image = apply_effect(effect, self.rendered, _rng(effect.name, self.source_seed, 0, index))
            key = image.tobytes()
            stale = stale + 1 if key in found else 0
            if key not in found:
                found[key] = index
                images.append(image)
            index += 1
        return np.stack(images), list(found.values())

    def fresh_draws(self, effect: str, count: int, first: int = 0) -> Array:
        """`count` further draws of an effect, (count, H, W, 3), from another stream than `draws`."""
        rngs = [_rng(effect, self.source_seed, 1, first + i) for i in range(count)]
        return np.stack([apply_effect(find_effect(effect), self.rendered, rng) for rng in rngs])

    def class_distances(self, features_NF: Array) -> Array:
        """D to the nearest draw of every class in `names`: (N, len(names))."""
        distances = cityblock(features_NF, self._all_features)
        return f32(np.minimum.reduceat(distances, self._starts, axis=1))

    def _where_random(self, effect: str) -> Array:
        """Weights (768,) that sum to 1: the spread over the draws at each place of the 16 x 16 grid."""
        spread = places(self.draws[effect]).std(axis=0).reshape(-1, 3).mean(axis=1)
        weights = np.repeat(spread, 3)
        return f32(weights / max(float(weights.sum()), 1e-12))

    def randomness(self, outputs_NHW3: Array, effect: str) -> tuple[Array, Array]:
        """Where outcomes differ: distance to the nearest draw, and distance from the mean draw, each (N,).

        Weighted means of colour differences on the 16 x 16 grid; both 0 for a deterministic effect.
        """
        weights = self._where_random(effect)
        outputs, draws = places(outputs_NHW3) * weights, places(self.draws[effect]) * weights
        nearest = cityblock(outputs, draws).min(axis=1)
        return nearest, np.abs(outputs - draws.mean(axis=0)).sum(axis=1)

    def is_random(self, effect: str) -> bool:
        """Whether the effect has more than one outcome on this source."""
        return len(self.draws[effect]) > 1

    def calibration(self, effect: str) -> Calibration:
        """Bounds of one effect on this source, from NUM_FRESH fresh draws, disturbed.

        `confused` counts a gentler disturbance (blur .6, noise .02, light .04) than the bounds allow.
        """
        if effect not in self._calibrations:
            seen = self.fresh_draws(effect, NUM_SEEN if self.is_random(effect) else 1)
            clean = seen[:NUM_FRESH]
            rng = _rng(effect, self.source_seed, 2, 0)
            softer = [disturbed(clean[i % len(clean)], rng, 0.6, 0.02, 0.04) for i in range(NUM_FRESH)]
            classes = self.class_distances(embed(np.stack(softer))).argmin(axis=1)
            fresh = np.stack([disturbed(clean[i % len(clean)], rng) for i in range(NUM_FRESH)])
            distances, plain = (cityblock(embed(x), self.features[effect]).min(axis=1) for x in (fresh, clean))
            mixed, between, decided = math.inf, math.inf, -math.inf
            if self.is_random(effect):
                apart, away = self.randomness(fresh, effect)
                least = min(away.min(), self.randomness(self.draws[effect], effect)[1].min())
                gap, out = self.randomness(seen, effect)
                mixed, between = _bound(MIXED, apart, gap), _bound(BETWEEN, apart / away, gap / out)
                decided = DECIDED * float(least)
            kept, energy = np.array([detail(image, self.draws[effect]) for image in clean]).T
            self._calibrations[effect] = Calibration(
                far=_bound(TOO_FAR, distances, plain),
                mixed=mixed,
                between=between,
                decided=decided,
                confused=float((classes != self.names.index(effect)).mean()),
                kept=KEPT * float(np.median(kept)),
                noisy=NOISY * float(energy.max()),
                subject=float(np.median([self.subject_detail(image, effect).kept for image in clean[:4]])),
            )
        return self._calibrations[effect]

    def subject_mask(self, effect: str, draw: int) -> Array:
        """Where the subject lands in a draw: (H, W) in [0, 1].

        Found by turning the subject's bright pixels black and its dark ones white and drawing again, so it
        follows mirrored, bent, shrunk and shuffled pictures. Where the outcome hides the subject's pixels
        (a silhouette) it is their own mask.
        """
        image, subject = self.rendered.image_HW3, self.rendered.subject_HW
        moved = np.where(image @ LUMA > 0.5, 0.0, 1.0)[..., None]
        changed = self.rendered._replace(image_HW3=f32(image + subject[..., None] * (moved - image)))
        rng = _rng(effect, self.source_seed, 0, self._indices[effect][draw])
        gap = np.abs(apply_effect(find_effect(effect), changed, rng) - self.draws[effect][draw]).max(axis=-1)
        mask = f32(np.clip(gap / 0.25, 0, 1))
        return mask if mask.mean() > 0.1 * subject.mean() else subject

    def nearest_draw(self, output: Array, effect: str) -> int:
        """The place in `draws[effect]` of the outcome nearest to an output (H, W, 3)."""
        return int(cityblock(embed(output[None]), self.features[effect])[0].argmin())

    def subject_detail(self, output: Array, effect: str) -> Detail:
        """`detail` of an output (H, W, 3) where the subject lies in the nearest draw."""
        mask = self.subject_mask(effect, self.nearest_draw(output, effect))
        return detail(output, self.draws[effect], mask)

    def energy_distance(self, outputs_NHW3: Array, effect: str) -> float:
        """`distribution_distance` of outputs (two or more seeds) from 32 fresh draws, embedded once."""
        if effect not in self._references:
            self._references[effect] = embed(self.fresh_draws(effect, 32, first=1000))
        return energy_distance(embed(outputs_NHW3), self._references[effect])


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

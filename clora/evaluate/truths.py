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

from clora.evaluate.metrics.distance import cityblock, embed, energy_distance, places
from clora.evaluate.metrics.image import LUMA, disturbed, ssim_map, ssim_window
from clora.tiny.effects.table import EFFECTS, Effect, apply_effect
from clora.tiny.world.drawing import Array, f32
from clora.tiny.world.scenes import Rendered, render, sample_scene

SOURCE = "source"  # the class of the untouched source
STALE_DRAWS = 64  # so many repeated outcomes in a row: an effect has no others
NUM_FRESH = 12  # fresh draws behind every bound
TOO_FAR = 1.3  # an output may be so many times as far as the farthest disturbed fresh draw
DECIDED = 0.7  # and must be so many times as far from the mean outcome as the nearest draw
CONFUSED = 0.25  # a pair is ambiguous when more than this share of fresh draws is mistaken

Reason = Literal["", "wrong effect", "untouched", "too far", "mixed", "averaged"]


def _rng(effect: str, source_seed: int, purpose: int, index: int) -> np.random.Generator:
    return np.random.default_rng((zlib.crc32(effect.encode()), source_seed, purpose, index))


class Calibration(NamedTuple):
    """What `Truths` learned from fresh, disturbed draws of one effect; see `Truths.calibration`."""

    far: float  # a good outcome's D to its nearest draw is at most this
    mixed: float  # the same, only where outcomes differ (inf for deterministic effects)
    decided: float  # a good outcome is at least this far from the mean outcome there (-inf for deterministic ones)
    confused: float  # share of fresh draws, gently disturbed, nearest to another class
    structure: float  # SSIM of a fresh draw to the draws, place by place


class Truths:
    """All that is needed to judge outputs on one source: draws of every effect, embedded once.

    `effects` names the classes an output may be mistaken for (all of `EFFECTS` when None), besides the
    untouched source. A random effect gets up to `num_draws` *distinct* draws, so one with few outcomes has
    them all. Draws depend on the seed and the effect's name alone. Not for several threads at once.
    """

    def __init__(self, source_seed: int, effects: Sequence[str] | None = None, num_draws: int = 32,
                 size: int = 64) -> None:  # fmt: skip
        chosen = list(EFFECTS) if effects is None else list(effects)
        if unknown := [name for name in chosen if name not in EFFECTS]:
            raise ValueError(f"{unknown} are not effects of the tiny world (clora.tiny.effects.table.EFFECTS)")
        self.source_seed = source_seed
        self.rendered: Rendered = render(sample_scene(source_seed), size)
        self.names = [SOURCE, *chosen]
        self.draws: dict[str, Array] = {SOURCE: self.rendered.image_HW3[None]}
        self._indices: dict[str, list[int]] = {}
        for name in chosen:
            self.draws[name], self._indices[name] = self._distinct(EFFECTS[name], num_draws)
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
        return np.stack([apply_effect(EFFECTS[effect], self.rendered, rng) for rng in rngs])

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
            clean = self.fresh_draws(effect, NUM_FRESH if self.is_random(effect) else 1)
            rng = _rng(effect, self.source_seed, 2, 0)
            softer = [disturbed(clean[i % len(clean)], rng, 0.6, 0.02, 0.04) for i in range(NUM_FRESH)]
            classes = self.class_distances(embed(np.stack(softer))).argmin(axis=1)
            fresh = np.stack([disturbed(clean[i % len(clean)], rng) for i in range(NUM_FRESH)])
            distances = cityblock(embed(fresh), self.features[effect]).min(axis=1)
            mixed, decided = math.inf, -math.inf
            if self.is_random(effect):
                apart, away = self.randomness(fresh, effect)
                least = min(away.min(), self.randomness(self.draws[effect], effect)[1].min())
                mixed, decided = TOO_FAR * float(apart.max()), DECIDED * float(least)
            self._calibrations[effect] = Calibration(
                far=TOO_FAR * float(distances.max()),
                mixed=mixed,
                decided=decided,
                confused=float((classes != self.names.index(effect)).mean()),
                structure=float(np.median([self.structure(image, effect) for image in clean[:4]])),
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
        gap = np.abs(apply_effect(EFFECTS[effect], changed, rng) - self.draws[effect][draw]).max(axis=-1)
        mask = f32(np.clip(gap / 0.25, 0, 1))
        return mask if mask.mean() > 0.1 * subject.mean() else subject

    def nearest_draw(self, output: Array, effect: str) -> int:
        """The place in `draws[effect]` of the outcome nearest to an output (H, W, 3)."""
        return int(cityblock(embed(output[None]), self.features[effect])[0].argmin())

    def structure(self, output: Array, effect: str) -> float:
        """SSIM to the best draw at each place, averaged over the subject as it lies in the nearest draw."""
        best = ssim_map(output, self.draws[effect]).max(axis=0)
        weights = ssim_window(self.subject_mask(effect, self.nearest_draw(output, effect)))
        return float((best * weights).sum(dtype=np.float64) / weights.sum(dtype=np.float64))

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
    - it is farther from its truth than 1.3 times the farthest of twelve disturbed fresh draws ("too far");
    - the same, looking only where outcomes differ ("mixed": colours or places that no outcome has);
    - where outcomes differ, it is nearer to their mean than 0.7 times any draw, disturbed or not ("averaged").

    Raises ValueError for an effect that `truths` does not hold, or an image that is not finite.
    """
    if effect not in truths.names[1:]:
        raise ValueError(f"effect {effect!r} is not among the truths of source {truths.source_seed}")
    bounds, own = truths.calibration(effect), truths.names.index(effect)
    outputs = f32(outputs_NHW3)
    distances = truths.class_distances(embed(outputs))
    apart, away = truths.randomness(outputs, effect)
    verdicts = []
    for row, gap, decided in zip(distances, apart, away, strict=True):
        nearest, reason = (
            truths.names[int(row.argmin())],
            _reason(bounds, float(row[own]), float(gap), float(decided)),
        )
        if nearest != effect:
            reason = "untouched" if nearest == SOURCE else "wrong effect"
        verdicts.append(BadCase(reason != "", nearest, float(row[own]), reason))
    return verdicts


def _reason(bounds: Calibration, distance: float, apart: float, away: float) -> Reason:
    if distance > bounds.far:
        return "too far"
    return "mixed" if apart > bounds.mixed else "averaged" if away < bounds.decided else ""


def bad_case(output: Array, truths: Truths, effect: str) -> BadCase:
    """The verdict of `bad_cases` on one output (H, W, 3)."""
    return bad_cases(output[None], truths, effect)[0]


def vsa(output: Array, truths: Truths, effect: str) -> float:
    """Subject alignment, 0 to 5: zero for a bad case, otherwise 5 x structure kept.

    Structure is the SSIM at each place to whichever valid outcome is most alike there, averaged over the
    subject as it lies in the nearest outcome, over the same figure of fresh draws (1 for a deterministic
    effect).
    """
    if bad_case(output, truths, effect).bad:
        return 0.0
    return subject_structure(output, truths, effect)


def subject_structure(output: Array, truths: Truths, effect: str) -> float:
    """`vsa` without its first clause: 5 x structure kept, whether or not the output is a bad case."""
    kept = truths.structure(f32(output), effect) / truths.calibration(effect).structure
    return 5.0 * min(max(kept, 0.0), 1.0)


def ambiguous(truths: Truths, effect: str) -> bool:
    """Whether more than a quarter of fresh, gently disturbed truths would be taken for another class."""
    return truths.calibration(effect).confused > CONFUSED

"""Exact metrics of the tiny world: distances to the truth, the bad-case rate and subject alignment.

docs/METRICS.md has the maths and the figures behind the constants. All images are (H, W, 3) float32 RGB in
[0, 1], H = W a multiple of 64 (the distance works at 64 x 64; larger images are averaged down for it).
Shape legend: N images, K draws of an effect, F features, H = W pixels, w = H - 10 places of the SSIM window.
"""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from clora.tiny.effects import EFFECTS, Effect, apply_effect
from clora.tiny.scenes import Array, Rendered, f32, render, sample_scene

SOURCE = "source"  # the class of the untouched source
LUMA = f32((0.299, 0.587, 0.114))
# The embedding: (pool, stride, weight) of each patch scale, and the weights of colour and place.
PATCH = 5
SCALES = ((1, 2, 1.0), (2, 1, 1.0), (4, 1, 2.0))
NUM_PROJECTIONS, NUM_QUANTILES, NUM_COLOR_DIRECTIONS = 24, 32, 8
COLOR_WEIGHT, PLACE_WEIGHT = 1.0, 1.0
PLACE_SIZE = 16
# The verdict: how much farther than a disturbed truth is too far, and how decided an outcome must be.
NUM_FRESH, TOO_FAR, DECIDED, CONFUSED = 8, 1.3, 0.7, 0.25
STALE_DRAWS = 64  # so many repeated outcomes in a row: an effect has no others
FLAT_ENERGY = 1e-6  # mean squared high frequencies of a grey level or so: below it a picture counts as flat

Reason = Literal["", "wrong effect", "untouched", "too far", "mixed", "averaged"]


# ---------------------------------------------------------------- one image against another


def l1(output: Array, truth: Array) -> float:
    """Mean absolute difference, in [0, 1]."""
    return float(np.abs(output - truth).mean(dtype=np.float64))


def psnr(output: Array, truth: Array) -> float:
    """Peak signal to noise ratio in dB, 10 log10(1 / mean squared difference); inf for equal images."""
    error = float(np.square(output - truth).mean(dtype=np.float64))
    return 10.0 * math.log10(1.0 / error) if error > 0 else math.inf


@functools.lru_cache(maxsize=16)
def _gaussian_rows(size: int, sigma: float, reach: int, valid: bool) -> Array:
    """A Gaussian filter along an axis of `size` as a matrix.

    (size - 2 reach, size) where `valid`, otherwise (size, size) with the rows at the ends renormalised.
    """
    places = np.arange(reach, size - reach) if valid else np.arange(size)
    offset = np.arange(size)[None, :] - places[:, None]
    rows = np.where(np.abs(offset) <= reach, np.exp(-0.5 * (offset / sigma) ** 2), 0.0)
    return f32(rows / rows.sum(axis=1, keepdims=True))


def _window(images_NHW: Array) -> Array:
    """The 11 x 11 Gaussian window of SSIM (sigma 1.5) wherever it fits: (..., H, W) -> (..., w, w)."""
    height, width = images_NHW.shape[-2:]
    return f32(_gaussian_rows(height, 1.5, 5, True) @ images_NHW @ _gaussian_rows(width, 1.5, 5, True).T)


def ssim_map(output: Array, truths_KHW3: Array) -> Array:
    """Structural similarity of the brightness at every place, against each of K truths: (K, w, w) in [-1, 1].

    Wang et al. 2004: Gaussian window 11 x 11 of sigma 1.5, K1 = .01, K2 = .03, range 1, no padding.
    """
    x, y = output @ LUMA, truths_KHW3 @ LUMA
    c1, c2 = 0.01**2, 0.03**2
    mean_x, mean_y = _window(x), _window(y)
    var_x, var_y = _window(x * x) - mean_x**2, _window(y * y) - mean_y**2
    cov = _window(x * y) - mean_x * mean_y
    similar = (2 * mean_x * mean_y + c1) * (2 * cov + c2)
    return f32(similar / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2)))


def ssim(output: Array, truth: Array) -> float:
    """Mean of `ssim_map`, in [-1, 1]; 1 for equal images."""
    return float(ssim_map(output, truth[None]).mean(dtype=np.float64))


def hf_energy(image: Array) -> float:
    """Mean square of the brightness above a quarter of a cycle per pixel (half of Nyquist), along x or y.

    The image is mirrored first, so that its borders are not edges.
    """
    grey = (image @ LUMA).astype(np.float64)
    tiled = np.block([[grey, grey[:, ::-1]], [grey[::-1], grey[::-1, ::-1]]])
    power = np.abs(np.fft.fft2(tiled, norm="forward")) ** 2
    fy, fx = np.abs(np.fft.fftfreq(tiled.shape[0])), np.abs(np.fft.fftfreq(tiled.shape[1]))
    return float(power[np.maximum(fy[:, None], fx[None, :]) > 0.25].sum())


def hf_ratio(output: Array, truth: Array) -> float:
    """High-frequency energy of the output over the truth's: 1 is right, less over-smoothed, more noisy."""
    return (hf_energy(output) + FLAT_ENERGY) / (hf_energy(truth) + FLAT_ENERGY)


# ---------------------------------------------------------------- the distance


@functools.cache
def _projections() -> tuple[list[Array], Array]:
    """Fixed random directions: per scale (75, P) unit filters blind to flat colour, and (3, C) of colour."""
    rng = np.random.default_rng(20240611)
    filters = []
    for _ in SCALES:
        f = rng.normal(size=(PATCH * PATCH, 3, NUM_PROJECTIONS))
        f -= f.mean(axis=0)
        filters.append(f32((f / np.sqrt((f**2).sum(axis=(0, 1)))).reshape(-1, NUM_PROJECTIONS)))
    colors = rng.normal(size=(3, NUM_COLOR_DIRECTIONS))
    return filters, f32(colors / np.linalg.norm(colors, axis=0))


def _pooled(images_NHW3: Array, factor: int) -> Array:
    """Means of factor x factor blocks: (N, H, W, C) -> (N, H / factor, W / factor, C)."""
    corners = [images_NHW3[:, i::factor, j::factor] for i in range(factor) for j in range(factor)]
    return f32(functools.reduce(np.add, corners) / np.float32(factor * factor))


def _quantiles(values_NMP: Array) -> Array:
    """Sorted values of each projection P, averaged in NUM_QUANTILES bins: (N, P * NUM_QUANTILES)."""
    count = values_NMP.shape[1]
    ordered = np.sort(np.ascontiguousarray(values_NMP.transpose(0, 2, 1)), axis=-1)
    edges = np.linspace(0, count, NUM_QUANTILES + 1).astype(np.int64)
    bins = np.add.reduceat(ordered, edges[:-1], axis=-1) / np.diff(edges)
    return f32(bins.reshape(len(values_NMP), -1))


def _patches(images_NHW3: Array, stride: int) -> Array:
    """All 5 x 5 patches at a stride: (N, M, 75)."""
    windows = np.lib.stride_tricks.sliding_window_view(images_NHW3, (PATCH, PATCH), axis=(1, 2))
    windows = windows[:, ::stride, ::stride].transpose(0, 1, 2, 4, 5, 3)
    return windows.reshape(len(images_NHW3), -1, PATCH * PATCH * 3)


def _places(images_NHW3: Array) -> Array:
    """Colours averaged on a 16 x 16 grid: (N, 768)."""
    return _pooled(images_NHW3, images_NHW3.shape[1] // PLACE_SIZE).reshape(len(images_NHW3), -1)


def embed(images_NHW3: Array) -> Array:
    """Features (N, F) float32 such that D(a, b) = sum |embed(a) - embed(b)|.

    Three parts, each a mean of absolute differences times its weight: *place*, colours on a 16 x 16 grid;
    *colour*, the sliced Wasserstein distance of the colours of 2 x 2 blocks, wherever they are; *patches*,
    the sliced Wasserstein distance of 5 x 5 patches without their mean colour, at 1, 1/2 and 1/4 size.
    Raises ValueError when a size is not a multiple of 64 or a value is not finite.
    """
    images = f32(images_NHW3)
    if images.ndim != 4 or images.shape[1] != images.shape[2] or images.shape[1] % 64 or images.shape[3] != 3:
        raise ValueError(f"images must be (N, H, H, 3) with H a multiple of 64, got {images.shape}")
    if not np.isfinite(images).all():
        raise ValueError("an image holds values that are not finite")
    filters, colors = _projections()
    chunks = [images[i : i + 32] for i in range(0, len(images), 32)]
    return np.concatenate(
        [_embed_chunk(_pooled(chunk, images.shape[1] // 64), filters, colors) for chunk in chunks]
    )


def _embed_chunk(images: Array, filters: list[Array], colors: Array) -> Array:
    parts = [(_places(images), PLACE_WEIGHT)]
    parts.append((_quantiles(_pooled(images, 2).reshape(len(images), -1, 3) @ colors), COLOR_WEIGHT))
    for (pool, stride, weight), filter_bank in zip(SCALES, filters, strict=True):
        parts.append((_quantiles(_patches(_pooled(images, pool), stride) @ filter_bank), weight))
    return np.concatenate([part * np.float32(weight / part.shape[1]) for part, weight in parts], axis=1)


def _cityblock(a_NF: Array, b_KF: Array) -> Array:
    """Pairwise sums of absolute differences: (N, K)."""
    distance: Array = torch.cdist(torch.from_numpy(a_NF), torch.from_numpy(b_KF), p=1.0).numpy()
    return distance


def image_distance(a: Array, b: Array) -> float:
    """D(a, b) of two images, about the scale of an L1 difference; see `embed`. A metric on embeddings."""
    return float(_cityblock(embed(a[None]), embed(b[None]))[0, 0])


def distribution_distance(outputs_NHW3: Array, draws_KHW3: Array) -> float:
    """Energy distance between outputs of several seeds and draws of the truth, over the spread of the draws.

    (2 E D(output, draw) - E D(output, output') - E D(draw, draw')) / E D(draw, draw'), without bias (a fresh
    set of draws gives 0 on average and may be a little negative); one outcome repeated gives about 1. Energy
    distance: Szekely and Rizzo 2013; D is an L1 distance, so zero means equal distributions of embeddings.
    Raises ValueError for fewer than two outputs or draws, or draws that are all alike.
    """
    return _energy_distance(embed(outputs_NHW3), embed(draws_KHW3))


def _energy_distance(x_NF: Array, y_KF: Array) -> float:
    if len(x_NF) < 2 or len(y_KF) < 2:
        raise ValueError("the energy distance needs at least two outputs and two draws")

    def within(z: Array) -> float:
        return float(_cityblock(z, z).sum(dtype=np.float64)) / (len(z) * (len(z) - 1))

    spread = within(y_KF)
    if not spread > 0:
        raise ValueError("the draws are all alike: the effect has no randomness to compare")
    return (2 * float(_cityblock(x_NF, y_KF).mean(dtype=np.float64)) - within(x_NF) - spread) / spread


# ---------------------------------------------------------------- the truth of one source


def disturbed(image: Array, rng: np.random.Generator, blur: float = 0.8, noise: float = 0.03,
              light: float = 0.06) -> Array:  # fmt: skip
    """The image as a small model gives it back: blurred (sigma in pixels of 64), noisy, its light changed."""
    size = image.shape[0]
    sigma = blur * size / 64
    rows = _gaussian_rows(size, sigma, max(1, math.ceil(3 * sigma)), False)
    soft = np.einsum("ij,jkc,lk->ilc", rows, image, rows, optimize=True)
    lit = soft * (1 + rng.uniform(-light, light)) + rng.uniform(-light / 2, light / 2, 3)
    return f32(np.clip(lit + rng.normal(0, noise, image.shape), 0, 1))


def _rng(effect: str, source_seed: int, purpose: int, index: int) -> np.random.Generator:
    return np.random.default_rng((zlib.crc32(effect.encode()), source_seed, purpose, index))


class Calibration(NamedTuple):
    """What `Truths` learned from fresh, disturbed draws of one effect; see `Truths.calibration`."""

    far: float  # a good outcome's D to its nearest draw is at most this
    mixed: float  # the same, only where outcomes differ (inf for deterministic effects)
    decided: (
        float  # a good outcome is at least this far from the mean outcome there (-inf for deterministic ones)
    )
    confused: float  # share of fresh draws nearest to another class
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
            raise ValueError(f"{unknown} are not effects of the tiny world (clora.tiny.effects.EFFECTS)")
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
        distances = _cityblock(features_NF, self._all_features)
        return f32(np.minimum.reduceat(distances, self._starts, axis=1))

    def _where_random(self, effect: str) -> Array:
        """Weights (768,) that sum to 1: the spread over the draws at each place of the 16 x 16 grid."""
        spread = _places(self.draws[effect]).std(axis=0).reshape(-1, 3).mean(axis=1)
        weights = np.repeat(spread, 3)
        return f32(weights / max(float(weights.sum()), 1e-12))

    def randomness(self, outputs_NHW3: Array, effect: str) -> tuple[Array, Array]:
        """Where outcomes differ: distance to the nearest draw, and distance from the mean draw, each (N,).

        Weighted means of colour differences on the 16 x 16 grid; both 0 for a deterministic effect.
        """
        weights = self._where_random(effect)
        outputs, draws = _places(outputs_NHW3) * weights, _places(self.draws[effect]) * weights
        nearest = _cityblock(outputs, draws).min(axis=1)
        return nearest, np.abs(outputs - draws.mean(axis=0)).sum(axis=1)

    def is_random(self, effect: str) -> bool:
        """Whether the effect has more than one outcome on this source."""
        return len(self.draws[effect]) > 1

    def calibration(self, effect: str) -> Calibration:
        """Bounds of one effect on this source, from NUM_FRESH fresh draws, disturbed."""
        if effect not in self._calibrations:
            clean = self.fresh_draws(effect, NUM_FRESH if self.is_random(effect) else 1)
            rng = _rng(effect, self.source_seed, 2, 0)
            fresh = np.stack([disturbed(clean[i % len(clean)], rng) for i in range(NUM_FRESH)])
            distances = self.class_distances(embed(fresh))
            mixed, decided = math.inf, -math.inf
            if self.is_random(effect):
                apart, away = self.randomness(fresh, effect)
                mixed, decided = TOO_FAR * float(apart.max()), DECIDED * float(away.min())
            own = self.names.index(effect)
            self._calibrations[effect] = Calibration(
                far=TOO_FAR * float(distances[:, own].max()),
                mixed=mixed,
                decided=decided,
                confused=float((distances.argmin(axis=1) != own).mean()),
                structure=float(np.median([self.structure(image, effect) for image in clean[:4]])),
            )
        return self._calibrations[effect]

    def subject_mask(self, effect: str, draw: int) -> Array:
        """Where the subject lands in a draw: (H, W) in [0, 1].

        Found by changing the subject's pixels and drawing again, so it follows mirrored, bent, shrunk and
        shuffled pictures. Where the outcome hides the subject's pixels (a silhouette) it is their own mask.
        """
        image, subject = self.rendered.image_HW3, self.rendered.subject_HW
        moved = np.where(image > 0.5, image - 0.4, image + 0.4)
        changed = self.rendered._replace(image_HW3=f32(image + subject[..., None] * (moved - image)))
        rng = _rng(effect, self.source_seed, 0, self._indices[effect][draw])
        gap = np.abs(apply_effect(EFFECTS[effect], changed, rng) - self.draws[effect][draw]).max(axis=-1)
        mask = f32(np.clip(gap / 0.1, 0, 1))
        return mask if mask.mean() > 0.1 * subject.mean() else subject

    def nearest_draw(self, output: Array, effect: str) -> int:
        """The place in `draws[effect]` of the outcome nearest to an output (H, W, 3)."""
        return int(_cityblock(embed(output[None]), self.features[effect])[0].argmin())

    def structure(self, output: Array, effect: str) -> float:
        """SSIM to the best draw at each place, averaged over the subject as it lies in the nearest draw."""
        best = ssim_map(output, self.draws[effect]).max(axis=0)
        weights = _window(self.subject_mask(effect, self.nearest_draw(output, effect)))
        return float((best * weights).sum(dtype=np.float64) / weights.sum(dtype=np.float64))

    def energy_distance(self, outputs_NHW3: Array, effect: str) -> float:
        """`distribution_distance` of outputs (two or more seeds) from 32 fresh draws, embedded once."""
        if effect not in self._references:
            self._references[effect] = embed(self.fresh_draws(effect, 32, first=1000))
        return _energy_distance(embed(outputs_NHW3), self._references[effect])


class BadCase(NamedTuple):
    """A verdict: `nearest` class, `distance` D to the asked effect's truth, `reason` ("" for a good case)."""

    bad: bool
    nearest: str
    distance: float
    reason: Reason


def bad_cases(outputs_NHW3: Array, truths: Truths, effect: str) -> list[BadCase]:
    """A verdict on each output (N, H, W, 3) of an effect. An output is bad when, in this order,

    - its nearest truth is another effect's ("wrong effect") or the source ("untouched");
    - it is farther from its truth than 1.3 times the farthest of eight disturbed fresh draws ("too far");
    - the same, looking only where outcomes differ ("mixed": colours or places that no outcome has);
    - where outcomes differ, it is nearer to their mean than 0.7 times any disturbed fresh draw ("averaged").

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
    """Whether more than a quarter of fresh, disturbed truths would themselves be taken for another class."""
    return truths.calibration(effect).confused > CONFUSED


def as_image(pixels: NDArray[Any]) -> Array:
    """uint8 in 0..255 or floats in [0, 1], as float32 in [0, 1]. Raises ValueError unless (H, W, 3)."""
    if pixels.ndim != 3 or pixels.shape[2] != 3:
        raise ValueError(f"an image must be (H, W, 3), got {pixels.shape}")
    return f32(pixels / 255.0) if pixels.dtype == np.uint8 else f32(pixels)

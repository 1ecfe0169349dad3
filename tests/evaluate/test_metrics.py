"""Measures between images against plain references and closed forms."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest

from clora.evaluate.metrics.detail import detail, detail_nearby
from clora.evaluate.metrics.distance import distribution_distance, embed, image_distance, random_directions
from clora.evaluate.metrics.image import (
    COLOR_WEIGHT,
    PLACE_WEIGHT,
    as_image,
    detail_error,
    disturbed,
    geometric_mean,
    hf_energy,
    hf_ratio,
    l1,
    psnr,
    ssim,
    ssim_map,
)
from clora.evaluate.truths import Truths
from clora.tiny.world.scenes import render, sample_scene


@functools.cache
def truths_of(seed: int) -> Truths:
    return Truths(seed, ("halftone", "snow", "duotone", "hat"))


def _pair(seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    truth = render(sample_scene(seed)).image_HW3
    return disturbed(truth, rng), truth


# ---------------------------------------------------------------- one image against another


def test_l1_and_psnr_match_closed_forms() -> None:
    truth = np.full((64, 64, 3), 0.4, np.float32)
    output = truth.copy()
    output[:32] += 0.2
    assert l1(output, truth) == pytest.approx(0.1, rel=1e-5)
    assert psnr(output, truth) == pytest.approx(10 * math.log10(1 / 0.02), rel=1e-5)
    assert psnr(truth, truth) == math.inf


def _ssim_ref(output: np.ndarray, truth: np.ndarray) -> float:
    """SSIM by loops over windows in fp64."""
    grey = [image.astype(np.float64) @ np.array([0.299, 0.587, 0.114]) for image in (output, truth)]
    offsets = np.arange(-5, 6)
    window = np.exp(-(offsets[:, None] ** 2 + offsets[None, :] ** 2) / (2 * 1.5**2))
    window /= window.sum()
    values = []
    for i in range(5, grey[0].shape[0] - 5):
        for j in range(5, grey[0].shape[1] - 5):
            a, b = (image[i - 5 : i + 6, j - 5 : j + 6] for image in grey)
            mean_a, mean_b = (window * a).sum(), (window * b).sum()
            var_a, var_b = (window * (a - mean_a) ** 2).sum(), (window * (b - mean_b) ** 2).sum()
            cov = (window * (a - mean_a) * (b - mean_b)).sum()
            c1, c2 = 0.01**2, 0.03**2
            values.append((2 * mean_a * mean_b + c1) * (2 * cov + c2)
                          / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2)))  # fmt: skip
    return float(np.mean(values))


@pytest.mark.parametrize("seed", [1, 2])
def test_ssim_matches_fp64_reference(seed: int) -> None:
    output, truth = _pair(seed)
    assert ssim(output, truth) == pytest.approx(_ssim_ref(output, truth), abs=2e-5)
    assert ssim(truth, truth) == pytest.approx(1.0, abs=1e-6)
    assert ssim(1 - truth, truth) < 0.2


def test_ssim_map_compares_with_every_truth() -> None:
    output, truth = _pair(3)
    other = render(sample_scene(4)).image_HW3
    both = ssim_map(output, np.stack([truth, other]))
    assert both.shape == (2, 54, 54)
    assert both[0].mean() == pytest.approx(ssim(output, truth), abs=1e-6)
    assert both[1].mean() == pytest.approx(ssim(output, other), abs=1e-6)


def test_hf_energy_is_the_power_of_fine_gratings_only() -> None:
    x = np.arange(64) + 0.5
    for frequency, expected in ((26 / 64, 0.1**2 / 2), (6 / 64, 0.0)):
        grating = 0.5 + 0.1 * np.cos(2 * np.pi * frequency * x)
        image = np.broadcast_to(grating[None, :, None], (64, 64, 3)).astype(np.float32)
        assert hf_energy(image) == pytest.approx(expected, abs=1e-7)
        assert hf_energy(image.transpose(1, 0, 2)) == pytest.approx(expected, abs=1e-7)


def test_hf_energy_cuts_at_a_quarter_of_a_cycle() -> None:
    """Of two gratings just below and above it (15 and 17 cycles in 64 pixels) the finer one's power counts."""
    x = np.arange(64) + 0.5
    coarse, fine = (a * np.cos(2 * np.pi * cycles / 64 * x) for a, cycles in ((0.2, 15), (0.1, 17)))
    image = np.broadcast_to((0.5 + coarse + fine)[None, :, None], (64, 64, 3)).astype(np.float32)
    assert hf_energy(image) == pytest.approx(0.1**2 / 2, rel=1e-4)


def test_detail_error_adds_up_errors_both_ways() -> None:
    """Half and twice the energy are 3 dB off each, though their geometric mean is right."""
    assert detail_error([2.0, 0.5]) == pytest.approx(10 * math.log10(2)) and geometric_mean([2.0, 0.5]) == 1
    assert detail_error([1.0, 0.1]) == pytest.approx(5) and detail_error([1.0]) == 0


def _grating(contrast: float, cycles: int = 14) -> np.ndarray:
    wave = 0.5 + contrast * np.cos(2 * np.pi * cycles / 64 * (np.arange(64) + 0.5))
    return np.broadcast_to(wave[None, :, None], (64, 64, 3)).astype(np.float32)


def test_detail_of_half_the_contrast_is_the_closed_form() -> None:
    """c = v / 2 and u = v / 4 give 2 c / (u + v) = 0.8; nothing of it gives 0, its negative less."""
    truth = _grating(0.4)[None]
    half = detail(_grating(0.2), truth)
    assert half.kept == pytest.approx(0.8, abs=0.01) and half.energy == pytest.approx(0.25, rel=1e-3)
    assert detail(truth[0], truth).kept > 0.99 and detail(1 - truth[0], truth).kept < -0.99
    assert detail(np.full_like(truth[0], 0.5), truth) == pytest.approx((0, 0), abs=1e-6)
    assert detail(truth[0], np.full_like(truth, 0.5)).kept == pytest.approx(0, abs=1e-6)


def test_detail_takes_the_best_draw_at_each_place() -> None:
    """Half of one draw beside half of another keeps all of both, but where they meet."""
    first, second = _grating(0.4, 14), _grating(0.4, 9).transpose(1, 0, 2)
    both = np.concatenate([first[:32], second[32:]])
    assert detail(both, np.stack([first, second])).kept > 0.85
    assert detail(both, first[None]).kept < 0.6


def test_detail_with_a_mask_looks_there_only() -> None:
    truth, mask = _grating(0.4), np.zeros((64, 64), np.float32)
    mask[:, :24] = 1
    spoilt = truth.copy()
    spoilt[:, 40:] = 0.5
    assert detail(spoilt, truth[None], mask).kept > 0.98 > 0.75 > detail(spoilt, truth[None]).kept


def test_detail_nearby_forgives_a_pixel() -> None:
    truth = render(sample_scene(3)).image_HW3
    moved, twice = np.roll(truth, 1, axis=1), np.roll(truth, (2, 2), axis=(0, 1))
    assert detail_nearby(moved, truth[None]).kept == pytest.approx(detail(truth, truth[None]).kept, abs=0.02)
    assert detail(moved, truth[None]).kept < 0.75
    assert detail_nearby(twice, truth[None]).kept < 0.75


def test_hf_ratio_falls_with_blur_and_rises_with_noise() -> None:
    truth, rng = truths_of(1).draws["halftone"][0], np.random.default_rng(0)
    ratios = [hf_ratio(disturbed(truth, rng, blur, 0.0, 0.0), truth) for blur in (0.3, 0.6, 1.0, 1.5)]
    assert hf_ratio(truth, truth) == 1
    assert 1 > ratios[0] > ratios[1] > ratios[2] > ratios[3]
    assert ratios[3] < 0.3
    assert hf_ratio(truth + rng.normal(0, 0.1, truth.shape).astype(np.float32), truth) > 1.2


def test_as_image_scales_bytes_and_refuses_other_shapes() -> None:
    assert as_image(np.full((4, 4, 3), 51, np.uint8)) == pytest.approx(0.2)
    assert as_image(np.full((4, 4, 3), 0.3)).dtype == np.float32
    with pytest.raises(ValueError, match=r"\(H, W, 3\)"):
        as_image(np.zeros((4, 4)))


# ---------------------------------------------------------------- the distance


def _quantile_bins(values: np.ndarray, bins: int = 32) -> np.ndarray:
    edges = np.linspace(0, len(values), bins + 1).astype(int)
    ordered = np.sort(values)
    return np.array([ordered[a:b].mean() for a, b in zip(edges[:-1], edges[1:], strict=True)])


def test_image_distance_parts_match_plain_wasserstein_reference() -> None:
    """Place and colour recomputed plainly; of the patches, their blindness to flat colour."""
    a, b = _pair(5)
    gap = np.abs(np.subtract(*embed(np.stack([a, b]))))
    place_a, place_b = (image.reshape(16, 4, 16, 4, 3).mean(axis=(1, 3)) for image in (a, b))
    assert gap[:768].sum() == pytest.approx(PLACE_WEIGHT * np.abs(place_a - place_b).mean(), rel=1e-4)
    half_a, half_b = (image.reshape(32, 2, 32, 2, 3).mean(axis=(1, 3)).reshape(-1, 3) for image in (a, b))
    plain = [np.abs(_quantile_bins(half_a @ c) - _quantile_bins(half_b @ c)).mean() for c in random_directions()[1].T]
    assert gap[768:1024].sum() == pytest.approx(COLOR_WEIGHT * np.mean(plain), rel=1e-3)
    flat = embed(np.stack([np.full((64, 64, 3), v, np.float32) for v in (0.2, 0.7)]))
    assert np.abs(flat[:, 1024:]).max() < 1e-6


def test_image_distance_patches_ignore_where_things_are() -> None:
    """Shifting a periodic texture by half a cell moves everything and changes neither colours nor patches."""
    truth = np.tile(np.random.default_rng(0).uniform(0, 1, (16, 16, 3)).astype(np.float32), (4, 4, 1))
    moved = np.roll(truth, (8, 8), (0, 1))
    gap = np.abs(np.subtract(*embed(np.stack([truth, moved]))))
    assert gap[768:1024].sum() < 1e-6 < 0.04 < gap[:768].sum()
    assert gap[1024:].sum() < 0.05 * np.abs(embed(np.stack([truth]))[0, 1024:]).sum()


def test_image_distance_is_a_metric_on_images() -> None:
    a, b = _pair(6)
    c = render(sample_scene(7)).image_HW3
    assert image_distance(a, a) == 0
    assert image_distance(a, b) == pytest.approx(image_distance(b, a), rel=1e-5)
    assert image_distance(a, c) <= image_distance(a, b) + image_distance(b, c)


def test_embed_refuses_odd_sizes_and_values_that_are_not_finite() -> None:
    with pytest.raises(ValueError, match="multiple of 64"):
        embed(np.zeros((1, 60, 60, 3), np.float32))
    image = np.zeros((1, 64, 64, 3), np.float32)
    image[0, 3, 3, 0] = np.nan
    with pytest.raises(ValueError, match="not finite"):
        embed(image)


# ---------------------------------------------------------------- distributions


@pytest.mark.parametrize("effect", ["snow", "duotone", "hat"])
def test_distribution_distance_shows_collapse(effect: str) -> None:
    truths = truths_of(1)
    draws = truths.fresh_draws(effect, 24)
    fresh = distribution_distance(truths.fresh_draws(effect, 12, first=500), draws)
    mode = distribution_distance(np.repeat(draws[:1], 12, axis=0), draws)
    mean = distribution_distance(np.repeat(draws.mean(0, keepdims=True), 12, axis=0), draws)
    assert abs(fresh) < 0.15
    assert mode > 0.5
    assert mean > 0.3
    assert truths.energy_distance(truths.fresh_draws(effect, 12, first=500), effect) < 0.15


def test_distribution_distance_matches_plain_energy_distance() -> None:
    draws = truths_of(1).fresh_draws("duotone", 6)
    x, y = draws[:3], draws[3:]

    def mean(a: np.ndarray, b: np.ndarray, same: bool) -> float:
        values = [image_distance(p, q) for i, p in enumerate(a) for j, q in enumerate(b) if not (same and i == j)]
        return float(np.mean(values))

    expected = (2 * mean(x, y, False) - mean(x, x, True) - mean(y, y, True)) / mean(y, y, True)
    assert distribution_distance(x, y) == pytest.approx(expected, rel=1e-3, abs=1e-4)
    with pytest.raises(ValueError, match="at least two"):
        distribution_distance(x[:1], y)
    with pytest.raises(ValueError, match="no randomness"):
        distribution_distance(x, np.repeat(y[:1], 3, axis=0))

"""The exact metrics against plain references, and the verdicts on images whose fate is known."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest

from clora.tiny.effects import EFFECTS
from clora.tiny.metrics import (
    Truths,
    ambiguous,
    as_image,
    bad_case,
    bad_cases,
    distribution_distance,
    disturbed,
    embed,
    hf_energy,
    hf_ratio,
    image_distance,
    l1,
    psnr,
    ssim,
    ssim_map,
    subject_structure,
    vsa,
)
from clora.tiny.scenes import render, sample_scene

FEW = (
    "sepia",
    "invert",
    "halftone",
    "upside_down",
    "close_up",
    "snow",
    "duotone",
    "hat",
    "puzzle",
    "neon_edges",
)
RANDOM = ("snow", "duotone", "hat", "puzzle", "neon_edges")


@functools.cache
def truths_of(seed: int) -> Truths:
    return Truths(seed, FEW)


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
    """Place and colour recomputed plainly; of the patches their blindness to flat colour."""
    a, b = _pair(5)
    fa, fb = embed(np.stack([a, b]))
    place_a, place_b = (image.reshape(16, 4, 16, 4, 3).mean(axis=(1, 3)) for image in (a, b))
    assert np.abs(fa - fb)[:768].sum() == pytest.approx(np.abs(place_a - place_b).mean(), rel=1e-4)
    directions = np.abs(fa - fb)[768 : 768 + 256].reshape(8, 32).mean(axis=1)
    from clora.tiny.metrics import _projections

    colors = _projections()[1]
    half_a, half_b = (image.reshape(32, 2, 32, 2, 3).mean(axis=(1, 3)).reshape(-1, 3) for image in (a, b))
    plain = [np.abs(_quantile_bins(half_a @ c) - _quantile_bins(half_b @ c)).mean() for c in colors.T]
    assert directions * 32 == pytest.approx(np.array(plain) * 32 / 8, rel=1e-3)
    flat = embed(np.stack([np.full((64, 64, 3), v, np.float32) for v in (0.2, 0.7)]))
    assert np.abs(flat[:, 1024:]).max() < 1e-6


def test_image_distance_patches_ignore_where_things_are() -> None:
    """Shifting a periodic texture by half a cell moves everything and changes neither colours nor patches."""
    truth = np.tile(np.random.default_rng(0).uniform(0, 1, (16, 16, 3)).astype(np.float32), (4, 4, 1))
    moved = np.roll(truth, (8, 8), (0, 1))
    gap = np.abs(np.subtract(*embed(np.stack([truth, moved]))))
    assert gap[768:1024].sum() < 1e-6 < 0.05 < gap[:768].sum()
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
        values = [
            image_distance(p, q) for i, p in enumerate(a) for j, q in enumerate(b) if not (same and i == j)
        ]
        return float(np.mean(values))

    expected = (2 * mean(x, y, False) - mean(x, x, True) - mean(y, y, True)) / mean(y, y, True)
    assert distribution_distance(x, y) == pytest.approx(expected, rel=1e-3, abs=1e-4)
    with pytest.raises(ValueError, match="at least two"):
        distribution_distance(x[:1], y)
    with pytest.raises(ValueError, match="no randomness"):
        distribution_distance(x, np.repeat(y[:1], 3, axis=0))


# ---------------------------------------------------------------- truths and verdicts


def test_truths_hold_distinct_draws_and_all_outcomes_of_a_finite_effect() -> None:
    truths = truths_of(1)
    assert len(truths.draws["sepia"]) == 1
    assert len(truths.draws["snow"]) == 32
    assert len(truths.draws["neon_edges"]) == 5  # one per colour
    assert len({draw.tobytes() for draw in truths.draws["hat"]}) == len(truths.draws["hat"])
    again = Truths(1, ["snow"], num_draws=4)
    assert np.array_equal(again.draws["snow"], truths.draws["snow"][:4])
    with pytest.raises(ValueError, match="no_such_effect"):
        Truths(1, ["no_such_effect"])


@pytest.mark.parametrize("effect", FEW)
def test_bad_case_of_known_images(effect: str) -> None:
    """Disturbed fresh truths are good; the source, noise and another effect's truth are bad."""
    truths, rng = truths_of(1), np.random.default_rng(0)
    for draw in truths.fresh_draws(effect, 3, first=100):
        for image in (draw, disturbed(draw, rng, 0.6, 0.02, 0.04)):
            verdict = bad_case(image, truths, effect)
            assert (verdict.bad, verdict.nearest, verdict.reason) == (False, effect, "")
    untouched = bad_case(truths.rendered.image_HW3, truths, effect)
    assert untouched.bad and untouched.reason == "untouched" and untouched.nearest == "source"
    noise = rng.uniform(0, 1, (64, 64, 3)).astype(np.float32)
    assert bad_case(noise, truths, effect).bad
    other = "invert" if effect != "invert" else "sepia"
    verdict = bad_case(truths.draws[other][0], truths, effect)
    assert verdict.bad and verdict.nearest == other and verdict.reason == "wrong effect"


@pytest.mark.parametrize("effect", RANDOM)
@pytest.mark.parametrize("seed", [1, 2])
def test_bad_case_of_a_blurred_mean_of_outcomes(effect: str, seed: int) -> None:
    """What a regression learns, the mean outcome, is bad; so is that mean blurred, or half way to it."""
    truths, rng = truths_of(seed), np.random.default_rng(0)
    fresh = truths.fresh_draws(effect, 32, first=100)
    mean = fresh.mean(axis=0)
    for image in (mean, disturbed(mean, rng, 1.0, 0.01, 0.02), 0.6 * mean + 0.4 * fresh[0]):
        assert bad_case(image, truths, effect).bad


def test_bad_case_of_a_colour_that_no_outcome_has_is_mixed() -> None:
    truths = truths_of(1)
    first, second = truths.draws["hat"][:2]
    inside = np.abs(first - second).max(axis=-1, keepdims=True) > 0.1
    green = np.where(inside, np.float32([0.1, 0.9, 0.1]), first)
    verdict = bad_case(green, truths, "hat")
    assert verdict.bad and (verdict.reason, verdict.nearest) == ("mixed", "hat")


def test_bad_case_too_far_although_nearest() -> None:
    truths = truths_of(1)
    truth = truths.draws["halftone"][0]
    verdict = bad_case(
        np.clip(truth + 0.25 * (np.indices((64, 64)).sum(0)[..., None] % 2), 0, 1), truths, "halftone"
    )
    assert verdict.bad and (verdict.reason, verdict.nearest) == ("too far", "halftone")
    assert verdict.distance > truths.calibration("halftone").far


def test_bad_cases_agree_with_one_at_a_time() -> None:
    truths = truths_of(2)
    images = np.concatenate([truths.draws["snow"][:2], truths.draws["sepia"]])
    together = bad_cases(images, truths, "snow")
    for image, verdict in zip(images, together, strict=True):
        alone = bad_case(image, truths, "snow")
        assert alone._replace(distance=0) == verdict._replace(distance=0)
        assert alone.distance == pytest.approx(verdict.distance, abs=1e-5)
    with pytest.raises(ValueError, match="zombie"):
        bad_cases(images, truths, "zombie")


def test_ambiguous_names_effects_that_change_nothing() -> None:
    """A class whose truth equals another's cannot be judged: turn the truth of one effect into the source."""
    truths = Truths(1, ["sepia", "snow"])
    assert not ambiguous(truths, "sepia") and not ambiguous(truths, "snow")
    twin = Truths(1, ["sepia", "snow"])
    start = twin.names.index("snow")
    features = twin._all_features.copy()
    features[twin._starts[start]] = twin.features["sepia"][0]  # snow can now look exactly like sepia
    features[0] = twin.features["sepia"][0]
    twin._all_features = features
    assert ambiguous(twin, "sepia") and not ambiguous(twin, "snow")


# ---------------------------------------------------------------- subject alignment


@pytest.mark.parametrize("effect", ["sepia", "upside_down", "close_up", "hat", "neon_edges"])
def test_vsa_is_full_for_truths_and_falls_with_blur(effect: str) -> None:
    truths, rng = truths_of(1), np.random.default_rng(0)
    truth = truths.fresh_draws(effect, 1, first=300)[0]
    scores = [
        subject_structure(disturbed(truth, rng, blur, 0, 0), truths, effect) for blur in (0.3, 0.7, 1.2, 2, 4)
    ]
    assert vsa(truth, truths, effect) > 4.8
    assert all(a > b for a, b in zip(scores, scores[1:], strict=False))
    assert scores[-1] < 0.6 * scores[0]


def test_vsa_is_zero_where_the_effect_failed() -> None:
    truths = truths_of(1)
    assert vsa(truths.rendered.image_HW3, truths, "sepia") == 0
    assert subject_structure(truths.rendered.image_HW3, truths, "sepia") > 3


def test_vsa_looks_at_the_subject_only() -> None:
    """Spoiling the background costs nothing, spoiling the subject does."""
    truths, rng = truths_of(1), np.random.default_rng(0)
    truth = truths.draws["sepia"][0]
    mask = truths.rendered.subject_HW[..., None]
    soft = np.clip(truth + rng.normal(0, 0.1, truth.shape), 0, 1).astype(np.float32)
    kept = subject_structure(truth + (1 - mask) ** 4 * (soft - truth), truths, "sepia")
    lost = subject_structure(truth + mask * (soft - truth), truths, "sepia")
    assert kept > lost + 0.5


@pytest.mark.parametrize("effect", ["upside_down", "sepia"])
def test_subject_mask_follows_the_subject(effect: str) -> None:
    truths = truths_of(1)
    expected = truths.rendered.subject_HW[::-1] if effect == "upside_down" else truths.rendered.subject_HW
    found = truths.subject_mask(effect, 0)
    overlap = np.minimum(found, expected).sum() / np.maximum(found, expected).sum()
    assert overlap > 0.9


# ---------------------------------------------------------------- the calibration


def _nearest_share(seeds: range, effects: list[str] | None) -> tuple[float, float, float]:
    """Shares of fresh and of disturbed truths nearest to their own class, and of mean outcomes judged bad."""
    right: dict[str, list[bool]] = {"fresh": [], "disturbed": [], "mean": []}
    for seed in seeds:
        truths, rng = Truths(seed, effects), np.random.default_rng(seed)
        for effect in truths.names[1:]:
            fresh = truths.fresh_draws(effect, 2 if truths.is_random(effect) else 1, first=100)
            soft = [disturbed(image, rng, 0.6, 0.02, 0.04) for image in fresh]
            right["fresh"] += [v.nearest == effect for v in bad_cases(fresh, truths, effect)]
            right["disturbed"] += [v.nearest == effect for v in bad_cases(np.stack(soft), truths, effect)]
            if truths.is_random(effect):
                mean = truths.fresh_draws(effect, 24, first=200).mean(axis=0)
                right["mean"].append(bad_case(mean, truths, effect).bad)
    return float(np.mean(right["fresh"])), float(np.mean(right["disturbed"])), float(np.mean(right["mean"]))


def test_truths_are_told_apart_on_one_source() -> None:
    fresh, soft, mean = _nearest_share(range(70100, 70101), None)
    assert len(EFFECTS) >= 50
    assert fresh >= 0.99 and soft >= 0.97 and mean >= 0.97


@pytest.mark.slow
def test_truths_are_told_apart_on_many_sources() -> None:
    fresh, soft, mean = _nearest_share(range(70100, 70106), None)
    assert fresh >= 0.995 and soft >= 0.98 and mean >= 0.98

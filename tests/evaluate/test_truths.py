"""Verdicts of the tiny world on images whose fate is known, and the calibration over every effect."""

from __future__ import annotations

import functools

import numpy as np
import pytest

from clora.evaluate.metrics.image import disturbed
from clora.evaluate.truths import Truths, ambiguous, bad_case, bad_cases, subject_structure, vsa
from clora.tiny.effects import EFFECTS

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


def _mosaic(image: np.ndarray, size: int) -> np.ndarray:
    blocks = image.reshape(64 // size, size, 64 // size, size, 3).mean(axis=(1, 3))
    return blocks.repeat(size, axis=0).repeat(size, axis=1)


@pytest.mark.parametrize("effect", sorted(set(FEW) - {"close_up", "puzzle"}))  # soft, and blocky, themselves
def test_bad_cases_soft_pictures_are_bad(effect: str) -> None:
    """A blur of 1.5 pixels, a mosaic of 4: near the truth by D, but without its detail."""
    truths, rng = truths_of(1), np.random.default_rng(0)
    truth = truths.fresh_draws(effect, 1, first=100)[0]
    for spoilt in (disturbed(truth, rng, 1.5, 0, 0), _mosaic(truth, 4)):
        verdict = bad_case(spoilt, truths, effect)
        assert verdict.bad and verdict.nearest == effect
    kinder = disturbed(truth, rng, 0.8, 0, 0)
    assert bad_case(kinder, truths, effect).reason == ""


def test_bad_cases_say_soft_or_noisy() -> None:
    truths, rng = truths_of(1), np.random.default_rng(0)
    truth = truths.draws["sepia"][0]
    assert bad_case(disturbed(truth, rng, 1.5, 0, 0), truths, "sepia").reason == "soft"
    noisy = [disturbed(truth, rng, 0.01, noise, 0) for noise in (0.03, 0.06, 0.07, 0.08, 0.09, 0.1)]
    reasons = [verdict.reason for verdict in bad_cases(np.stack(noisy), truths, "sepia")]
    assert reasons[0] == "" and "noisy" in reasons and "soft" not in reasons and reasons[-1] != ""


@pytest.mark.parametrize("effect", ["sepia", "close_up", "snow", "hat"])
def test_bad_cases_forgive_a_pixel(effect: str) -> None:
    truths = truths_of(1)
    truth = truths.fresh_draws(effect, 1, first=100)[0]
    moved = np.concatenate([truth[:, :1], truth[:, :-1]], axis=1)
    assert bad_case(moved, truths, effect).reason == ""


@pytest.mark.parametrize("effect", ["duotone", "hat"])
def test_bad_cases_thirty_percent_of_the_way_to_the_mean_are_bad(effect: str) -> None:
    truths = truths_of(1)
    mean = truths.fresh_draws(effect, 24, first=200).mean(axis=0)
    clean = truths.fresh_draws(effect, 4, first=100)
    assert all(verdict.bad for verdict in bad_cases(0.7 * clean + 0.3 * mean, truths, effect))
    assert not any(verdict.bad for verdict in bad_cases(clean, truths, effect))


def test_bad_case_of_a_colour_that_no_outcome_has_is_mixed() -> None:
    truths = truths_of(1)
    first, second = truths.draws["hat"][:2]
    inside = np.abs(first - second).max(axis=-1, keepdims=True) > 0.1
    green = np.where(inside, 0.5 * first + np.float32([0.05, 0.45, 0.05]), first)
    verdict = bad_case(green, truths, "hat")
    assert verdict.bad and (verdict.reason, verdict.nearest) == ("mixed", "hat")


@pytest.mark.parametrize("effect", ["sepia", "upside_down"])
def test_bad_case_too_far_although_nearest(effect: str) -> None:
    truths, rng = truths_of(1), np.random.default_rng(0)
    truth = truths.draws[effect][0]
    for spoilt in (disturbed(truth, rng, 0.3, 0.25, 0), disturbed(truth, rng, 4.5, 0, 0)):
        verdict = bad_case(spoilt, truths, effect)
        assert verdict.bad and (verdict.reason, verdict.nearest) == ("too far", effect)
        assert verdict.distance > truths.calibration(effect).far


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
    scores = [subject_structure(disturbed(truth, rng, blur, 0, 0), truths, effect) for blur in (0.3, 0.7, 1.2, 2, 4)]
    assert vsa(truth, truths, effect) > 4.8
    assert all(a > b for a, b in zip(scores, scores[1:], strict=False))
    assert scores[-1] < 0.8 * scores[0]


@pytest.mark.parametrize("effect", ["oil_paint", "rain"])
def test_vsa_does_not_saturate_for_soft_random_effects(effect: str) -> None:
    """Strokes that fall anywhere: a smooth picture is near to some draw at each place, and still keeps no detail."""
    truths, rng = Truths(1, ["oil_paint", "rain"]), np.random.default_rng(0)
    truth = truths.fresh_draws(effect, 1, first=300)[0]
    sharp, soft, softer = (
        subject_structure(disturbed(truth, rng, blur, 0, 0), truths, effect) for blur in (0.1, 1.5, 2)
    )
    assert sharp > 3.5 and soft < 3 and softer < 2


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
    assert overlap > 0.85


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


def test_truths_of_look_alikes_are_told_apart() -> None:
    """Effects most like each other: scattered overlays, warm tones, outlines, reshuffled pictures."""
    alike = ["confetti", "balloons", "bubbles", "hearts", "sunglasses", "hat", "inset", "oil_paint", "sepia",
             "grayscale", "duotone", "pencil_sketch", "chalkboard", "puzzle", "triptych", "snow"]  # fmt: skip
    fresh, soft, mean = _nearest_share(range(70100, 70101), alike)
    assert fresh == 1 and soft >= 0.95 and mean == 1


@pytest.mark.slow
def test_truths_are_told_apart_among_all_effects() -> None:
    assert len(EFFECTS) >= 50
    fresh, soft, mean = _nearest_share(range(70100, 70101), None)
    assert fresh >= 0.995 and soft >= 0.98 and mean >= 0.98

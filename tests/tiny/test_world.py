"""The tiny world: scenes, effects, generic edits and the dataset on disk."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clora.tiny.dataset import effect_names, write_effect_pairs, write_general
from clora.tiny.edits import COLOURS, EDITS, PLACES, blur
from clora.tiny.effects import EFFECTS, apply_effect
from clora.tiny.instructions import generic_edit, leave_open
from clora.tiny.world.filters import sample
from clora.tiny.world.scenes import render, sample_scene

RENDERED = [render(sample_scene(seed)) for seed in range(6)]


def draw(name: str, scene: int, seed: int) -> np.ndarray:
    return apply_effect(EFFECTS[name], RENDERED[scene], np.random.default_rng(seed))


def test_render_is_deterministic_and_in_range() -> None:
    for seed in range(4):
        first, second = render(sample_scene(seed)), render(sample_scene(seed))
        assert np.array_equal(first.image_HW3, second.image_HW3)
        assert first.image_HW3.shape == (64, 64, 3) and first.image_HW3.dtype == np.float32
        assert first.image_HW3.min() >= 0 and first.image_HW3.max() <= 1
    assert not np.array_equal(RENDERED[0].image_HW3, RENDERED[1].image_HW3)


def test_render_shows_the_background_outside_the_subject() -> None:
    for rendered in RENDERED:
        outside = rendered.subject_HW < 1e-3
        assert 0.1 < outside.mean() < 0.95
        np.testing.assert_allclose(rendered.image_HW3[outside], rendered.background_HW3[outside], atol=1e-3)


def test_sample_scene_obeys_its_kind() -> None:
    assert {sample_scene(seed, "animal").kind for seed in range(20)} == {"animal"}
    assert {sample_scene(seed).kind for seed in range(20)} == {"animal", "portrait"}


def test_effects_are_many_and_often_random() -> None:
    assert len(EFFECTS) >= 50
    assert sum(effect.random for effect in EFFECTS.values()) >= 20
    assert len({effect.student_prompt for effect in EFFECTS.values()}) == len(EFFECTS)


def test_effects_share_teacher_prompts() -> None:
    shared = [count for count in Counter(effect.prompt for effect in EFFECTS.values()).values() if count >= 3]
    assert sum(shared) >= len(EFFECTS) / 2


@pytest.mark.parametrize("name", EFFECTS)
def test_apply_effect_is_random_exactly_where_it_says(name: str) -> None:
    first, again, other = draw(name, 0, 0), draw(name, 0, 0), draw(name, 0, 1)
    assert first.shape == (64, 64, 3) and first.dtype == np.float32 and first.min() >= 0 and first.max() <= 1
    assert np.array_equal(first, again)
    others = [draw(name, 0, seed) for seed in range(1, 6)]
    assert any(not np.array_equal(first, one) for one in others) == EFFECTS[name].random
    assert np.abs(other - RENDERED[0].image_HW3).mean() > 0.01  # an effect is no identity


def test_effects_differ_from_each_other() -> None:
    names = [name for name, effect in EFFECTS.items() if not effect.random]
    images = np.stack([np.stack([draw(name, scene, 0) for scene in range(6)]) for name in names])
    for i, name in enumerate(names):
        distance = np.abs(images - images[i]).mean(axis=(1, 2, 3, 4))
        distance[i] = np.inf
        assert distance.min() > 0.04, f"{name} is nearly {names[int(distance.argmin())]}"


def test_random_effects_have_distinct_outcomes() -> None:
    """The mean of the outcomes is far from every outcome: regression to the mean would show."""
    spread = {}
    for name, effect in EFFECTS.items():
        if effect.random:
            draws = np.stack([draw(name, 1, seed) for seed in range(12)])
            spread[name] = float(np.abs(draws - draws.mean(0)).mean())
    assert np.median(list(spread.values())) > 0.05


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.__name__)
def test_generic_edits_say_what_they_do(edit: object) -> None:
    for seed in range(5):
        text, image = edit(RENDERED[seed], np.random.default_rng(seed))  # type: ignore[operator]
        assert text and text == text.strip() and image.shape == (64, 64, 3) and np.isfinite(image).all()


def test_generic_edits_are_those_that_the_base_was_trained_on() -> None:
    """Three seeds of each edit against what it was then: its words, and a weighted mean of its picture."""
    kept = json.loads(Path(__file__).with_name("generic_edits.json").read_text())
    assert list(kept) == [edit.__name__ for edit in EDITS]
    weights = np.random.default_rng(0).random((64, 64, 3))
    for edit in EDITS:
        for seed, (words, mean) in enumerate(kept[edit.__name__]):
            text, image = edit(RENDERED[seed], np.random.default_rng(seed))
            assert text == words and float((image * weights).mean()) == pytest.approx(mean, abs=2e-6), edit.__name__


def test_generic_edits_are_no_effects() -> None:
    """No instruction of the base's training is a prompt of an effect."""
    prompts = {e.prompt for e in EFFECTS.values()} | {e.student_prompt for e in EFFECTS.values()}
    drawn = {generic_edit(RENDERED[0], np.random.default_rng(seed))[0] for seed in range(400)}
    drawn |= {leave_open(text) for text in drawn}
    assert len(drawn) > 150 and not drawn & prompts


def test_generic_edit_with_open_choices_shows_the_same_image_and_names_nothing() -> None:
    named = {*COLOURS, *PLACES, "left", "right", "up", "down", "horizontal", "vertical", "diagonal", "slanted"}
    for seed in range(300):
        text, image = generic_edit(RENDERED[0], np.random.default_rng(seed))
        opened, same = generic_edit(RENDERED[0], np.random.default_rng(seed), open_share=1.0)
        np.testing.assert_array_equal(same, image)
        assert opened == leave_open(text) and not named & set(opened.split()), opened
    outcomes = {image[0, 0].tobytes() for image in _outcomes("tint the image any color")}
    assert len(outcomes) > 4


def _outcomes(instruction: str) -> list[np.ndarray]:
    draws = (generic_edit(RENDERED[0], np.random.default_rng(seed), open_share=1.0) for seed in range(600))
    return [image for text, image in draws if text == instruction]


def test_sample_reads_pixel_centres_exactly() -> None:
    image = np.random.default_rng(0).random((8, 8, 3)).astype(np.float32)
    axis = (np.arange(8, dtype=np.float32) + 0.5) / 8
    x, y = np.meshgrid(axis, axis)
    np.testing.assert_allclose(sample(image, x, y), image, atol=1e-6)
    np.testing.assert_allclose(sample(image, 1 - x, y), image[:, ::-1], atol=1e-5)


def test_blur_keeps_the_mean_and_a_constant() -> None:
    constant = np.full((16, 16, 3), 0.3, np.float32)
    np.testing.assert_allclose(blur(constant, 2.0), constant, atol=1e-6)
    point = np.zeros((33, 33, 1), np.float32)
    point[16, 16] = 1
    blurred = blur(point, 2.0)
    assert blurred.sum() == pytest.approx(1, abs=1e-5)
    assert blurred[16, 18, 0] / blurred[16, 16, 0] == pytest.approx(np.exp(-0.5), rel=1e-4)


def test_effect_names_are_nested_and_mixed() -> None:
    twelve, fifty = effect_names(12), effect_names(50)
    assert fifty[:12] == twelve and len(set(fifty)) == 50
    assert 3 <= sum(EFFECTS[name].random for name in twelve) <= 9
    with pytest.raises(ValueError, match="effects, not"):
        effect_names(1000)


def test_write_effect_pairs_writes_what_apply_effect_draws(tmp_path: Path) -> None:
    write_effect_pairs(tmp_path / "sepia", "sepia", 2)
    source = np.asarray(Image.open(tmp_path / "sepia" / "source" / "001.png"), np.float32) / 255
    target = np.asarray(Image.open(tmp_path / "sepia" / "target" / "001.png"), np.float32) / 255
    assert source.shape == target.shape == (64, 64, 3)
    assert np.abs(target[..., 0] - target[..., 2]).mean() > 0.05  # brown, whatever the source was


def test_write_general_has_instructions_for_every_image(tmp_path: Path) -> None:
    write_general(tmp_path, 3, instructions=2)
    rows = [json.loads(line) for line in (tmp_path / "metadata.jsonl").read_text().splitlines()]
    assert len(rows) == 6
    assert all((tmp_path / row["source_images"][0]).exists() and row["prompt"] for row in rows)

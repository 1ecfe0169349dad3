"""Exact verdicts in a benchmark: those of the metrics themselves, on truths, sources and other effects' results."""

import numpy as np
import pytest
import yaml
from PIL import Image

from clora.errors import InputErrors
from clora.evaluate import exact_bench
from clora.evaluate.exact_bench import exact_verdicts
from clora.evaluate.metrics.image import as_image, psnr
from clora.evaluate.truths import Truths, vsa
from clora.jobs.eval_bench import evaluate_benchmark
from clora.tiny.effects import EFFECTS, apply_effect, find_effect
from clora.tiny.images import to_uint8
from clora.tiny.world.scenes import render, sample_scene
from tests.evaluate.test_bench_rows import read_rows

SCENE = 70_001
FEW = ("sepia", "upside_down", "snow", "grayscale")
PAIR = "sepia + snow"


def few_truths(seed, effects, size=64):
    """The world's truths are 76 classes and twenty seconds; these are enough to be mistaken among."""
    return Truths(seed, [*FEW, *(name for name in effects if name not in EFFECTS)], size=size)


def draw(name, seed=0):
    return to_uint8(apply_effect(find_effect(name), render(sample_scene(SCENE)), np.random.default_rng(seed)))


def save(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def bench(tmp_path, monkeypatch):
    monkeypatch.setattr(exact_bench, "Truths", few_truths)
    source = to_uint8(render(sample_scene(SCENE)).image_HW3)
    save(tmp_path / f"scenes/{SCENE}.png", source)
    effects = ["sepia", PAIR]
    for effect, made in (("sepia", {"right": "sepia", "other": "grayscale"}), (PAIR, {"right": PAIR, "other": "snow"})):
        for method, name in made.items():
            save(tmp_path / f"{method}/any/{effect}/{SCENE}.png", draw(name, 5))
        save(tmp_path / f"untouched/any/{effect}/{SCENE}.png", source)
    path = tmp_path / "bench.yaml"
    values = {
        "output_dir": "out",
        "exact": True,
        "effects": [{"name": name, "instruction": "i"} for name in effects],
        "images": {"any": "scenes"},
        "methods": [{"name": name, "images": name} for name in ("right", "other", "untouched")],
    }
    path.write_text(yaml.safe_dump(values))
    return path


def test_evaluate_benchmark_with_the_truth_known(tmp_path, bench):
    answer = evaluate_benchmark(bench)
    right, other, untouched = answer["methods"]
    assert (right["bcr"], other["bcr"], untouched["bcr"]) == (0.0, 1.0, 1.0)
    assert other["differences"]["bcr"]["mean"] == 1.0 and other["vsa"] == 0.0
    rows = {(row.method, row.effect): row for row in read_rows(tmp_path / "out/rows.csv")}
    assert rows["other", "sepia"].why == "wrong effect" and rows["other", PAIR].why == "wrong effect"
    assert rows["untouched", "sepia"].why == "untouched"
    truths, picture = few_truths(SCENE, [PAIR]), as_image(draw("sepia"))
    row = rows["right", "sepia"]
    assert row.vsa == pytest.approx(vsa(picture, truths, "sepia"))
    assert row.psnr_truth == pytest.approx(min(psnr(picture, truths.draws["sepia"][0]), 60))
    assert row.detail_db == pytest.approx(0, abs=0.1) and row.judge == "exact"
    assert rows["right", PAIR].psnr_truth is None  # has many outcomes
    assert "the tiny world&#39;s truth is known" in (tmp_path / "out/report.html").read_text()


def test_exact_verdicts_swapped_pictures_swap_their_verdicts(tmp_path, bench):
    """Two results changed places: both are bad, so that a mix-up of files cannot hide."""
    first, second = (tmp_path / f"right/any/{effect}/{SCENE}.png" for effect in ("sepia", PAIR))
    kept = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(kept)
    assert evaluate_benchmark(bench)["methods"][0]["bcr"] == 1.0


def test_exact_verdicts_of_an_ambiguous_truth_are_missing(tmp_path, bench, monkeypatch):
    monkeypatch.setattr(exact_bench, "ambiguous", lambda truths, effect: effect == PAIR)
    one = evaluate_benchmark(bench)["methods"][1]
    assert (one["missing"], one["bcr"], one["bcr_bounds"]) == (1, 1.0, (0.5, 1.0))


def test_check_scenes_names_every_picture_and_effect_that_is_not_of_the_world(tmp_path, bench):
    save(tmp_path / "scenes/boat.png", draw("snow"))
    save(tmp_path / f"scenes/{SCENE + 1}.png", draw("snow"))
    text = bench.read_text().replace("name: sepia\n", "name: sepla\n")
    for method in ("right", "other", "untouched"):
        for effect in ("sepla", PAIR):
            for key in ("boat", SCENE, SCENE + 1):
                save(tmp_path / f"{method}/any/{effect}/{key}.png", draw("snow"))
    bench.write_text(text)
    with pytest.raises(InputErrors) as caught:
        evaluate_benchmark(bench)
    said = "\n".join(caught.value.faults)
    assert len(caught.value.faults) == 3
    assert "boat.png" in said and f"is not scene {SCENE + 1}" in said and "effect sepla" in said


def test_find_effect_applies_two_in_turn():
    rendered = render(sample_scene(SCENE))
    both = apply_effect(find_effect("grayscale + polaroid"), rendered, np.random.default_rng(0))
    grey = rendered._replace(image_HW3=apply_effect(EFFECTS["grayscale"], rendered, np.random.default_rng(0)))
    assert np.array_equal(both, apply_effect(EFFECTS["polaroid"], grey, np.random.default_rng(0)))
    assert find_effect("sepia") is EFFECTS["sepia"] and find_effect(PAIR).random
    for name, says in (("sepia + dust", "no effect"), ("a", "no effect"), ("mirror_half + gold_statue", "moves it")):
        with pytest.raises(ValueError, match=says):
            find_effect(name)


def test_exact_verdicts_need_a_cell_each(bench):
    from clora.evaluate.benchmark import cells, read_benchmark

    found = list(cells(read_benchmark(bench)))
    done = []
    verdicts = exact_verdicts(read_benchmark(bench), found, lambda: done.append(1))
    assert set(verdicts) == set(found) and len(done) == len(found) == 6

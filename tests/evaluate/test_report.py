"""Scores of made-up outputs, and the report they are written into."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clora.data.image_grid import Grid, grid_image, png_data_uri
from clora.evaluate.exact import Outputs, differences, evaluate_methods, evaluate_outputs, score_pair
from clora.evaluate.metrics.image import disturbed, hf_ratio
from clora.evaluate.report import (
    Change,
    Curve,
    MethodRow,
    PhaseRow,
    Report,
    curves_svg,
    difference_table,
    method_table,
    write_report,
)
from clora.evaluate.statistics import Groups, bootstrap_interval, paired_difference
from clora.evaluate.truths import Truths

EFFECTS = ("sepia", "invert", "snow", "duotone")


@pytest.fixture(scope="module")
def truths() -> dict[int, Truths]:
    return {seed: Truths(seed, EFFECTS) for seed in (1, 2)}


def _outputs(truths: dict[int, Truths], kind: str) -> Outputs:
    """Two seeds a pair: fresh truths, softened truths, the source, or one outcome repeated."""
    outputs = {}
    for seed, truth in truths.items():
        rng = np.random.default_rng(seed)
        for effect in EFFECTS:
            images = truth.fresh_draws(effect, 2, first=50)
            if kind == "soft":
                images = np.stack([disturbed(image, rng, 0.6, 0.02, 0.04) for image in images])
            elif kind == "source":
                images = np.stack([truth.rendered.image_HW3] * 2)
            elif kind == "one":
                images = np.stack([images[0]] * 2)
            outputs[effect, seed] = list(images)
    return outputs


def test_evaluate_outputs_of_truths_and_of_the_source(truths: dict[int, Truths]) -> None:
    best = evaluate_outputs(_outputs(truths, "fresh"), truths)
    assert best.bcr == 0 and best.bcr_interval == (0, 0) and best.num_left_out == 0 and best.num_outputs == 16
    assert best.psnr == 60 and best.l1 == 0 and best.ssim == pytest.approx(1, abs=1e-6)
    assert best.vsa > 4.7 and best.hf_ratio == pytest.approx(1, abs=0.25)
    worst = evaluate_outputs(_outputs(truths, "source"), truths)
    assert worst.bcr == 1 and worst.vsa == 0 and worst.reasons == {"untouched": 16}
    assert worst.confusions == {effect: {"source": 4} for effect in EFFECTS}
    assert set(worst.per_effect) == set(EFFECTS)
    assert worst.per_effect["snow"].psnr is None and worst.per_effect["sepia"].energy_distance is None
    assert worst.psnr is not None and worst.psnr < 25


def test_evaluate_outputs_energy_distance_tells_repeated_outcomes(truths: dict[int, Truths]) -> None:
    fresh = evaluate_outputs(_outputs(truths, "fresh"), truths).energy_distance
    one = evaluate_outputs(_outputs(truths, "one"), truths).energy_distance
    assert fresh is not None and one is not None and one > fresh + 0.4


def test_evaluate_outputs_means_over_outputs(truths: dict[int, Truths]) -> None:
    """Half of the outputs of one effect untouched: an eighth of all outputs is bad, half of that effect's."""
    outputs = {key: list(images) for key, images in _outputs(truths, "fresh").items()}
    for seed, truth in truths.items():
        outputs["sepia", seed][1] = truth.rendered.image_HW3
    scores = evaluate_outputs(outputs, truths)
    assert scores.bcr == pytest.approx(1 / 8)
    assert scores.per_effect["sepia"].bcr == 0.5 and scores.per_effect["invert"].bcr == 0
    assert scores.per_effect["sepia"].vsa == pytest.approx(2.5, abs=0.01)
    assert scores.bcr_interval[0] <= 1 / 8 <= scores.bcr_interval[1]
    as_bytes = {key: [np.round(image * 255).astype(np.uint8) for image in images] for key, images in outputs.items()}
    assert evaluate_outputs(as_bytes, truths).bcr == scores.bcr


def test_evaluate_methods_equals_one_method_at_a_time(truths: dict[int, Truths]) -> None:
    methods = {kind: _outputs(truths, kind) for kind in ("soft", "source")}
    together = evaluate_methods(methods, EFFECTS)
    for kind, outputs in methods.items():
        assert together[kind] == evaluate_outputs(outputs, truths)


def test_evaluate_methods_differences_are_to_the_reference(truths: dict[int, Truths]) -> None:
    """None of the reference to itself, exactly none of its equal; the source is worse output by output."""
    kinds = {"collection": "soft", "twin": "soft", "source": "source"}
    scores = evaluate_methods({name: _outputs(truths, kind) for name, kind in kinds.items()}, EFFECTS)
    assert scores["collection"].differences == {} and scores["twin"].reference == "collection"
    assert set(scores["twin"].differences) == {"bcr", "vsa", "detail_error"}
    assert all(change == (0.0, (0.0, 0.0)) for change in scores["twin"].differences.values())
    worse = scores["source"].differences
    for figure in ("bcr", "vsa", "detail_error"):
        gap = getattr(scores["source"], figure) - getattr(scores["collection"], figure)
        assert worse[figure].mean == pytest.approx(gap)
    assert worse["bcr"] == (1.0, (1.0, 1.0)) and worse["vsa"].interval is not None and worse["vsa"].interval[1] < 0
    assert evaluate_methods({"a": _outputs(truths, "soft")}, EFFECTS)["a"].differences == {}
    own = {"source": "twin", "twin": "collection", "collection": "absent"}
    each = evaluate_methods({name: _outputs(truths, kind) for name, kind in kinds.items()}, EFFECTS, reference=own)
    assert {name: row.reference for name, row in each.items()} == {
        "source": "twin",
        "twin": "collection",
        "collection": "",
    }
    assert each["source"].differences == worse and each["collection"].differences == {}


def test_differences_leaves_out_pairs_of_one_method(truths: dict[int, Truths]) -> None:
    soft = _outputs(truths, "soft")
    ours = [score_pair(soft["sepia", 1], truths[1], "sepia"), score_pair(soft["snow", 1], truths[1], "snow")]
    assert differences(ours, ours[:1])["bcr"] == (0.0, None)
    assert differences(ours[1:], ours[:1]) == {}


def test_score_pair_hf_ratio_is_to_the_nearest_draw(truths: dict[int, Truths]) -> None:
    """A draw's detail is exactly right, though the effect's first draw has another amount of it."""
    draws = truths[1].draws["snow"]
    ratios = [hf_ratio(draw, draws[0]) for draw in draws]
    place = int(np.argmax(ratios))
    assert ratios[place] > 1.03
    scores = score_pair([draws[place]], truths[1], "snow")
    assert scores.hf_ratio == pytest.approx((1.0,), rel=1e-6)


def test_evaluate_outputs_refuses_empty_input(truths: dict[int, Truths]) -> None:
    with pytest.raises(ValueError, match="no output"):
        evaluate_outputs({}, truths)
    with pytest.raises(ValueError, match="'sepia' on source 1"):
        evaluate_outputs({("sepia", 1): []}, truths)
    with pytest.raises(ValueError, match="source 9"):
        evaluate_outputs({("sepia", 9): [truths[1].draws["sepia"][0]]}, truths)


def _of_pairs(groups: Sequence[Sequence[float]]) -> Groups:
    """Groups of one factor: each a level of its own."""
    return {(index,): group for index, group in enumerate(groups)}


def test_bootstrap_interval_weighs_outputs_not_pairs() -> None:
    """200 pairs of one bad output and 200 of nine good ones: one output in ten is bad, and not one pair in two."""
    low, high = bootstrap_interval(_of_pairs([[1.0]] * 200 + [[0.0] * 9] * 200))
    assert 0.07 < low < 0.1 < high < 0.13


def test_bootstrap_interval_matches_the_binomial() -> None:
    """400 independent outcomes at 20 %: the interval of the normal approximation; grouping widens it."""
    flags = _of_pairs([[float(i % 5 == 0)] for i in range(400)])
    low, high = bootstrap_interval(flags)
    assert low == pytest.approx(0.2 - 1.96 * 0.02, abs=0.006) and high == pytest.approx(0.2 + 1.96 * 0.02, abs=0.006)
    assert bootstrap_interval(flags) == (low, high)
    wide = bootstrap_interval(_of_pairs([[float(i % 5 == 0)] * 8 for i in range(50)]))
    assert wide[1] - wide[0] > 2 * (high - low)


@pytest.mark.parametrize("axis", [0, 1])
def test_bootstrap_interval_draws_effects_and_sources(axis: int) -> None:
    """40 by 10, where all values of an effect (or of a source) are one: so many of them are what is known."""
    values = np.random.default_rng(axis).normal(0, 1, (40, 10)[axis])
    groups = {(effect, source): [values[(effect, source)[axis]]] for effect in range(40) for source in range(10)}
    low, high = bootstrap_interval(groups)
    alone = bootstrap_interval(_of_pairs([[value] for value in values]))
    assert low == pytest.approx(alone[0], abs=0.05) and high == pytest.approx(alone[1], abs=0.05)
    as_pairs = bootstrap_interval(_of_pairs(list(groups.values())))
    assert high - low > 2.5 * (as_pairs[1] - as_pairs[0])


def test_bootstrap_interval_does_not_draw_a_factor_of_one_level() -> None:
    """Effects on one source: the interval is that over effects. And a crossing with gaps has one too."""
    values = np.random.default_rng(3).normal(0, 1, 30)
    of_effects = bootstrap_interval(_of_pairs([[value] for value in values]))
    assert bootstrap_interval({(effect, "one"): [value] for effect, value in enumerate(values)}) == of_effects
    low, high = bootstrap_interval({(index, index): [value] for index, value in enumerate(values[:3])})
    assert min(values[:3]) <= low < high <= max(values[:3])


def test_paired_difference_matches_the_normal_approximation() -> None:
    """400 pairs: hard pairs are hard for both, so the interval is that of the differences, not of the two means."""
    rng = np.random.default_rng(0)
    hard = rng.normal(0, 5, 400)
    ours = _of_pairs([[float(value)] for value in hard + rng.normal(0.3, 1, 400)])
    reference = _of_pairs([[float(value)] for value in hard])
    mean, interval = paired_difference(ours, reference)
    gaps = np.array([ours[key][0] - reference[key][0] for key in ours])
    spread = 1.96 * gaps.std(ddof=1) / 20
    assert interval is not None and mean == pytest.approx(gaps.mean())
    assert interval[0] == pytest.approx(mean - spread, abs=0.02) and interval[1] == pytest.approx(
        mean + spread, abs=0.02
    )
    apart = bootstrap_interval(ours)
    assert apart[1] - apart[0] > 4 * (interval[1] - interval[0])


def test_paired_difference_draws_whole_pairs() -> None:
    """Four equal outputs a pair say no more than one: the interval is that of the pairs."""
    gaps = np.random.default_rng(1).normal(0, 1, 100)
    one = paired_difference(_of_pairs([[float(gap)] for gap in gaps]), _of_pairs([[0.0]] * 100))
    four = paired_difference(_of_pairs([[float(gap)] * 4 for gap in gaps]), _of_pairs([[0.0] * 4] * 100))
    assert four.mean == pytest.approx(one.mean) and four.interval == pytest.approx(one.interval)


def test_paired_difference_pairs_by_name_not_by_place() -> None:
    ours: Groups = {("sepia", 1): [1.0], ("rain", 1): [0.0]}
    assert paired_difference(ours, {("rain", 1): [0.0], ("sepia", 1): [1.0]}) == (0.0, (0.0, 0.0))


def test_paired_difference_of_equal_methods_and_of_too_little() -> None:
    flags = _of_pairs([[True, False], [False, False], [True, True]])
    assert paired_difference(flags, flags) == (0.0, (0.0, 0.0))
    assert paired_difference(_of_pairs([[True]]), _of_pairs([[False]])) == (1.0, None)
    with pytest.raises(ValueError, match="as many outputs"):
        paired_difference(_of_pairs([[1.0]]), _of_pairs([[1.0, 0.0]]))
    with pytest.raises(ValueError, match="as many outputs"):
        paired_difference(_of_pairs([[1.0], [1.0]]), _of_pairs([[1.0]]))
    with pytest.raises(ValueError, match="at least one output"):
        paired_difference({}, {})


# ---------------------------------------------------------------- the report


def _report(scores: dict[str, MethodRow]) -> Report:
    steps = list(range(1, 401))
    rng = np.random.default_rng(0)
    curves = [
        Curve(panel="teachers", name="flow matching", steps=steps,
              values=[float(0.8 * np.exp(-i / 90) + 0.1 + 0.03 * rng.random()) for i in steps]),
        Curve(panel="distillation", name="TA-FM", steps=steps, values=[0.3 + 1 / (i + 9) for i in steps]),
        Curve(panel="distillation", name="critic", steps=steps, values=[3.0 / i + 0.01 for i in steps]),
    ]  # fmt: skip
    phases = [
        PhaseRow(name="teach 12 effects", seconds=141.2, peak_memory_mb=1432),
        PhaseRow(name="targets", seconds=22.0, peak_memory_mb=1490),
        PhaseRow(name="distil", seconds=263.4, peak_memory_mb=1811, note="40 coarse steps, then 60 full"),
        PhaseRow(name="evaluate", seconds=4.25),
    ]
    return Report(
        title="clora demo: <12> effects in one LoRA", summary="Made-up figures & pictures.",
        methods=list(scores.values()), phases=phases, curves=curves,
        facts={"device": "2 CPU cores", "seed": "0"},
    )  # fmt: skip


def _rows(truths: dict[int, Truths]) -> dict[str, MethodRow]:
    kinds = {"teacher-40x2": ("fresh", 80, 12), "collection": ("soft", 8, 1), "joint-fm+accel": ("one", 8, 2),
             "source": ("source", 0, 0)}  # fmt: skip
    scores = evaluate_methods({name: _outputs(truths, kind) for name, (kind, _, _) in kinds.items()}, EFFECTS)
    return {
        name: MethodRow.from_scores(name, scores[name], nfe=nfe, num_loras=loras, seconds_per_image=0.01 + nfe / 400)
        for name, (_, nfe, loras) in kinds.items()
    }


def _grids(truths: dict[int, Truths]) -> list[Grid]:
    truth, rng = truths[1], np.random.default_rng(0)
    kinds = ("teacher-40x2", "teacher+accel", "joint-fm+accel", "collection")
    rows = []
    for effect in EFFECTS:
        draws = truth.fresh_draws(effect, 4)
        rows.append([truth.rendered.image_HW3, truth.draws[effect][0], *(disturbed(draw, rng) for draw in draws)])
    seeds = [[*truth.fresh_draws(effect, 5)] for effect in ("snow", "duotone")]
    seeds.append([None, *truth.fresh_draws("snow", 4)])
    return [
        Grid("Effects", ["source", "truth", *kinds], list(EFFECTS), rows, "One source, every method."),
        Grid("Several seeds", [f"seed {i}" for i in range(5)], ["snow", "duotone", "a missing picture"], seeds),
    ]


def test_write_report_json_holds_the_promised_keys(truths: dict[int, Truths], tmp_path: Path) -> None:
    write_report(tmp_path / "run", _report(_rows(truths)), _grids(truths))
    data = json.loads((tmp_path / "run" / "report.json").read_text())
    asked = {
        "name",
        "nfe",
        "num_loras",
        "bcr",
        "vsa",
        "detail_error",
        "reference",
        "differences",
        "l1",
        "psnr",
        "hf_ratio",
        "seconds_per_image",
    }
    assert all(asked <= set(method) for method in data["methods"])
    assert [method["name"] for method in data["methods"]][:2] == ["teacher-40x2", "collection"]
    assert data["methods"][-1]["bcr"] == 1 and data["methods"][0]["bcr"] == 0
    assert {"name", "seconds", "peak_memory_mb"} <= set(data["phases"][0])
    assert Report.model_validate(data).phases[2].seconds == 263.4


def test_write_report_html_is_self_contained(truths: dict[int, Truths], tmp_path: Path) -> None:
    grids = _grids(truths)
    page = write_report(tmp_path, _report(_rows(truths)), grids).read_text()
    assert "&lt;12&gt;" in page and "<12>" not in page
    assert "<script" not in page and "<link" not in page and "@import" not in page
    for address in re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?([^"'\s)>]+)""", page):
        assert address.startswith(("data:image/png;base64,", "#")), address
    assert page.count("<img") == sum(image is not None for grid in grids for row in grid.rows for image in row)
    assert "Against collection" in page and "<th>soft</th><th>noisy</th>" in page
    assert page.count("<svg") == 2 and "distillation" in page
    assert len(page) < 1_500_000


def test_png_data_uri_is_the_image_doubled() -> None:
    image = np.random.default_rng(0).integers(0, 256, (8, 6, 3), dtype=np.uint8)
    decoded = Image.open(io.BytesIO(base64.b64decode(png_data_uri(image).split(",")[1])))
    assert np.array_equal(np.asarray(decoded), image.repeat(2, axis=0).repeat(2, axis=1))
    floats = Image.open(io.BytesIO(base64.b64decode(png_data_uri(image / 255.0, 1).split(",")[1])))
    assert np.array_equal(np.asarray(floats), image)


def test_method_table_marks_the_best_as_printed() -> None:
    def row(name: str, bcr: float, hf: float, psnr: float | None) -> MethodRow:
        return MethodRow(name=name, nfe=8, num_loras=1, bcr=bcr, vsa=4.0, hf_ratio=hf, psnr=psnr)

    table = method_table([row("a", 0.1001, 1.25, None), row("b", 0.1002, 0.9, 24.0), row("c", 0.3, 0.5, 22.0)])
    marks = {cell_index: [cells[cell_index].best for cells in table] for cell_index in range(len(table[0]))}
    assert marks[2] == [True, True, False]  # BCR: equal as printed
    assert marks[5] == [False, True, False]  # HF: nearest to 1 by ratio
    assert marks[7] == [False, True, False] and table[0][7].text == "–"  # PSNR: none is never best
    assert marks[0] == [False, False, False]  # all alike: nothing stands out


def test_difference_table_marks_what_is_more_than_chance() -> None:
    changes = {"bcr": Change(mean=0.1, interval=(0.02, 0.2)), "vsa": Change(mean=-0.5, interval=(-1.2, 0.1))}
    row = MethodRow(name="a", nfe=8, num_loras=1, bcr=0.2, vsa=3, reference="collection", differences=changes)
    plain = MethodRow(name="collection", nfe=8, num_loras=1, bcr=0.1, vsa=3.5)
    reference, columns, rows = difference_table([row, plain])
    assert (reference, columns, [name for name, _ in rows]) == ("collection", ["BCR", "VSA"], ["a"])
    assert rows[0][1] == [("+0.100", True, "+0.020 to +0.200"), ("-0.50", False, "-1.20 to +0.10")]
    assert difference_table([plain]) == ("", [], [])


def test_curves_svg_is_inline_and_repeatable() -> None:
    curve = Curve(panel="p", name="loss <a>", steps=[1, 2, 3], values=[1.0, 0.1, 0.01])
    svg = curves_svg([curve])
    assert svg.startswith("<svg") and "metadata" not in svg and "loss &lt;a&gt;" in svg
    assert svg == curves_svg([curve])
    assert curves_svg([Curve(panel="p", name="none", steps=[], values=[])]).startswith("<svg")


def test_grid_refuses_ragged_rows() -> None:
    image = np.zeros((8, 8, 3), np.uint8)
    with pytest.raises(ValueError, match="row 'r': 1 images for 2 columns"):
        Grid("g", ["a", "b"], ["r"], [[image]])
    with pytest.raises(ValueError, match="2 rows but 1 row labels"):
        Grid("g", ["a"], ["r"], [[image], [image]])


def test_grid_image_places_pictures_and_labels() -> None:
    red, blue = (np.full((16, 16, 3), color, np.uint8) for color in ((255, 0, 0), (0, 0, 255)))
    picture = np.asarray(grid_image([[red, None], [blue, red]], ["one", "two"], ["first", "second"], scale=3))
    assert (picture == (255, 0, 0)).all(-1).sum() == 2 * 48 * 48
    assert (picture == (0, 0, 255)).all(-1).sum() == 48 * 48
    top = np.argwhere((picture == (0, 0, 255)).all(-1))
    assert np.ptp(top[:, 0]) == 47 and np.ptp(top[:, 1]) == 47
    ink = (picture.max(-1) < 140) & (picture.min(-1) < 140)
    assert ink[:, : top[:, 1].min()].sum() > 50  # row labels stand left of the pictures
    with pytest.raises(ValueError, match="at least one image"):
        grid_image([[None]], ["a"])

"""Rates of a benchmark against hand counts: what is missing is bounded, never guessed."""

import csv

import pytest

from clora.evaluate.bench_rows import TRUTH, UNTOUCHED, Row, control_counts, control_faults, summarise, write_rows


def read_rows(path):
    """The rows of a `rows.csv`, as a stranger reads it."""
    with path.open(newline="") as file:
        found = [{key: value for key, value in row.items() if value != ""} for row in csv.DictReader(file)]
    return [Row.model_validate(row) for row in found]


def row(method="a", key="k", bad=False, vsa=4, effect="e", **more):
    vsa = vsa if bad is False else None
    return Row(method=method, category="any", effect=effect, key=key, seed=0, path=f"{key}.png", source=f"{key}_s.png",
               bad=bad, vsa=vsa, **more)  # fmt: skip


def test_summarise_counts_by_hand():
    rows = [row(key="1", vsa=5), row(key="2", bad=True), row(key="3", bad=None), row(key="4", vsa=None), row(key="5")]
    (one,) = summarise(rows, "a")
    assert (one.outputs, one.missing) == (5, 2)
    assert one.bcr == 1 / 4 and one.bcr_bounds == (1 / 5, 2 / 5)  # the fourth has the gate's verdict, no score
    assert one.vsa == (5 + 0 + 4) / 3
    assert one.vsa_bounds == (9 / 5, 19 / 5)
    assert one.bcr_interval is not None and one.bcr_interval[0] <= one.bcr <= one.bcr_interval[1]


def test_summarise_keeps_vsa_below_the_gate():
    rows = [row(key=str(k), bad=k % 3 == 0, vsa=5) for k in range(30)]
    (one,) = summarise(rows, "a")
    assert one.bcr == 1 / 3 and one.vsa == pytest.approx(5 * (1 - one.bcr))


def test_summarise_pairs_only_what_both_were_judged_on():
    ours = [row("b", key=k, bad=bad) for k, bad in (("1", True), ("2", True), ("3", None), ("4", False))]
    theirs = [row("a", key=k, bad=bad) for k, bad in (("1", False), ("2", True), ("3", True), ("4", False))]
    first, second = summarise([*theirs, *ours], "a")
    assert first.differences == {}
    assert second.differences["bcr"].mean == pytest.approx(1 / 3)  # of pictures 1, 2 and 4
    assert second.differences["vsa"].mean == pytest.approx(-4 / 3)


def test_summarise_figures_are_means_of_what_is_there():
    rows = [row(key=str(k), seconds=value) for k, value in enumerate((1.0, None, 4.0))]
    others = [row("b", key=str(k), seconds=value) for k, value in enumerate((3.0, 9.0, 4.0))]
    first, second = summarise([*rows, *others], "a")
    assert first.figures["seconds"].mean == 2.5 and list(first.figures) == ["seconds"]
    low, high = first.figures["seconds"].interval
    assert 1.0 <= low <= 2.5 <= high <= 4.0
    assert second.differences["seconds"].mean == 1.0  # of the two that both have: 2 and 0


def test_summarise_without_verdicts_has_no_rates():
    (one,) = summarise([row(bad=None), row(key="2", bad=None)], "a")
    assert one.bcr is None and one.vsa is None and one.missing == 2


def test_summarise_bounds_are_all_or_nothing_where_every_answer_is_missing():
    (one,) = summarise([row(bad=None, why="status 503"), row(key="2", bad=None, why="late")], "a")
    assert one.bcr is None and one.vsa is None and one.missing == 2
    assert one.bcr_bounds == (0, 1) and one.vsa_bounds == (0, 5)
    (nobody,) = summarise([row(bad=None), row(key="2", bad=None)], "a")
    assert nobody.bcr_bounds is None and nobody.vsa_bounds is None


def test_summarise_agreement_of_second_answers():
    rows = [
        row(key="1", again_bad=False, again_vsa=2), row(key="2", bad=True, again_bad=False, again_vsa=3),
        row(key="3", again_bad=None), row(key="4"),
    ]  # fmt: skip
    (one,) = summarise(rows, "a")
    assert one.agreement.asked == 2 and one.agreement.bad_equal == 0.5 and one.agreement.vsa_gap == 2.0


def test_control_faults_name_both_kinds():
    rows = [row(UNTOUCHED, bad=True), row(TRUTH, bad=False), row(UNTOUCHED, bad=None)]
    assert control_faults(rows) == []
    wrong = control_faults([row(UNTOUCHED, bad=False), row(TRUTH, bad=True, effect="gold")])
    assert "untouched source was judged good" in wrong[0] and "effect gold" in wrong[1]


def test_control_counts_tells_of_those_without_an_answer():
    rows = [row(UNTOUCHED, bad=True), row(TRUTH, bad=False), row(TRUTH, bad=True), row(UNTOUCHED, bad=None)]
    assert control_counts(rows) == "2 as they must be, 1 not, 1 without an answer"


def test_write_rows_gives_the_same_rows_back(tmp_path):
    rows = [row(key='a "b", c', why="no\nanswer", bad=None), row(bad=True, seconds=0.25), row(vsa=5, l1_source=0.1)]
    write_rows(tmp_path, rows)
    assert read_rows(tmp_path / "rows.csv") == rows


def test_write_rows_parquet_is_the_csv(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [row(bad=True, seconds=0.25), row(key="2", vsa=5, l1_source=0.1), row(key="3", bad=None)]
    write_rows(tmp_path, rows)
    assert [Row.model_validate(one) for one in parquet.read_table(tmp_path / "rows.parquet").to_pylist()] == rows

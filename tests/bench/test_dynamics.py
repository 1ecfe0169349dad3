"""What `bench.lab.dynamics` trains, samples and compares; the trainings themselves are `test_study.py`'s."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from bench.lab import dynamics
from bench.lab.study import Arm, Row, Study


def test_dynamics_trains_every_length_from_one_coarse_student_and_compares_with_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[Arm] = []
    judged: dict[str, Any] = {}
    monkeypatch.setattr(Study, "teach", lambda study: None)
    monkeypatch.setattr(Study, "train", lambda study, arm: trained.append(arm))
    monkeypatch.setattr(Study, "forwards", lambda study, arm: 1.0)
    monkeypatch.setattr(Study, "sample", lambda study, rows: {row.name: row for row in rows})

    def judge(images: dict[str, Row], controls: dict[str, str]) -> list[dict[str, Any]]:
        judged.update(images=images, controls=controls)
        return [{"row": name, "bcr": 0.1 * (row.num_steps or 8)} for name, row in images.items()]

    monkeypatch.setattr(dynamics, "judge", judge)
    figures = dynamics.measure(Study(tmp_path, ("sepia",), scenes="judge"), [3, 5])

    coarse, *arms = trained
    assert coarse == Arm("preset", ())
    assert {arm.start for arm in arms} == {"preset:coarse"}
    assert [arm.overrides[-1] for arm in arms] == ["train.max_train_steps=3", "train.max_train_steps=5"]
    assert judged["images"]["0 updates, 4"] == Row("preset:coarse", 4, "consistency", accelerated=True)
    assert judged["images"]["5 updates, 2"] == Row("full 5", 2, "consistency")
    assert judged["controls"]["5 updates, 2"] == "0 updates, 2"
    assert judged["controls"]["teachers, as targets"] == "0 updates, 8"
    dynamics.plot(figures["rows"], [3, 5], tmp_path / "curve.png")
    assert Image.open(tmp_path / "curve.png").width == 900

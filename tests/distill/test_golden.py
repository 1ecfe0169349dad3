"""The figures of every preset and stage are those of `tests/golden/` (`tests/support/golden.py` says how to change
them)."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.golden import CASES, FOLDER, STEPS, read_curves, run_case, write_inputs


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("golden"))


@pytest.mark.parametrize("case", CASES)
def test_figures_are_the_golden_ones(case: str, inputs: Path, tmp_path: Path) -> None:
    wanted, got = read_curves(case), run_case(inputs, tmp_path / "out", case)
    assert got.keys() == wanted.keys()
    for name, values in wanted.items():
        assert len(values) == STEPS
        assert [value is None for value in got[name]] == [value is None for value in values], name
        for step, (value, want) in enumerate(zip(got[name], values, strict=True)):
            if want is not None:
                assert value == pytest.approx(want, rel=1e-4, abs=1e-9), f"{name} of step {step}"


def test_golden_files_are_those_of_the_cases() -> None:
    assert {path.stem for path in FOLDER.iterdir()} == set(CASES)

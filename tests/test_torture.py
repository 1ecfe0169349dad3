"""Some cases of each table of `tests/support/torture.py`; `make torture` runs all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support import torture

pytestmark = pytest.mark.slow

# Which rows of each table: those that differ most.
CHOSEN = {
    "kill_at_step": [1],
    "kill_in_save": [13],
    "damage": [7],
    "disk_full": [1],
    "not_finite": [3],
    "sigterm": [4],
    "hang": [1],
}


@pytest.fixture(scope="module")
def job(random_base: Path, tmp_path_factory: pytest.TempPathFactory) -> torture.Job:
    return torture.make_job(tmp_path_factory.mktemp("torture") / "job", random_base)


@pytest.mark.parametrize(("table", "index"), [(name, index) for name, rows in CHOSEN.items() for index in rows])
def test_training_survives(job: torture.Job, table: str, index: int) -> None:
    case, given = torture.all_cases(job)[table][index]
    row: dict[str, Any] = case(*given)
    assert row["ok"], row


def test_every_table_has_its_number(job: torture.Job) -> None:
    counts = {name: len(cases) for name, cases in torture.all_cases(job).items()}
    assert counts["kill_at_step"] == 10 and counts["kill_in_save"] == 20
    assert counts["damage"] + counts["disk_full"] == 24 and counts["not_finite"] == 12
    assert len(torture.TERM_PHASES) == 6 and set(CHOSEN) == set(counts)

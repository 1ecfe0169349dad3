"""README and docs quote the results that are filed."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.lab.tables import tables

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(("place", "lines"), tables().items(), ids=lambda value: " of ".join(value[:2]))
def test_tables_are_those_of_the_documents(place: tuple[str, str], lines: list[str]) -> None:
    """Line by line, as `python -m bench.lab.tables` prints them; an old table beside a new result fails here."""
    text = (ROOT / place[0]).read_text()
    assert len(lines) >= 3 and [line for line in lines if line not in text] == []

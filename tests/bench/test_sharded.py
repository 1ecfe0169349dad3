"""Several processes give the rows of one: the small version of `python -m bench.lab.sharded`."""

import shutil

import pytest

from bench.lab.sharded import compare, run


@pytest.mark.slow
def test_run_on_two_processes_gives_every_row_and_picture_of_one(tmp_path):
    figures = run(tmp_path, 20)
    assert (figures["rows"], figures["rows that differ"], figures["pictures that differ"]) == (20, 0, 0)
    assert figures["made by each"] == [10, 10]
    _a_changed_value_shows(tmp_path)


def _a_changed_value_shows(folder):
    """Two rows swapped, and one picture put in another's place: each is counted."""
    rows = (folder / "many/rows.csv").read_text().splitlines()
    (folder / "many/rows.csv").write_text("\n".join([rows[0], rows[2], rows[1], *rows[3:]]) + "\n")
    assert compare(folder / "one", folder / "many")["rows that differ"] == 2
    (folder / "many/rows.csv").write_text("\n".join(rows) + "\n")
    first, second = sorted((folder / "many/results").rglob("*_0.png"))[:2]
    shutil.copy(first, second)
    assert compare(folder / "one", folder / "many")["pictures that differ"] == 1
    (folder / "many/rows.csv").write_text("\n".join(rows[:-1]) + "\n")
    with pytest.raises(SystemExit, match="20 rows of one process, 19"):
        compare(folder / "one", folder / "many")

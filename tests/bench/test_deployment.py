"""Counting of switches and storage by hand; loads read every byte."""

from collections import Counter

import pytest

from bench.lab import deployment
from bench.lab.deployment import PER_COLLECTION, QUERIES, load_seconds, serve, switches, table, write_file
from clora.evaluate.router import route
from clora.tiny.dataset import effect_names
from clora.tiny.effects import EFFECTS


def test_switches_count_changes_and_the_first():
    assert switches([3, 3, 1, 1, 3]) == 3 and switches([0]) == 1 and switches([]) == 0


@pytest.mark.parametrize("count", [10, 60, 100, 150])
def test_serve_expects_as_many_switches_as_chance_says(count):
    """Of two draws in a row 1 in N is of the same effect; of G collections 1 in G. A router takes some for others."""
    row, taken = serve(count), list(range(count))
    if count <= len(EFFECTS):
        bank = {name: EFFECTS[name].criteria for name in effect_names(count)}
        taken = [list(bank).index(route(EFFECTS[name].student_prompt, bank)) for name in bank]
        right = sum(place == one for place, one in enumerate(taken)) / count
        assert row["routed_right"] == pytest.approx(right, abs=0.07)

    def expected(files):
        """Draws less those that are of the file before them."""
        return QUERIES * (1 - sum((times / count) ** 2 for times in Counter(files).values()))

    assert row["switches"] == pytest.approx(expected(taken), abs=12)
    assert row["collections"] == -(-count // PER_COLLECTION)
    assert row["switches_collections"] == pytest.approx(expected(one // PER_COLLECTION for one in taken), abs=25)
    assert ("routed_right" in row) == (count <= len(EFFECTS))


def test_serve_one_collection_is_never_switched_nor_misrouted():
    row = serve(50)
    assert row["switches_collections"] == 0 and row["routed_right_collections"] == 1.0 > row["routed_right"]


def test_table_multiplies_switches_by_what_a_load_takes(monkeypatch):
    monkeypatch.setattr(deployment, "load_seconds", lambda path, cold: 3.0 if cold else 0.5)
    found = table(0.002)
    assert found["load"]["cold_s"] == 3.0
    for row in found["rows"]:
        assert row["loading_cold_s"] == pytest.approx(3 * row["switches"])
        assert row["storage_gb"] == pytest.approx(row["effects"] * found["load"]["file_gb"], abs=0.01)


def test_load_seconds_reads_a_file_of_the_size_asked_for(tmp_path):
    write_file(tmp_path / "a.safetensors", 0.004, 0)
    assert (tmp_path / "a.safetensors").stat().st_size == pytest.approx(4e6, rel=0.2)
    assert load_seconds(tmp_path / "a.safetensors", True) > 0

"""Strict JSON, JSON lines and CSV reading, and atomic text writing."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clora.errors import InputError
from clora.io.text import parse_json, read_rows, read_text

scalars = st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.text()
values = st.recursive(scalars, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8)


@settings(max_examples=30)
@given(values)
def test_parse_json_is_json_loads_on_good_text(value: object) -> None:
    assert parse_json(json.dumps(value)) == value


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"a": 1, "b": {"c": 1, "c": 1}}', "'c' is written twice"),
        ("[NaN]", "NaN"),
        ("[-Infinity]", "Infinity"),
        ("[" * 100_000, "nested too deeply"),
        ("[1", "delimiter"),
        ("9" * 5000, "limit"),
    ],
)
def test_parse_json_refuses(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_json(text)


@settings(max_examples=30)
@given(st.lists(st.dictionaries(st.text(min_size=1), scalars, min_size=1), min_size=1))
def test_read_rows_gives_back_json_lines(rows: list[dict[str, object]]) -> None:
    # Line separators other than "\n" are legal inside JSON strings and must not split a row.
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        path.write_bytes("\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode(errors="replace"))
        found, faults = read_rows(path)
    expected = [json.loads(json.dumps(row, ensure_ascii=False).encode(errors="replace")) for row in rows]
    assert [row for _, row in found] == expected and faults == []


def test_read_rows_names_the_line_of_every_fault(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('\ufeff{"a": 1}\n\nnull\n{"a": }\n"x"\n{"b": 2}\n3\ntrue', encoding="utf-8")
    rows, faults = read_rows(path)
    assert rows == [(f"{path} line 1", {"a": 1}), (f"{path} line 6", {"b": 2})]
    kinds = ["null", "not valid JSON", "text", "a number", "true or false"]
    assert [kind in fault for kind, fault in zip(kinds, faults, strict=True)] == [True] * 5
    assert [fault.split(": ")[0] for fault in faults] == [f"{path} line {n}" for n in (3, 4, 5, 7, 8)]


def test_read_rows_of_csv(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text('image, prompt\na.png,"one, two\nthree"\nb.png\nc.png,\n\nd.png,x\n', encoding="utf-8")
    rows, faults = read_rows(path)
    assert [row for _, row in rows] == [
        {"image": "a.png", "prompt": "one, two\nthree"},
        {"image": "c.png"},
        {"image": "d.png", "prompt": "x"},
    ]
    assert rows[0][0].endswith("line 3") and rows[2][0].endswith("line 7")
    assert len(faults) == 1 and "line 4: 1 cells under 2 columns" in faults[0]


def test_read_rows_of_json_wants_a_list_of_objects(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text('[{"a": 1}, 2]')
    rows, faults = read_rows(path)
    assert rows == [(f"{path} item 1", {"a": 1})]
    assert faults == [f"{path} item 2: holds a number where a JSON object is expected"]
    path.write_text('{"a": 1}')
    with pytest.raises(InputError, match="not a list of objects"):
        read_rows(path)


def test_csv_with_a_repeated_column_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("image,image\na,b\n")
    with pytest.raises(InputError, match="names a column twice"):
        read_rows(path)


def test_read_text_stops_at_its_limit(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"x" * 100)
    assert read_text(path, 100) == "x" * 100
    with pytest.raises(InputError, match="larger than"):
        read_text(path, 99)
    with pytest.raises(InputError, match="does not exist"):
        read_text(tmp_path / ("x" * 5000))

"""Strict reading of the text formats that users write (YAML, JSON, JSON lines, CSV).

Nothing here runs code from a file, and nothing is read beyond a declared size: a file that is too large, not
UTF-8, that repeats a key (the parsers would silently keep the last one) or grows without bound through YAML
aliases is refused with its name and line.
"""

from __future__ import annotations

import csv
import io
import json
import os
from pathlib import Path
from typing import Any

import yaml

from clora.errors import InputError, InputErrors

MAX_CONFIG_BYTES = 4 << 20
MAX_METADATA_BYTES = 256 << 20
# A YAML file can name one list a billion times through nested aliases; this bounds what it expands to.
MAX_YAML_NODES = 1_000_000

Rows = list[tuple[str, dict[str, Any]]]


def is_unicode(text: str) -> bool:
    """Whether a text can be written down: a half of a surrogate pair, which JSON can spell, cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def read_text(path: Path, max_bytes: int = MAX_CONFIG_BYTES) -> str:
    """The file's text (UTF-8, a byte order mark is dropped); `InputError` names the file and the mend."""
    if not os.path.isfile(path):  # False, not an error, for names no file can have
        what = "is a folder, not a file" if os.path.isdir(path) else "does not exist"
        raise InputError(f"{path} {what}; correct the path")
    try:
        with path.open("rb") as file:
            raw = file.read(max_bytes + 1)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); check its permissions") from error
    if len(raw) > max_bytes:
        raise InputError(f"{path} is larger than {max_bytes >> 20} MiB, the limit for such a file; split it")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8") from error


def read_yaml(path: Path) -> str:
    """The text of a YAML file, proved safe to hand to a loader.

    Raises `InputErrors` with every repeated key (dotted name and line), `InputError` for a syntax error, an
    alias that contains itself or an expansion beyond `MAX_YAML_NODES` nodes.
    """
    text = read_text(path)
    check_yaml(text, str(path))
    return text


def check_yaml(text: str, source: str) -> None:
    """The checks of `read_yaml` on a text; `source` names it in errors."""
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        sizes: dict[int, int] = {}
        faults: list[str] = []
        size = 0 if root is None else _expanded_size(root, "", sizes, faults, source)
    except yaml.MarkedYAMLError as error:
        line = f" line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise InputError(f"{source}{line}: not valid YAML: {error.problem or error}") from error
    except yaml.YAMLError as error:
        raise InputError(f"{source}: not valid YAML: {error}") from error
    except RecursionError as error:
        raise InputError(f"{source}: YAML nested too deeply; flatten it") from error
    if faults:
        raise InputErrors(faults)
    if size > MAX_YAML_NODES:
        raise InputError(f"{source}: YAML aliases expand to more than {MAX_YAML_NODES} values; write them out")


def _expanded_size(node: Any, prefix: str, sizes: dict[int, int], faults: list[str], source: str) -> int:
    known = sizes.get(id(node))
    if known == -1:
        raise InputError(f"{source} line {node.start_mark.line + 1}: a YAML alias contains itself; remove it")
    if known is not None:
        return known
    sizes[id(node)] = -1
    size = 1
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            size += _expanded_size(item, f"{prefix}{index}.", sizes, faults, source)
    elif isinstance(node, yaml.MappingNode):
        first: dict[str, int] = {}
        for key, value in node.value:
            name, line = str(key.value), key.start_mark.line + 1
            if name in first and name != "<<":
                where = f"{source} line {line}: key '{prefix}{name}'"
                faults.append(f"{where} repeats line {first[name]}; keep one of them")
            first.setdefault(name, line)
            size += 1 + _expanded_size(value, f"{prefix}{name}.", sizes, faults, source)
    sizes[id(node)] = size
    return size


def parse_json(text: str) -> Any:
    """`json.loads` that refuses repeated keys and NaN; every fault is a `ValueError` with a short reason."""
    try:
        return json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_no_constant)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _unique_keys(items: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in items:
        if key in result:
            raise ValueError(f"key '{key}' is written twice")
        result[key] = value
    return result


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON value")


def read_rows(path: Path) -> tuple[Rows, list[str]]:
    """Rows of a `.jsonl`, `.json` (list of objects) or `.csv` (with header) file, and the faults of the rest.

    Each row comes with its place for error messages, such as `pairs.jsonl line 12`. Malformed rows are listed
    as faults, so that one bad line does not hide the next; an unreadable file raises `InputError`.
    """
    text = read_text(path, MAX_METADATA_BYTES)
    if path.suffix.lower() == ".csv":
        return _csv_rows(path, text)
    if path.suffix.lower() == ".json":
        return _json_rows(path, text)
    rows: Rows = []
    faults: list[str] = []
    # Only "\n" ends a line: str.splitlines would also break at characters that are legal inside JSON strings.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        place = f"{path} line {number}"
        try:
            row = parse_json(line)
        except ValueError as error:
            faults.append(f"{place}: not valid JSON ({error}); each line must be one JSON object")
            continue
        _keep_object(row, place, rows, faults)
    return rows, faults


def _json_rows(path: Path, text: str) -> tuple[Rows, list[str]]:
    try:
        items = parse_json(text)
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON ({error}); it must be a list of objects") from error
    if not isinstance(items, list):
        raise InputError(f"{path}: holds {_kind(items)}, not a list of objects; wrap the rows in [ ]")
    rows: Rows = []
    faults: list[str] = []
    for number, row in enumerate(items, start=1):
        _keep_object(row, f"{path} item {number}", rows, faults)
    return rows, faults


def _csv_rows(path: Path, text: str) -> tuple[Rows, list[str]]:
    rows: Rows = []
    faults: list[str] = []
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] = []
    try:
        for cells in reader:
            place = f"{path} line {reader.line_num}"
            if not cells:
                continue
            if not header:
                header = [cell.strip() for cell in cells]
                if len(set(header)) != len(header):
                    raise InputError(f"{place}: the header names a column twice; keep one of them")
            elif len(cells) != len(header):
                wrong = f"{len(cells)} cells under {len(header)} columns"
                faults.append(f"{place}: {wrong}; quote cells that hold commas")
            else:
                # An empty cell is an absent value, as in the JSON formats.
                filled = {key: cell for key, cell in zip(header, cells, strict=True) if cell != ""}
                rows.append((place, filled))
    except csv.Error as error:
        faults.append(f"{path} line {reader.line_num}: not valid CSV ({error}); check its quotes")
    return rows, faults


def _keep_object(row: Any, place: str, rows: Rows, faults: list[str]) -> None:
    if isinstance(row, dict):
        rows.append((place, row))
    else:
        faults.append(f"{place}: holds {_kind(row)} where a JSON object is expected")


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")

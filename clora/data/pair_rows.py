"""Pair datasets written as rows: the metadata formats of trainers and public sets (see `clora.data.pairs`)."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clora.data.images import resolve_inside
from clora.errors import InputError, raise_faults
from clora.io.text import is_unicode, parse_json, read_rows


@dataclass(frozen=True)
class Pair:
    """One example: source image(s), the target they become (None where not needed), and its prompt."""

    sources: tuple[Path, ...]
    target: Path | None
    prompt: str | None
    effect: str | None
    place: str  # where it was read, for error messages: "pairs.jsonl line 3"

    @property
    def source(self) -> Path:
        """The first source image."""
        return self.sources[0]


@dataclass(frozen=True)
class _Columns:
    """The keys of one metadata format; `source` is what tells the formats apart."""

    name: str
    source: str
    target: str
    prompt: str
    effect: str | None = None
    above: bool = False  # paths start from the folder above the file's own: STYLE/train.jsonl names STYLE/a.png


_FORMATS = (
    _Columns("musubi-tuner", "control_path", "image_path", "caption"),
    _Columns("DiffSynth", "edit_image", "image", "prompt"),
    _Columns("LightX2V", "source_images", "target_image", "prompt"),
    _Columns("CollectionLoRA", "source_image", "base_pred_image", "instruction", "lora_name"),
    _Columns("PhotoDoodle", "source", "target", "caption"),
    _Columns("OmniConsistency", "src", "tar", "prompt", above=True),
)


def read_metadata(path: Path, data_roots: Sequence[Path], require_target: bool) -> tuple[list[Pair], list[str]]:
    """Pairs and faults of a .jsonl, .json or .csv file."""
    rows, faults = read_rows(path)
    pairs: list[Pair] = []
    for place, row in rows:
        try:
            pairs.append(_read_row(row, place, path.parent, data_roots, require_target))
        except InputError as error:
            faults += error.faults
    return pairs, faults


def _read_row(row: Mapping[str, Any], place: str, root: Path, data_roots: Sequence[Path], require_target: bool) -> Pair:
    fitting = [columns for columns in _FORMATS if _source_keys(row, columns)]
    if len(fitting) != 1:
        known = "; ".join(f"{columns.source} + {columns.target} ({columns.name})" for columns in _FORMATS)
        raise InputError(f"{place}: keys {', '.join(sorted(row)) or 'none'} fit no single format: {known}")
    columns = fitting[0]
    root = root.parent if columns.above else root
    faults: list[str] = []
    sources = [
        _image_path(item, f"{place}: {key}", root, data_roots, faults)
        for key in _source_keys(row, columns)
        for item in _items(row[key])
    ]
    if not sources:
        faults.append(f"{place}: {columns.source} names no image")
    target = None
    if row.get(columns.target) is not None:
        target = _image_path(row[columns.target], f"{place}: {columns.target}", root, data_roots, faults)
    elif require_target:
        faults.append(f"{place}: {columns.target} (the target, what the source becomes) is missing; add it")
    prompt = _text(row, columns.prompt, place, faults)
    effect = _text(row, columns.effect, place, faults) if columns.effect else None
    raise_faults(faults)
    return Pair(tuple(path for path in sources if path is not None), target, prompt, effect, place)


def _source_keys(row: Mapping[str, Any], columns: _Columns) -> list[str]:
    """The keys that hold source images, in the order of their numbers (`control_path_0`, then `_1`)."""
    pattern = re.compile(rf"{columns.source}(?:_(\d+))?")
    found = [(int(match[1] or -1), key) for key in row if (match := pattern.fullmatch(key))]
    return [key for _, key in sorted(found) if row[key] is not None]


def _items(value: Any) -> list[Any]:
    """One path or several; a CSV cell may hold a JSON list."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = parse_json(value)
        except ValueError:
            return [value]  # a file name that merely starts with a bracket
    return value if isinstance(value, list) else [value]


def _image_path(value: Any, where: str, root: Path, data_roots: Sequence[Path], faults: list[str]) -> Path | None:
    if not isinstance(value, str) or not value.strip():
        faults.append(f"{where} must be the path of an image")
        return None
    try:
        path = resolve_inside(root, value, data_roots)
    except InputError as error:
        faults.append(f"{where}: {error}")
        return None
    if not os.path.isfile(path):  # False, not an error, for names no file can have
        faults.append(f"{where} '{value}' does not exist; correct the path or remove the row")
    return path


def _text(row: Mapping[str, Any], key: str, place: str, faults: list[str]) -> str | None:
    value = row.get(key)
    if value is not None and not isinstance(value, str):
        faults.append(f"{place}: {key} must be text")
        return None
    if value is not None and not is_unicode(value):
        faults.append(f"{place}: {key} holds half of a character (a surrogate without its pair); write it anew")
        return None
    return value.strip() or None if value is not None else None

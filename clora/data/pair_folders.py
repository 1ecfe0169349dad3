"""Pair datasets laid out as folders: ai-toolkit's `folder_path` and `control_path`, or images with captions.

Partners have the same stem. Which folder is which: see `clora.data.pairs`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from clora.data.images import SUFFIXES, resolve_inside
from clora.data.pair_rows import Pair, read_metadata
from clora.errors import InputError
from clora.io.text import parse_json, read_text, read_yaml

TARGET_FOLDERS = ("target", "targets", "folder_path")
SOURCE_FOLDERS = ("source", "sources", "control", "controls", "control_path")
METADATA_FILES = ("metadata.jsonl", "metadata.json", "metadata.csv")


def read_folder(path: Path, data_roots: Sequence[Path], require_target: bool) -> tuple[list[Pair], list[str]]:
    """Pairs and faults of a folder: its metadata file, else its subfolders, else its images alone."""
    metadata = [path / name for name in METADATA_FILES if (path / name).is_file()]
    if len(metadata) > 1:
        names = ", ".join(file.name for file in metadata)
        raise InputError(f"{path} holds {names}; keep one, or name the one to read")
    if metadata:
        return read_metadata(metadata[0], data_roots, require_target)
    folders = [entry for entry in _entries(path) if entry.is_dir()]
    targets = [folder for folder in folders if folder.name.lower() in TARGET_FOLDERS]
    sources = [folder for folder in folders if _unnumbered(folder.name) in SOURCE_FOLDERS]
    if len(targets) == 1 and sources:
        return _match_folders(targets[0], sources, "txt", path, data_roots)
    if not require_target and not targets and not sources:
        return _read_flat(path, data_roots)
    if len(targets) > 1:
        raise InputError(f"{path} holds both {targets[0].name}/ and {targets[1].name}/; keep one")
    wanted = "one subfolder named target and one named source (or ai-toolkit's folder_path and control_path)"
    found = ", ".join(f"{folder.name}/" for folder in folders) or "no subfolder"
    raise InputError(f"{path} must hold {wanted}, or a metadata file; it holds {found}")


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        raise InputError(f"{folder} cannot be listed ({error.strerror}); check its permissions") from error


def _unnumbered(name: str) -> str:
    """`control_2`, `control2` and `Control` are all source folders called control."""
    return re.sub(r"_?\d+$", "", name.lower())


def _read_flat(path: Path, data_roots: Sequence[Path]) -> tuple[list[Pair], list[str]]:
    faults: list[str] = []
    pairs = [
        Pair((image,), None, _caption(path / f"{stem}.txt", path, data_roots, faults), None, str(path / stem))
        for stem, image in _images_by_stem(path, path, data_roots, faults).items()
    ]
    return pairs, faults


def _match_folders(
    target: Path, sources: Sequence[Path], caption_suffix: str, root: Path, data_roots: Sequence[Path]
) -> tuple[list[Pair], list[str]]:
    """Pair the files of `target` with those of the same stem in each of `sources`."""
    faults: list[str] = []
    targets = _images_by_stem(target, root, data_roots, faults)
    columns = [_images_by_stem(source, root, data_roots, faults) for source in sources]
    pairs: list[Pair] = []
    for stem in sorted({*targets, *(stem for column in columns for stem in column)}):
        lacking = [folder for folder, column in zip(sources, columns, strict=True) if stem not in column]
        if stem not in targets:
            lacking.append(target)
        if lacking:
            names = " and ".join(f"{folder.name}/" for folder in lacking)
            faults.append(f"{root}: image '{stem}' has no partner in {names}; add it or remove the others")
            continue
        caption = _caption(target / f"{stem}.{caption_suffix}", root, data_roots, faults)
        found = tuple(column[stem] for column in columns)
        pairs.append(Pair(found, targets[stem], caption, None, f"{target.name}/{stem}"))
    return pairs, faults


def _images_by_stem(folder: Path, root: Path, data_roots: Sequence[Path], faults: list[str]) -> dict[str, Path]:
    images: dict[str, Path] = {}
    for entry in _entries(folder):
        if entry.name.startswith(".") or entry.suffix.lower() not in SUFFIXES:
            continue
        try:
            real = resolve_inside(root, entry.absolute(), data_roots)
        except InputError as error:
            faults.append(str(error))
            continue
        if entry.stem in images:
            faults.append(f"{folder}: two images are called '{entry.stem}'; rename one, with its partner")
        images[entry.stem] = real
    return images


def _caption(path: Path, root: Path, data_roots: Sequence[Path], faults: list[str]) -> str | None:
    try:
        if not os.path.isfile(path):
            return None
        return read_text(resolve_inside(root, path.absolute(), data_roots)).strip() or None
    except InputError as error:
        faults.append(str(error))
        return None


def is_folder_json(path: Path) -> bool:
    """Whether a .json file describes folders (an object) and not rows (a list)."""
    if path.suffix.lower() != ".json" or not os.path.isfile(path):
        return False
    with path.open("rb") as file:
        return file.read(64).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"{")


def read_folder_file(path: Path, data_roots: Sequence[Path]) -> tuple[list[Pair], list[str]]:
    """Pairs and faults of the folders that a YAML or JSON file names, also deep in an ai-toolkit job file."""
    try:
        if path.suffix.lower() == ".json":
            values = parse_json(read_text(path))
        else:
            values = OmegaConf.to_container(OmegaConf.create(read_yaml(path)))
    except ValueError as error:
        raise error if isinstance(error, InputError) else InputError(f"{path}: {error}") from error
    datasets = _find_datasets(values)
    if not datasets:
        raise InputError(f"{path}: has no folder_path; give folder_path (targets) and control_path (sources)")
    pairs: list[Pair] = []
    faults: list[str] = []
    for number, dataset in enumerate(datasets, start=1):
        place = f"{path} dataset {number}" if len(datasets) > 1 else str(path)
        more, wrong = _read_dataset(dataset, place, path.parent, data_roots)
        pairs += more
        faults += wrong
    return pairs, faults


def _find_datasets(values: Any) -> list[Mapping[str, Any]]:
    """Every mapping with `folder_path`, at the top, in a list, or deep in a whole ai-toolkit job file."""
    if isinstance(values, Mapping):
        if "folder_path" in values:
            return [values]
        return [dataset for value in values.values() for dataset in _find_datasets(value)]
    if isinstance(values, list):
        return [dataset for value in values for dataset in _find_datasets(value)]
    return []


def _read_dataset(
    dataset: Mapping[str, Any], place: str, root: Path, data_roots: Sequence[Path]
) -> tuple[list[Pair], list[str]]:
    keys = sorted(key for key in dataset if re.fullmatch(r"control_path(_\d+)?", str(key)) and dataset[key])
    if not keys:
        return [], [f"{place}: has no control_path; name the folder of the source images"]
    named: list[tuple[str, Any]] = [("folder_path", dataset["folder_path"])]
    for key in keys:
        values = dataset[key] if isinstance(dataset[key], list) else [dataset[key]]
        named += [(key, value) for value in values]
    faults: list[str] = []
    folders: list[Path] = []
    for key, value in named:
        try:
            if not isinstance(value, str):
                raise InputError(f"{place}: {key} must be the path of a folder")
            folder = resolve_inside(root, value, data_roots)
            if not os.path.isdir(folder):
                raise InputError(f"{place}: {key} '{value}' is not a folder; correct the path")
            folders.append(folder)
        except InputError as error:
            faults.append(str(error))
    if faults:
        return [], faults
    suffix = str(dataset.get("caption_ext") or "txt").lstrip(".")
    # The files may lie in any of the folders just allowed, not only below the YAML file.
    pairs, faults = _match_folders(folders[0], folders[1:], suffix, folders[0], [*folders[1:], *data_roots])
    default = dataset.get("default_caption")
    if isinstance(default, str) and default.strip():
        pairs = [pair if pair.prompt else replace(pair, prompt=default.strip()) for pair in pairs]
    return pairs, faults

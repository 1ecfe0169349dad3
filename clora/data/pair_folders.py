"""Pair datasets laid out as folders: ai-toolkit's `folder_path` and `control_path`, or images with captions.

Partners have the same stem. Which folder is which: see `clora.data.pairs`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from clora.data.images import SUFFIXES, resolve_inside, why_unread
from clora.data.pair_rows import Pair, read_metadata
from clora.errors import InputError
from clora.io.text import parse_json, read_text, read_yaml

TARGET_FOLDERS = ("target", "targets", "folder_path")
SOURCE_FOLDERS = ("source", "sources", "control", "controls", "control_path")
METADATA_FILES = ("metadata.jsonl", "metadata.json", "metadata.csv")
# What lies beside pictures for other reasons: captions, lists, and the caches of trainers and of systems.
_COMPANIONS = frozenset(
    (".txt", ".caption", ".json", ".jsonl", ".yaml", ".yml", ".csv", ".toml", ".md", ".npz", ".npy", ".safetensors",
     ".pt", ".pth", ".db", ".ini", ".log", ".lock")
)  # fmt: skip
_START_END = re.compile(r"(.+)_(end|start(\d*))")
_SHOWN = 3  # files named in a sentence about many


@dataclass
class Notes:
    """What is found wrong while folders are read, and which files are left out, with the reason and the mend."""

    faults: list[str] = field(default_factory=list)
    left_out: list[tuple[Path, str]] = field(default_factory=list)  # file or folder, why

    def left_out_sentences(self) -> list[str]:
        """One sentence for each reason in each folder."""
        groups: dict[tuple[Path, str], list[str]] = {}
        for path, why in self.left_out:
            groups.setdefault((path.parent, why), []).append(path.name)
        sentences = []
        for (folder, why), names in groups.items():
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            files = "1 file" if len(names) == 1 else f"{len(names)} files"
            sentences.append(f"{folder}: {files} left out: {', '.join(sorted(names)[:_SHOWN])}{more} ({why})")
        return sentences


@dataclass(frozen=True)
class _Place:
    """Where images may lie: below `root` or `data_roots`; `apart`: folders that are read for themselves."""

    root: Path
    data_roots: Sequence[Path]
    apart: frozenset[Path] = frozenset()


def read_folder(path: Path, data_roots: Sequence[Path], require_target: bool, notes: Notes) -> list[Pair]:
    """Pairs of a folder: of its metadata file, else of its two sides, else its images alone."""
    metadata = [path / name for name in METADATA_FILES if (path / name).is_file()]
    if len(metadata) > 1:
        names = ", ".join(file.name for file in metadata)
        raise InputError(f"{path} holds {names}; keep one, or name the one to read")
    if metadata:
        pairs, notes.faults = read_metadata(metadata[0], data_roots, require_target)
        return pairs
    folders = [entry for entry in _entries(path) if entry.is_dir()]
    if any(_START_END.fullmatch(entry.stem) and entry.is_file() for entry in _entries(path)):
        return _match_start_end(path, _Place(path, data_roots), notes)
    targets = [folder for folder in folders if folder.name.lower() in TARGET_FOLDERS]
    sources = [folder for folder in folders if _unnumbered(folder.name) in SOURCE_FOLDERS]
    if len(targets) == 1 and sources:
        return _match_folders(targets[0], sources, "txt", _Place(path, data_roots), notes)
    if not require_target and not targets and not sources:
        return _read_flat(path, _Place(path, data_roots), notes)
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


def _read_flat(path: Path, place: _Place, notes: Notes) -> list[Pair]:
    """Images alone, sorted into subfolders or not. Two subfolders that hold the same names are the two sides of pairs
    under names that say not which is which: those are left out."""
    images = _images(path, place, notes)
    names: dict[str, set[str]] = {}
    for key in images:
        folder, _, rest = key.partition("/")
        names.setdefault(folder if rest else "", set()).add(rest or folder)
    sides = [
        folder for folder in names if folder and any(names[folder] & names[other] for other in names if other != folder)
    ]
    why = "the names of another subfolder: call the two sides source and target, or list them in metadata.jsonl"
    for key in [key for key in images if key.partition("/")[0] in sides and "/" in key]:
        notes.left_out.append((path / key, why))
        del images[key]
    return [
        Pair((image,), None, _caption(path / f"{key}.txt", place, notes), None, str(path / key))
        for key, image in images.items()
    ]


def _match_folders(
    target: Path, sources: Sequence[Path], caption_suffix: str, place: _Place, notes: Notes
) -> list[Pair]:
    """Pair the files of `target` with those of the same name, without its ending, in each of `sources`."""
    place = replace(place, apart=frozenset(folder.resolve() for folder in (target, *sources)))
    sides = [_images(folder, place, notes) for folder in (target, *sources)]
    _leave_out_lone_folders([target, *sources], sides, notes)
    targets = sides[0]
    columns = [_references(side, targets) for side in sides[1:]]
    unread = {path.with_suffix("").resolve(): (path, why) for path, why in notes.left_out}
    pairs: list[Pair] = []
    for key in sorted({*targets, *(key for column in columns for key in column)}):
        lacking = [folder for folder, column in zip(sources, columns, strict=True) if key not in column]
        if key not in targets:
            lacking.append(target)
        if lacking:
            names = " and ".join(f"{folder.name}/" for folder in lacking)
            found = [unread[at] for folder in lacking if (at := (folder / key).resolve()) in unread]
            but = f" but {found[0][0].name}, which is left out ({found[0][1]})" if found else ""
            mend = "" if found else "; add it or remove the others"
            notes.faults.append(f"{place.root}: image '{key}' has no partner in {names}{but}{mend}")
            continue
        caption = _caption(target / f"{key}.{caption_suffix}", place, notes)
        references = tuple(path for column in columns for path in column[key])
        pairs.append(Pair(references, targets[key], caption, None, f"{target.name}/{key}"))
    _tell_lone_captions([target, *sources], targets, caption_suffix, place, notes)
    return pairs


def _match_start_end(path: Path, place: _Place, notes: Notes) -> list[Pair]:
    """Pairs of one folder whose files say which side they are: `NAME_start`, `NAME_start2` ..., `NAME_end`."""
    images, groups = _images(path, place, notes), dict[str, dict[int, str]]()
    for key in images:
        match = _START_END.fullmatch(key)
        if match is None:
            notes.left_out.append((images[key], "it is called neither NAME_start nor NAME_end, as its neighbours are"))
        else:
            number = 0 if match[2] == "end" else int(match[3] or 1)
            groups.setdefault(match[1], {})[number] = key
    pairs = []
    for name, sides in groups.items():
        count = len(sides) - 1
        lacking = [n for n in range(count + 1) if n not in sides] or ([1] if count == 0 else [])
        if lacking:
            side = "_end" if lacking[0] == 0 else f"_start{lacking[0] if lacking[0] > 1 else ''}"
            notes.faults.append(f"{path}: image '{name}{side}' is missing; add it or remove the others of that name")
            continue
        sources = tuple(images[sides[n]] for n in range(1, count + 1))
        caption = _caption(path / f"{name}.txt", place, notes)
        pairs.append(Pair(sources, images[sides[0]], caption, None, str(path / name)))
    return pairs


def _references(side: Mapping[str, Path], targets: Mapping[str, Path]) -> dict[str, list[Path]]:
    """A side's images by target: the one of its name, else those numbered from 0 or 1 on (`NAME_0`, `NAME_1`), in
    order."""
    found = {key: [path] for key, path in side.items()}
    numbered: dict[str, list[tuple[int, str]]] = {}
    for key in side:
        match = re.fullmatch(r"(.+)_(\d+)", key)
        if match and key not in targets and match[1] in targets and match[1] not in side:
            numbered.setdefault(match[1], []).append((int(match[2]), key))
    for name, some in numbered.items():
        some.sort()
        if [number - some[0][0] for number, _ in some] == list(range(len(some))) and some[0][0] <= 1:
            found[name] = [side[key] for _, key in some]
            for _, key in some:
                del found[key]
    return found


def _leave_out_lone_folders(folders: Sequence[Path], sides: Sequence[dict[str, Path]], notes: Notes) -> None:
    """Take out the images of subfolders that not every side has."""
    subfolders = [{key.rpartition("/")[0] for key in side} for side in sides]
    common = set.intersection(*subfolders) | {""}
    for side in sides:
        for key in [key for key in side if key.rpartition("/")[0] not in common]:
            lone = key.rpartition("/")[0]
            others = [f"{f.name}/" for f, has in zip(folders, subfolders, strict=True) if lone not in has]
            notes.left_out.append((side.pop(key), f"there is no {lone}/ with images in {' and '.join(others)}"))


def _tell_lone_captions(
    folders: Sequence[Path], targets: Mapping[str, Path], suffix: str, place: _Place, notes: Notes
) -> None:
    """Captions that nothing reads: those of no target, and those that lie beside a source alone."""
    read = {f"{key}.{suffix}" for key in targets if os.path.isfile(folders[0] / f"{key}.{suffix}")}
    for folder in folders:
        for path in _files(folder, place, Notes()):
            if path.suffix == f".{suffix}" and path.relative_to(folder).as_posix() not in read:
                notes.left_out.append((path, "a caption is read beside the target image, under its name"))


def _images(folder: Path, place: _Place, notes: Notes) -> dict[str, Path]:
    """The images below a folder, real paths by their path from it without the ending, in order; the rest is noted."""
    found: dict[str, list[Path]] = {}
    for path in _files(folder, place, notes):
        if (why := why_unread(path)) is None:
            found.setdefault(path.relative_to(folder).with_suffix("").as_posix(), []).append(path)
        elif path.suffix.lower() not in _COMPANIONS:
            notes.left_out.append((path, why))
    images: dict[str, Path] = {}
    for key, paths in found.items():
        # A phone leaves IMG_1.HEIC beside its IMG_1.JPG.
        plain = [path for path in paths if path.suffix.lower() in SUFFIXES]
        if len(paths) > 1 and len(plain) != 1:
            at = paths[0].parent
            notes.faults.append(f"{at}: two images are called '{paths[0].stem}'; rename one, with its partner")
        kept = plain[0] if len(plain) == 1 else paths[-1]
        if len(plain) == 1:
            notes.left_out += [(path, f"{kept.name} has its name") for path in paths if path != kept]
        try:
            images[key] = resolve_inside(place.root, kept.absolute(), place.data_roots)
        except InputError as error:
            notes.faults.append(str(error))
    return images


def _files(folder: Path, place: _Place, notes: Notes, above: frozenset[Path] = frozenset()) -> Iterator[Path]:
    """The files below a folder, hidden ones apart, in order. `above`: the real folders on the way to it, for links
    that lead back."""
    above = above | {folder.resolve()}
    for entry in _entries(folder):
        if entry.name.startswith("."):
            continue
        if not os.path.isdir(entry):
            yield entry
        elif entry.name.startswith("_"):
            notes.left_out.append((entry, "other tools keep their caches in folders with a leading _; rename it"))
        else:
            try:
                real = resolve_inside(place.root, entry.absolute(), place.data_roots)
            except InputError as error:  # before it is walked: a link may lead to the whole disk
                notes.faults.append(str(error))
                continue
            if real not in place.apart and real not in above:
                yield from _files(entry, place, notes, above)


def _caption(path: Path, place: _Place, notes: Notes) -> str | None:
    try:
        if not os.path.isfile(path):
            return None
        return read_text(resolve_inside(place.root, path.absolute(), place.data_roots)).strip() or None
    except InputError as error:
        notes.faults.append(str(error))
        return None


def is_folder_json(path: Path) -> bool:
    """Whether a .json file describes folders (an object) and not rows (a list)."""
    if path.suffix.lower() != ".json" or not os.path.isfile(path):
        return False
    with path.open("rb") as file:
        return file.read(64).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"{")


def read_folder_file(path: Path, data_roots: Sequence[Path], notes: Notes) -> list[Pair]:
    """Pairs of the folders that a YAML or JSON file names, also deep in an ai-toolkit job file."""
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
    for number, dataset in enumerate(datasets, start=1):
        place = f"{path} dataset {number}" if len(datasets) > 1 else str(path)
        pairs += _read_dataset(dataset, place, path.parent, data_roots, notes)
    return pairs


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
    dataset: Mapping[str, Any], place: str, root: Path, data_roots: Sequence[Path], notes: Notes
) -> list[Pair]:
    keys = sorted(key for key in dataset if re.fullmatch(r"control_path(_\d+)?", str(key)) and dataset[key])
    if not keys:
        notes.faults.append(f"{place}: has no control_path; name the folder of the source images")
        return []
    named: list[tuple[str, Any]] = [("folder_path", dataset["folder_path"])]
    for key in keys:
        values = dataset[key] if isinstance(dataset[key], list) else [dataset[key]]
        named += [(key, value) for value in values]
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
            notes.faults.append(str(error))
    if len(folders) < len(named):
        return []
    suffix = str(dataset.get("caption_ext") or "txt").lstrip(".")
    # The files may lie in any of the folders just allowed, not only below the YAML file.
    pairs = _match_folders(folders[0], folders[1:], suffix, _Place(folders[0], [*folders[1:], *data_roots]), notes)
    default = dataset.get("default_caption")
    if isinstance(default, str) and default.strip():
        pairs = [pair if pair.prompt else replace(pair, prompt=default.strip()) for pair in pairs]
    return pairs

"""Reading the pair datasets of the common LoRA trainers, with every fault listed.

| format | source (what is edited) | target (what it becomes) | prompt |
|---|---|---|---|
| ai-toolkit folders | `control_path` | `folder_path` | `.txt` beside the target |
| musubi-tuner JSONL | `control_path`, `control_path_0`, ... | `image_path` | `caption` |
| DiffSynth CSV, JSON, JSONL | `edit_image` (one or a list) | `image` | `prompt` |
| LightX2V JSON, JSONL | `source_images` (one or a list) | `target_image` | `prompt` |
| CollectionLoRA authors' JSONL | `source_image` | `base_pred_image` | `instruction` |
| PhotoDoodle JSONL | `source` | `target` | `caption` |
| OmniConsistency JSONL | `src` | `tar` | `prompt` |
| fal folders | `NAME_start`, `NAME_start2`, ... | `NAME_end` | `NAME.txt` |

ai-toolkit folders may be given as a folder with the two subfolders (named as above, or `target` and `source`
or `control`), or as a YAML or JSON file with the keys `folder_path` and `control_path`. Numbered sources
(`control_path_1`, `control_2`, ...) make several source images, as do numbered files of one folder (`NAME_0`,
`NAME_1` for the target `NAME`, as musubi-tuner has them). Partners have the same stem, and lie in subfolders of the
same name where there are some. A folder with `metadata.jsonl`, `.json` or `.csv` is read through that file. Further
keys of a row are ignored.

A file in a folder that is not read (a format that Pillow lacks, a subfolder without a partner) is told, by `validate`
and by the jobs that read the pairs.

Paths are relative to the file that names them and may not leave its folder except into `data_roots`; those of
OmniConsistency's files start from the folder above.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from clora.data.pair_folders import METADATA_FILES, Notes, is_folder_json, read_folder, read_folder_file
from clora.data.pair_rows import Pair, read_metadata
from clora.errors import InputError, raise_faults

__all__ = ["METADATA_FILES", "Dataset", "Pair", "read_dataset", "read_pairs"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Dataset:
    """The pairs of a dataset, and what of it was left out, in a sentence each with the reason and the mend."""

    pairs: list[Pair]
    left_out: list[str]


def read_pairs(
    path: str | Path,
    data_roots: Sequence[Path] = (),
    *,
    require_target: bool = True,
    effect: str | None = None,
) -> list[Pair]:
    """The pairs of `read_dataset`; what was left out is a warning in the log."""
    found = read_dataset(path, data_roots, require_target=require_target, effect=effect)
    for sentence in found.left_out:
        log.warning("%s", sentence)
    return found.pairs


def read_dataset(
    path: str | Path,
    data_roots: Sequence[Path] = (),
    *,
    require_target: bool = True,
    effect: str | None = None,
) -> Dataset:
    """The pairs in a dataset folder or metadata file (formats: see the module docstring).

    Paths come back real and inside the dataset or `data_roots`, and every file exists; images are not opened.
    With `require_target=False` rows may lack a target, and a folder of images with `.txt` instructions and
    no two sides is read as sources alone. With `effect`, rows that name another effect are left out. Order
    is that of the file, or by stem.

    Raises `InputErrors` with every fault: missing files, stems without a partner, malformed lines with their
    number, paths that lead outside. A dataset without a single pair is a fault as well.
    """
    path = Path(path)
    notes = Notes()
    if os.path.isdir(path):
        pairs = read_folder(path, data_roots, require_target, notes)
    elif path.suffix.lower() in (".yaml", ".yml") or is_folder_json(path):
        pairs = read_folder_file(path, data_roots, notes)
    elif path.suffix.lower() in (".jsonl", ".json", ".csv"):
        pairs, notes.faults = read_metadata(path, data_roots, require_target)
    elif os.path.exists(path):
        raise InputError(f"{path} is no dataset; give a folder or a .jsonl, .json, .csv or .yaml file")
    else:
        raise InputError(f"{path} does not exist; correct the path")
    if effect is not None:
        named = sorted({pair.effect for pair in pairs if pair.effect is not None})
        pairs = [pair for pair in pairs if pair.effect in (None, effect)]
        if named and not pairs and not notes.faults:
            notes.faults.append(f"{path}: no row is of effect '{effect}'; lora_name is one of {', '.join(named)}")
    left_out = notes.left_out_sentences()
    if not pairs and not notes.faults:
        notes.faults += [f"{path} holds no pairs; add source and target images", *left_out]
    raise_faults(notes.faults)
    return Dataset(pairs, left_out)

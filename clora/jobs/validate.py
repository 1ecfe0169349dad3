"""`clora validate`: a configuration and everything it names, without a GPU and without downloading anything.

The check is that of the jobs (`clora.distill.check`); here every image is decoded too. Every fault is listed, the same
fault of many files in one line: teams own fifty effects, and the first missing file says little about the other
forty-nine.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clora.config import Config, load_config
from clora.data.dataset import effect_key, images_of
from clora.data.images import Size, load_image
from clora.data.pairs import Pair
from clora.distill.check import Findings, check_whole
from clora.errors import InputError

# Source and target of other shapes are cropped differently, which the model learns as a shift.
MAX_SHAPE_DIFFERENCE = 0.02


@dataclass
class Report:
    """What `validate` found. Faults stop a run, warnings do not; the counts are of the pairs that the configuration
    names, and of their images."""

    faults: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    num_effects: int = 0
    num_pairs: int = 0
    num_images: int = 0

    @property
    def ok(self) -> bool:
        """True when there is no fault."""
        return not self.faults

    def to_json(self) -> dict[str, Any]:
        """The report as plain values: ok, faults, warnings, num_effects, num_pairs, num_images."""
        return {"ok": self.ok, **vars(self)}


def validate_file(path: str | Path, overrides: Sequence[str] = ()) -> Report:
    """`validate` for a configuration file; faults in the file itself are part of the report."""
    try:
        config = load_config(path, overrides)
    except InputError as error:
        return Report(faults=error.faults)
    return validate(config)


def validate_config(config: Config) -> list[str]:
    """The faults alone (see `validate`)."""
    return validate(config).faults


def validate(config: Config) -> Report:
    """Check base, output folder, schedules, LoRA files (by their headers), pairs, prompts and, in full, images.

    Where the base is on this machine, LoRA files are held against its linears and prompts against its tokenizer.
    User input never raises here: whatever is wrong with it is in the report.
    """
    found = Findings()
    run = check_whole(config, found)
    pairs = {effect_key(config, name, "pairs"): one for name, one in run.effects.items()}
    if config.general is not None:  # a base's own images come with it
        pairs["general.pairs"] = run.general
    num_images = _check_images(pairs, found)
    num_pairs = sum(map(len, pairs.values()))
    return Report(found.faults, found.warnings, len(config.effects), num_pairs, num_images)


def _check_images(pairs: Mapping[str, Sequence[Pair]], found: Findings) -> int:
    """Decode every image once; returns how many there are."""
    used: dict[Path, str] = {}
    for key, some in pairs.items():
        for path in images_of(some):
            used.setdefault(path, key)
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:  # decoding releases the GIL
        sizes = dict(zip(used, pool.map(_size_or_fault, used), strict=True))
    found.faults += [f"{used[path]}: {fault}" for path, fault in sizes.items() if isinstance(fault, str)]
    for key, some in pairs.items():
        differing = [pair for pair in some if _shapes_differ(pair, sizes)]
        if differing:
            count = f"{len(differing)} pair{'' if len(differing) == 1 else 's'}"
            found.warnings.append(
                f"{key}: {count} with source and target of different shape, first: {differing[0].place}; the crop will"
                " shift one against the other"
            )
    return len(used)


def _size_or_fault(path: Path) -> Size | str:
    try:
        return load_image(path).size
    except InputError as error:
        return str(error)


def _shapes_differ(pair: Pair, sizes: Mapping[Path, Size | str]) -> bool:
    if pair.target is None:
        return False
    source, target = sizes[pair.sources[-1]], sizes[pair.target]  # the last source is the one that is edited
    if isinstance(source, str) or isinstance(target, str):
        return False
    return abs(source[0] * target[1] / (source[1] * target[0]) - 1) > MAX_SHAPE_DIFFERENCE

"""Checking a configuration and everything it names, without a GPU and without downloading anything.

Every fault is listed, the same fault of many files in one line: teams own fifty effects, and the first
missing file says little about the other forty-nine.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import constants, try_to_load_from_cache

from clora.backbones.base import Backbone
from clora.backbones.load import linear_shapes, load_backbone
from clora.config import Config, EffectConfig, acceleration_of, general_data, load_config, resolve_base
from clora.data.images import Size, aspect_buckets, load_image
from clora.data.pairs import Pair, read_pairs
from clora.errors import InputError
from clora.lora.files import check_lora
from clora.method.prompts import effect_prompts

# Source and target of other shapes are cropped differently, which the model learns as a shift.
MAX_SHAPE_DIFFERENCE = 0.02


@dataclass
class Report:
    """What `validate` found. Faults stop a run, warnings do not; the counts are of what was checked."""

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
    """Check base, output folder, LoRA files (by their headers), pairs, images (decoded in full) and prompts.

    Where the base is on this machine, LoRA files are held against its linears and prompts against its tokenizer.
    User input never raises here: whatever is wrong with it is in the report.
    """
    report = Report(num_effects=len(config.effects))
    backbone = _check_base(config, report)
    _check_folders(config, report)
    _check_loras(config, None if backbone is None else linear_shapes(config.base.model), report)
    pairs = _check_pairs(config, report)
    report.num_pairs = sum(map(len, pairs.values()))
    _check_images(config, pairs, report)
    _check_prompts(config, backbone, report)
    return report


def _check_base(config: Config, report: Report) -> Backbone | None:
    """The base without its weights, for tokens and sizes; None where it is not in a folder of this machine."""
    try:
        base = resolve_base(config.base.model)
        if isinstance(base, Path):
            return load_backbone(base, components=(), quantize=config.base.quantize)
    except InputError as error:
        report.faults += [f"base: {fault}" for fault in error.faults]
        return None
    if isinstance(try_to_load_from_cache(base, "model_index.json", revision=config.base.revision), str):
        return None
    if constants.HF_HUB_OFFLINE:
        what = f"{base} is not in the local hub cache and HF_HUB_OFFLINE is set"
        report.faults.append(f"base: {what}; download it first or name a folder")
    else:
        report.warnings.append(f"base: {base} is not in the local hub cache; the first run downloads it")
    return None


def _check_folders(config: Config, report: Report) -> None:
    for index, root in enumerate(config.data_roots):
        if not os.path.isdir(root):
            report.faults.append(f"data_roots.{index}: {root} is not a folder; correct it")
    place = config.output_dir
    while not os.path.exists(place) and place != place.parent:
        place = place.parent
    if not place.is_dir():
        report.faults.append(f"output_dir: {place} is a file; choose another folder")
    elif not os.access(place, os.W_OK | os.X_OK):
        report.faults.append(f"output_dir: no permission to write into {place}; choose another folder")
    try:
        buckets = config.train.buckets
        aspect_buckets(buckets.max_area, buckets.multiple, buckets.aspect_ratios)
    except InputError as error:
        report.faults.append(str(error))
    if config.train.coarse_steps >= config.train.max_train_steps:
        report.warnings.append(
            "train.coarse_steps is not below train.max_train_steps: every update is coarse (TA-FM alone)"
        )


def _check_loras(config: Config, shapes: Mapping[str, tuple[int, int]] | None, report: Report) -> None:
    named = [(_key(index, "lora"), effect.lora) for index, effect in enumerate(config.effects) if effect.lora]
    if config.student.init_from is not None:
        named.append(("student.init_from", config.student.init_from))
    if config.student.acceleration != "base" or shapes is not None:  # of an absent base nothing can be said
        try:
            if (acceleration := acceleration_of(config)) is not None:
                named.append(("student.acceleration", acceleration))
        except InputError as error:
            report.faults.append(str(error))
    report.faults += _missing("LoRA file", [item for item in named if not os.path.exists(item[1])], config)
    users: dict[Path, list[str]] = defaultdict(list)
    for key, path in named:
        users[path].append(key)
    for path, keys in users.items():
        if len(keys) > 1:
            report.warnings.append(f"{_shown(path, config)} is the LoRA of {' and '.join(keys)}; is that meant?")
        if os.path.exists(path):
            try:
                check_lora(path, shapes)
            except InputError as error:
                report.faults += [f"{keys[0]}: {fault}" for fault in error.faults]
    untaught = [effect.name for effect in config.effects if _is_untaught(effect, config)]
    if untaught:
        what = f"{_counted(len(untaught), 'effect')} without a teacher, first: {untaught[0]}"
        report.warnings.append(f"{what}; run `clora teach` before `clora train`")


def _is_untaught(effect: EffectConfig, config: Config) -> bool:
    return effect.lora is None and not os.path.exists(config.teacher_path(effect))


def _check_pairs(config: Config, report: Report) -> dict[str, list[Pair]]:
    """Read every dataset; the pairs by configuration key."""
    datasets: list[tuple[str, Path, bool, str | None]] = []
    for index, effect in enumerate(config.effects):
        if effect.pairs is None:
            report.faults.append(_no_pairs(index, effect))
        else:
            # Only teaching needs targets: a teacher makes its own.
            datasets.append((_key(index, "pairs"), effect.pairs, _is_untaught(effect, config), effect.name))
    if config.general is not None:
        datasets.append(("general.pairs", config.general.pairs, False, None))
    elif (not config.effects or config.objective.p_switch < 1) and not _brings_general_data(config):
        report.faults.append(
            "general: is missing; set general.pairs to images with instructions, or objective.p_switch=1"
        )
    absent = [(key, path) for key, path, _, _ in datasets if not os.path.exists(path)]
    report.faults += _missing("dataset", absent, config)
    found: dict[str, list[Pair]] = {}
    for key, path, require_target, name in datasets:
        if not os.path.exists(path):
            continue
        try:
            found[key] = read_pairs(path, config.data_roots, require_target=require_target, effect=name)
        except InputError as error:
            report.faults += [f"{key}: {fault}" for fault in error.faults]
    for pair in found.get("general.pairs", []):
        if pair.prompt is None:
            report.faults.append(f"general.pairs: {pair.place} has no instruction; add it")
    return found


def _no_pairs(index: int, effect: EffectConfig) -> str:
    what = "has no pairs; name a folder or file of source images"
    return f"effects.{index} ({effect.name}): {what}{'' if effect.lora else ' and targets, to teach it from'}"


def _brings_general_data(config: Config) -> bool:
    try:
        return general_data(config.base.model) is not None
    except InputError:
        return False  # the base's own fault is reported elsewhere


def _check_images(config: Config, pairs: dict[str, list[Pair]], report: Report) -> None:
    used: dict[Path, str] = {}
    for key, found in pairs.items():
        for pair in found:
            for path in (*pair.sources, *([pair.target] if pair.target else [])):
                used.setdefault(path, key)
    report.num_images = len(used)
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:  # decoding releases the GIL
        sizes = dict(zip(used, pool.map(_size_or_fault, used), strict=True))
    report.faults += [f"{used[path]}: {fault}" for path, fault in sizes.items() if isinstance(fault, str)]
    for key, found in pairs.items():
        differing = [pair for pair in found if _shapes_differ(pair, sizes)]
        if differing:
            report.warnings.append(
                f"{key}: {_counted(len(differing), 'pair')} with source and target of different shape, first:"
                f" {differing[0].place}; the crop will shift one against the other"
            )


def _size_or_fault(path: Path) -> Size | str:
    try:
        return load_image(path).size
    except InputError as error:
        return str(error)


def _shapes_differ(pair: Pair, sizes: dict[Path, Size | str]) -> bool:
    if pair.target is None:
        return False
    source, target = sizes[pair.source], sizes[pair.target]
    if isinstance(source, str) or isinstance(target, str):
        return False
    return abs(source[0] * target[1] / (source[1] * target[0]) - 1) > MAX_SHAPE_DIFFERENCE


def _check_prompts(config: Config, backbone: Backbone | None, report: Report) -> None:
    try:
        prompts = effect_prompts(config)
    except InputError as error:
        report.faults += error.faults
        return
    if backbone is None:
        return
    most = backbone.max_prompt_tokens
    for index, prompt in enumerate(prompts):
        for what, text in (("prompt", prompt.teacher_prompt), ("student_prompt", prompt.student_prompt)):
            length = backbone.count_prompt_tokens(text)
            if length > most:
                report.faults.append(
                    f"{_key(index, what)}: {length} tokens, more than the {most} the text encoder reads; shorten it"
                )


def _missing(what: str, items: Iterable[tuple[str, Path]], config: Config) -> list[str]:
    """One sentence per folder in which files are missing."""
    by_folder: dict[Path, list[tuple[str, Path]]] = defaultdict(list)
    for key, path in items:
        by_folder[path.parent].append((key, path))
    faults: list[str] = []
    for folder, missing in by_folder.items():
        key, path = missing[0]
        if len(missing) == 1:
            faults.append(f"{key}: {what} {_shown(path, config)} is missing; put it there or correct the path")
        else:
            faults.append(
                f"{len(missing)} {what}s missing under {_shown(folder, config)}/, first: {path.name} ({key});"
                " put them there or correct the paths"
            )
    return faults


def _key(index: int, field_name: str) -> str:
    return f"effects.{index}.{field_name}"


def _shown(path: Path, config: Config) -> str:
    """A path as the user wrote it where it lies below the configuration file, else in full."""
    return str(path.relative_to(config.folder)) if path.is_relative_to(config.folder) else str(path)


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"

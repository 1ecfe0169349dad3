"""Every fault of a run, found and listed before any weight is loaded.

`clora validate` and the jobs share these checks: the configuration, the base by its configurations, the pairs, the
LoRA files by their headers, the prompts by their tokens. What was read on the way is handed on, so that a run reads it
once.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from huggingface_hub import constants, try_to_load_from_cache

from clora.backbones.base import Backbone
from clora.backbones.load import linear_shapes, load_backbone, shipped_linear_shapes
from clora.config import Config, EffectConfig, Job, acceleration_of, resolve_base
from clora.data.dataset import effect_key, images_of, read_effects, read_general
from clora.data.images import aspect_buckets
from clora.data.pairs import Pair
from clora.distill.opened import CheckedRun
from clora.distill.stages import extend_warnings, idle_streams, teaching_warnings, training_warnings
from clora.distill.teachers import absent_files, given_loras, missing_teachers, untaught_effects
from clora.errors import InputError, missing_files, raise_faults, shown_path
from clora.lora.adapters import matching_linears
from clora.lora.summary import check_lora
from clora.method.prompts import EffectPrompt, effect_prompts

Shapes = Mapping[str, tuple[int, int]]


@dataclass
class Findings:
    """Faults stop a run, warnings do not."""

    faults: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def check_training(config: Config, job: Job = "train") -> CheckedRun:
    """The check of `train`, `cache` and `extend`: every effect has a teacher and pairs, targets only where
    `targets.source` is "pairs". Raises `InputErrors` with every fault."""
    found = Findings()
    backbone, shapes = _check_base(config, found)
    _check_places(config, found)
    _check_recipe(config, job, found)
    found.warnings += extend_warnings(config) if job == "extend" else training_warnings(config)
    _check_loras(config, shapes, backbone is not None, found)
    found.faults += missing_teachers(config)
    effects = read_effects(config, config.effects, _names(_with_targets(config)), found.faults, found.warnings)
    general = read_general(config, found.faults, found.warnings)
    _check_files(config, effects, general, found)
    prompts = _check_prompts(config, config.effects, backbone, _instructions(general), found)
    raise_faults(found.faults)
    return CheckedRun(config, effects, general, prompts, tuple(found.warnings))


def check_teaching(config: Config, effects: Sequence[EffectConfig]) -> CheckedRun:
    """The check of `teach`, for these effects of `config`, which become those of the run: sources and targets.

    Raises `InputErrors` with every fault.
    """
    found = Findings()
    backbone, _ = _check_base(config, found)
    _check_places(config, found)
    found.warnings += teaching_warnings(config)
    pairs = read_effects(config, effects, _names(effects), found.faults, found.warnings)
    _check_files(config, pairs, [], found)
    prompts = _check_prompts(config, effects, backbone, _captions(pairs), found)
    raise_faults(found.faults)
    found.warnings += _caption_notes(config, pairs)
    config = config.model_copy(update={"effects": list(effects)})
    return CheckedRun(config, pairs, [], prompts, tuple(found.warnings), captions=True)


def check_whole(config: Config, found: Findings) -> CheckedRun:
    """The check of `validate`, for a configuration that may still be taught and is then trained: faults and warnings
    go to `found`. Images are not looked at, which `validate` does in full."""
    backbone, shapes = _check_base(config, found)
    _check_places(config, found)
    _check_recipe(config, "train", found)
    found.warnings += training_warnings(config)
    if any(effect.lora is None for effect in config.effects):
        found.warnings += teaching_warnings(config)
    _check_loras(config, shapes, backbone is not None, found)
    if untaught := untaught_effects(config):
        count = f"{len(untaught)} effect{'' if len(untaught) == 1 else 's'} without a teacher"
        found.warnings.append(f"{count}, first: {untaught[0].name}; run `clora teach` before `clora train`")
    # Only teaching needs targets: a teacher makes its own.
    with_targets = _names([*untaught, *_with_targets(config)])
    effects = read_effects(config, config.effects, with_targets, found.faults, found.warnings)
    taught = {name: effects.get(name, []) for name in _names(untaught)}
    found.warnings += _caption_notes(config, taught)
    general = read_general(config, found.faults, found.warnings)
    prompts = _check_prompts(config, config.effects, backbone, _instructions(general) + _captions(taught), found)
    return CheckedRun(config, effects, general, prompts)


def _caption_notes(config: Config, effects: Mapping[str, Sequence[Pair]]) -> list[str]:
    """Which captions teaching reads, a sentence for each effect that has some."""
    notes = []
    for name, pairs in effects.items():
        if count := sum(pair.prompt is not None for pair in pairs):
            what = f"the captions of {count} pair{'' if count == 1 else 's'}"
            notes.append(
                f"{effect_key(config, name, 'pairs')}: {what} are read by `clora teach` in place of its prompt"
            )
    return notes


def _captions(effects: Mapping[str, Sequence[Pair]]) -> list[tuple[str, str]]:
    """Place and text of every caption that teaching reads."""
    return [(pair.place, pair.prompt) for pairs in effects.values() for pair in pairs if pair.prompt is not None]


def _instructions(general: Sequence[Pair]) -> list[tuple[str, str]]:
    return [(f"general.pairs: {pair.place}", pair.prompt or "") for pair in general]


def _names(effects: Iterable[EffectConfig]) -> set[str]:
    return {effect.name for effect in effects}


def _with_targets(config: Config) -> list[EffectConfig]:
    """The effects whose pairs' own targets are trained on."""
    return config.effects if config.targets.source == "pairs" else []


def _check_base(config: Config, found: Findings) -> tuple[Backbone | None, Shapes | None]:
    """The base without its weights, for tokens and sizes, and the shapes (N, K) of the linears that
    `student.targets` names. None where the base is not sound or not on this machine; of a well-known one that is not,
    the shapes of all its linears."""
    on_hub = False
    try:
        base = resolve_base(config.base.model)
        on_hub = not isinstance(base, Path)
        folder = base if isinstance(base, Path) else _snapshot(config, found)
        if folder is None:
            return None, shipped_linear_shapes(base)
        backbone = load_backbone(folder, components=(), quantize=config.base.quantize)
        shapes = linear_shapes(folder)
    except InputError as error:
        if on_hub:
            what = f"the local hub cache has not all of {config.base.model} ({error.faults[0]})"
            found.warnings.append(f"base: {what}; the first run downloads the rest")
        else:
            found.faults += [f"base: {fault}" for fault in error.faults]
        return None, None
    try:
        return backbone, {
            name: shapes[name] for name in matching_linears(shapes, config.student.targets or backbone.default_targets)
        }
    except InputError as error:
        found.faults += [f"student.targets: {fault}" for fault in error.faults]
        return backbone, shapes


def _snapshot(config: Config, found: Findings) -> Path | None:
    """The folder that the hub's client keeps a base in; None where it is not on this machine."""
    base = config.base.model
    index = try_to_load_from_cache(base, "model_index.json", revision=config.base.revision)
    if isinstance(index, str):
        return Path(index).parent
    if constants.HF_HUB_OFFLINE:
        what = f"{base} is not in the local hub cache and HF_HUB_OFFLINE is set"
        found.faults.append(f"base: {what}; download it first or name a folder")
    else:
        found.warnings.append(f"base: {base} is not in the local hub cache; the first run downloads it")
    return None


def _check_places(config: Config, found: Findings) -> None:
    """Where data lie and results go, and the board that figures are sent to."""
    board = config.train.report_to
    if board != "none" and find_spec(board) is None:
        found.faults.append(f"train.report_to: {board} is not installed; `pip install {board}`, or set it to none")
    for index, root in enumerate(config.data_roots):
        if not os.path.isdir(root):
            found.faults.append(f"data_roots.{index}: {root} is not a folder; correct it")
    place = config.output_dir
    while not os.path.exists(place) and place != place.parent:
        place = place.parent
    if not place.is_dir():
        found.faults.append(f"output_dir: {place} is a file; choose another folder")
    elif not os.access(place, os.W_OK | os.X_OK):
        found.faults.append(f"output_dir: no permission to write into {place}; choose another folder")
    try:
        buckets = config.train.buckets
        aspect_buckets(buckets.max_area, buckets.multiple, buckets.aspect_ratios)
    except InputError as error:
        found.faults.append(str(error))


def _check_recipe(config: Config, job: Job, found: Findings) -> None:
    """What a run would otherwise find out about its settings after hours: streams without a loss, too few slots for
    the teachers of a batch."""
    train, objective = config.train, config.objective
    found.faults += idle_streams(config)
    coarse = train.coarse_steps > 0 and train.coarse_target == "velocity"
    follows = job == "extend" or objective.imitation_weight > 0 or coarse  # TA-FM's samples have a teacher there
    size = max(train.batch_size, (train.anchor_batch_size or 0) if follows else 0)
    needed = min(size, len({config.teacher_path(effect) for effect in config.effects}))
    if train.teacher_slots < needed:
        what = f"{train.teacher_slots}, but a batch may need {needed} different teachers"
        found.faults.append(f"train.teacher_slots: {what}; raise it, or lower the batch sizes")
    if objective.imitation_weight and objective.imitation == "same_step" and not config.effects:
        what = "same_step imitates the effects' teachers, and there are no effects"
        found.faults.append(f"objective.imitation: {what}; give effects, or set it to segment_mean")


def _check_loras(config: Config, shapes: Shapes | None, base_is_here: bool, found: Findings) -> None:
    """Hold every LoRA file that is there against the base's linears, by its header; those missing are faults."""
    named = given_loras(config)
    if config.student.init_from is not None:
        named.append(("student.init_from", config.student.init_from))
    named += _accelerations(config, base_is_here, found)
    found.faults += missing_files("LoRA file", absent_files(named), config.folder)
    users: dict[Path, list[str]] = defaultdict(list)
    for key, path in (*named, *_taught_loras(config)):
        users[path].append(key)
    for path, keys in users.items():
        if len(keys) > 1:
            what = f"{shown_path(path, config.folder)} is the LoRA of {' and '.join(keys)}"
            found.warnings.append(f"{what}; is that meant?")
        if os.path.isdir(path):
            found.faults.append(f"{keys[0]}: {shown_path(path, config.folder)} is a folder; name the LoRA file in it")
        elif os.path.exists(path):
            try:
                summary = check_lora(path, shapes)
                found.warnings += [f"{keys[0]}: {note}" for note in summary.notes]
            except InputError as error:
                found.faults += [f"{keys[0]}: {fault}" for fault in error.faults]
                continue
            if path == config.student.init_from and summary.max_rank > config.student.rank:
                what = f"has rank {summary.max_rank}, more than student.rank ({config.student.rank})"
                found.faults.append(f"student.init_from: {what}; raise that, or use `clora convert --rank` on the file")


def _accelerations(config: Config, base_is_here: bool, found: Findings) -> list[tuple[str, Path]]:
    """Key and file of the acceleration LoRAs; student and targets may share one."""
    named: dict[Path, str] = {}
    sections: tuple[tuple[Literal["student", "targets"], object], ...] = (
        ("student", config.student.acceleration),
        ("targets", config.targets.acceleration),
    )
    for section, asked in sections:
        if asked == "base" and not base_is_here:
            continue  # nothing can be said
        try:
            if (path := acceleration_of(config, section)) is not None:
                named.setdefault(path, f"{section}.acceleration")
        except InputError as error:
            found.faults.append(str(error))
    return [(key, path) for path, key in named.items()]


def _taught_loras(config: Config) -> list[tuple[str, Path]]:
    """Effect and file of every teacher that `clora teach` has written."""
    taught = [(effect_key(config, e.name), config.teacher_path(e)) for e in config.effects if e.lora is None]
    return [(key, path) for key, path in taught if os.path.exists(path)]


def _check_files(config: Config, effects: Mapping[str, list[Pair]], general: Sequence[Pair], found: Findings) -> None:
    """Every image is there and may be read; whether it can be decoded shows when it is encoded."""
    datasets = {effect_key(config, name, "pairs"): pairs for name, pairs in effects.items()}
    for key, pairs in (*datasets.items(), ("general.pairs", general)):
        barred = [path for path in images_of(pairs) if not os.access(path, os.R_OK)]
        if len(barred) == 1:
            found.faults.append(f"{key}: {barred[0]} is missing or may not be read; put it there or give permission")
        elif barred:
            what = f"{len(barred)} images are missing or may not be read, first: {barred[0]}"
            found.faults.append(f"{key}: {what}; put them there or give permission")


def _check_prompts(
    config: Config,
    effects: Sequence[EffectConfig],
    backbone: Backbone | None,
    others: Sequence[tuple[str, str]],
    found: Findings,
) -> dict[str, EffectPrompt]:
    """The effects' prompts; where the base is on this machine, all that is encoded is counted in its tokens: these, the
    negative prompt, and `others`, each with its place."""
    try:
        prompts = {p.name: p for p in effect_prompts(config.model_copy(update={"effects": list(effects)}))}
    except InputError as error:
        found.faults += error.faults
        return {}
    if backbone is None:
        return prompts
    most = backbone.max_prompt_tokens
    texts = [
        (effect_key(config, name, what), text)
        for name, prompt in prompts.items()
        for what, text in (("prompt", prompt.teacher_prompt), ("student_prompt", prompt.student_prompt))
    ]
    texts += [("objective.negative_prompt", config.objective.negative_prompt), *others]
    for key, text in texts:
        length = backbone.count_prompt_tokens(text)
        if length > most:
            found.faults.append(f"{key}: {length} tokens, more than the {most} the text encoder reads; shorten it")
    return prompts

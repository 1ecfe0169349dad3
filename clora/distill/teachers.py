"""The teachers' files: given, taught, or missing."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from clora.config import Config, EffectConfig
from clora.data.dataset import effect_key
from clora.errors import missing_files, raise_faults, shown_path


def teacher_files(config: Config) -> dict[str, Path]:
    """Each effect's teacher: its `lora`, or what `clora teach` wrote. Raises `InputErrors` with all that lack one."""
    absent = missing_files("LoRA file", absent_files(given_loras(config)), config.folder)
    raise_faults([*absent, *missing_teachers(config)])
    return {effect.name: config.teacher_path(effect) for effect in config.effects}


def given_loras(config: Config) -> list[tuple[str, Path]]:
    """Key and file of every effect that names its LoRA."""
    return [(effect_key(config, e.name, "lora"), e.lora) for e in config.effects if e.lora is not None]


def absent_files(named: Iterable[tuple[str, Path]]) -> list[tuple[str, Path]]:
    return [(key, path) for key, path in named if not os.path.exists(path)]


def untaught_effects(config: Config) -> list[EffectConfig]:
    """The effects without a LoRA, which `clora teach` has still to make."""
    return [e for e in config.effects if e.lora is None and not os.path.exists(config.teacher_path(e))]


def missing_teachers(config: Config) -> list[str]:
    """One fault for all effects that were not taught."""
    untaught = untaught_effects(config)
    if not untaught:
        return []
    mend = "run `clora teach` first, or give LoRA files in 'lora'"
    first = f"{untaught[0].name} ({shown_path(config.teacher_path(untaught[0]), config.folder)})"
    if len(untaught) == 1:
        return [f"{effect_key(config, untaught[0].name)}: no teacher at {config.teacher_path(untaught[0])}; {mend}"]
    return [f"{len(untaught)} effects have no teacher, first: {first}; {mend}"]

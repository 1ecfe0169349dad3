"""The pairs of a configuration: reading with every fault under its key, hashing, batching."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

from clora.config import Config, EffectConfig, general_data
from clora.data.pairs import Pair, read_dataset
from clora.errors import InputError, missing_files
from clora.io.digest import file_digest


def effect_key(config: Config, name: str, field: str | None = None) -> str:
    """How messages name an effect, or one of its fields: `effects.3 (clay)`, `effects.3.pairs`."""
    index = next(index for index, effect in enumerate(config.effects) if effect.name == name)
    return f"effects.{index} ({name})" if field is None else f"effects.{index}.{field}"


def read_effects(
    config: Config,
    effects: Sequence[EffectConfig],
    with_targets: Collection[str],
    faults: list[str],
    warnings: list[str],
) -> dict[str, list[Pair]]:
    """The pairs of these effects of `config` by name; those named in `with_targets` must have target images.

    What is wrong is added to `faults`, what of a dataset was left out to `warnings`, each under its configuration key;
    an effect with faults is left out.
    """
    named: list[EffectConfig] = []
    for effect in effects:
        if effect.pairs is not None:
            named.append(effect)
            continue
        targets = " and targets" if effect.name in with_targets else ""
        why = ", to teach it from" if targets and effect.lora is None else ""
        what = f"has no pairs; name a folder or file of source images{targets}{why}"
        faults.append(f"{effect_key(config, effect.name)}: {what}")
    datasets = [
        (effect_key(config, effect.name, "pairs"), effect.pairs, effect.name) for effect in named if effect.pairs
    ]
    absent = [(key, path) for key, path, _ in datasets if not os.path.exists(path)]
    faults += missing_files("dataset", absent, config.folder)
    found: dict[str, list[Pair]] = {}
    for key, path, name in datasets:
        if (key, path) in absent:
            continue
        try:
            dataset = read_dataset(path, config.data_roots, require_target=name in with_targets, effect=name)
        except InputError as error:
            faults += [f"{key}: {fault}" for fault in error.faults]
            continue
        found[name] = dataset.pairs
        warnings += [f"{key}: {sentence}" for sentence in dataset.left_out]
    return found


def read_general(config: Config, faults: list[str], warnings: list[str]) -> list[Pair]:
    """The pairs of the general stream, the configuration's or those that the base brings along.

    Without effects there is no other stream; with them it is needed unless `objective.p_switch` is 1. What is wrong
    is added to `faults`.
    """
    if config.general is not None:
        key, path = "general.pairs", config.general.pairs
        if not os.path.exists(path):
            faults += missing_files("dataset", [(key, path)], config.folder)
            return []
    else:
        brought = _general_of_base(config)
        if brought is None:
            if not config.effects or config.objective.p_switch < 1:
                other = "objective.p_switch=1" if config.effects else "effects to some"
                faults.append(f"general: is missing; set general.pairs to images with instructions, or {other}")
            return []
        key, path = f"general data of base {config.base.model}", brought
    try:
        dataset = read_dataset(path, config.data_roots, require_target=False)
    except InputError as error:
        faults += [f"{key}: {fault}" for fault in error.faults]
        return []
    pairs = dataset.pairs
    warnings += [f"{key}: {sentence}" for sentence in dataset.left_out]
    silent = [pair.place for pair in pairs if not pair.prompt]
    if len(silent) == 1:
        faults.append(f"{key}: {silent[0]} has no instruction; add it")
    elif silent:
        faults.append(f"{key}: {len(silent)} rows have no instruction, first: {silent[0]}; add them or drop the rows")
    return pairs


def _general_of_base(config: Config) -> Path | None:
    try:
        return general_data(config.base.model)
    except InputError:
        return None  # what is wrong with the base itself is told elsewhere


def images_of(pairs: Iterable[Pair]) -> list[Path]:
    """Every source and target image of the pairs, each once."""
    return list(dict.fromkeys(path for pair in pairs for path in (*pair.sources, pair.target) if path is not None))


def hash_pairs(pairs: Sequence[Pair]) -> str:
    """SHA-256 (hex) over the contents of all images and the prompts of a dataset, in order; names do not count.

    Raises `InputError` for an image that cannot be read.
    """
    digest = hashlib.sha256()
    for pair in pairs:
        for path in (*pair.sources, *([pair.target] if pair.target else [])):
            digest.update(file_digest(path))
        digest.update(hashlib.sha256(repr((len(pair.sources), pair.target is None, pair.prompt)).encode()).digest())
    return digest.hexdigest()


class HasSizes(Protocol):
    """What can be batched: `sizes` are equal where two may share a batch."""

    @property
    def sizes(self) -> object: ...


Item = TypeVar("Item", bound=HasSizes)


def in_batches(items: Sequence[Item], size: int) -> Iterable[list[Item]]:
    """Consecutive batches of examples that share their sizes."""
    groups: dict[object, list[Item]] = {}
    for item in items:
        groups.setdefault(item.sizes, []).append(item)
    for group in groups.values():
        for start in range(0, len(group), size):
            yield group[start : start + size]

"""The pairs of a configuration: reading, hashing, batching."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

from clora.config import Config, EffectConfig
from clora.data.examples import Example
from clora.data.pairs import Pair, read_pairs
from clora.errors import InputError
from clora.io.digest import file_digest


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


def effect_pairs(config: Config, effect: EffectConfig) -> list[Pair]:
    """The pairs of one effect. An effect with its own LoRA needs no targets."""
    if effect.pairs is None:
        raise InputError(f"effect {effect.name}: has no pairs; give 'pairs', a folder or metadata file")
    return read_pairs(effect.pairs, config.data_roots, require_target=effect.lora is None, effect=effect.name)


def in_batches(items: Sequence[Example], size: int) -> Iterable[list[Example]]:
    """Consecutive batches of examples that share their sizes."""
    groups: dict[object, list[Example]] = {}
    for item in items:
        groups.setdefault(item.sizes, []).append(item)
    for group in groups.values():
        for start in range(0, len(group), size):
            yield group[start : start + size]

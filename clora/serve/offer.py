"""What is served, in plain values: effects, schedule, sizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

OutputFormat = Literal["png", "jpeg", "webp"]


@dataclass(frozen=True)
class Effect:
    """One effect: its trigger, and the whole of what the model reads for it."""

    name: str
    trigger: str
    prompt: str


@dataclass(frozen=True)
class Collection:
    """A collection's catalogue; `digest` is the SHA-256 of its file."""

    base: str
    digest: str
    effects: Mapping[str, Effect]
    num_steps: int
    shift: float
    sampler: str


@dataclass(frozen=True)
class Offer:
    """A collection under the name of a model; a token's side in pixels, the pixels of a result at most."""

    name: str
    collection: Collection
    unit: int
    result_pixels: int

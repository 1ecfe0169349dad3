"""What a run has in hand: what its check read, the open base, and the encoded data."""

from __future__ import annotations

from dataclasses import dataclass, replace

from clora.backbones.base import Backbone
from clora.config import Config
from clora.data.cache import TensorCache
from clora.data.examples import Example, ExampleEncoder
from clora.data.pairs import Pair
from clora.lora.adapters import Adapters
from clora.method.prompts import EffectPrompt


@dataclass(frozen=True)
class CheckedRun:
    """A run without a fault, and what was read to know that. `effects` and `prompts` are by effect, in the
    configuration's order; an effect without sound pairs is left out where faults were listed, not raised."""

    config: Config
    effects: dict[str, list[Pair]]
    general: list[Pair]
    prompts: dict[str, EffectPrompt]
    warnings: tuple[str, ...] = ()
    captions: bool = False  # whether pairs' own captions are learned from: teachers do, in place of the effect's prompt

    def first_pairs(self, count: int | None) -> CheckedRun:
        """The same run on the first `count` pairs of each effect; None: all."""
        return replace(self, effects={name: pairs[:count] for name, pairs in self.effects.items()})


@dataclass(frozen=True)
class OpenBase:
    """A base with its adapters, and what encodes for it. Nothing of it is replaced while it is open; with
    `dataclasses.replace` a job makes another."""

    config: Config
    backbone: Backbone
    adapters: Adapters
    cache: TensorCache
    identity: str
    encoder: ExampleEncoder


@dataclass(frozen=True)
class Workspace(OpenBase):
    """An open base with a run's encoded data. `prompts` and `effects` keep the configuration's order."""

    prompts: dict[str, EffectPrompt]
    effects: dict[str, list[Example]]
    general: list[Example]
    hashes: dict[str, str]  # sha256 of the base and of each dataset

"""What the check of a run hands on to the run itself."""

from __future__ import annotations

from dataclasses import dataclass, replace

from clora.config import Config
from clora.data.pairs import Pair
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

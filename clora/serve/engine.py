"""What makes pictures, as the routes see it: two forms, threads of this process or a process of its own, one door."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from PIL import Image

from clora.serve.offer import Offer

OnPhase = Callable[[str, float, int | None], None]
"""on_phase(name, seconds, pictures worked on together; None where that is no lane), from any thread."""


class EngineGone(RuntimeError):
    """The engine ended, or was stopped, with the work in it."""


class Full(Exception):
    """As many samples wait as may; try again later."""


class Late(TimeoutError):
    """The work's time ran out before it was done."""


@dataclass(frozen=True, eq=False)
class Work:
    """An edit as an engine takes it: RGB `images`, the last of which is edited; what the `model` of that name reads;
    the result's (height, width), None for the shape of the last image; one result a seed. `effect` is for counters
    alone. After `seconds` it is given up."""

    model: str
    images: tuple[Image.Image, ...]
    text: str
    size: tuple[int, int] | None
    seeds: tuple[int, ...]
    effect: str
    seconds: float


class Engine(Protocol):
    """`offers` by the model's name; `on_phase` is set by whoever counts."""

    on_phase: OnPhase

    @property
    def offers(self) -> Mapping[str, Offer]:
        """What can be asked for, by name."""

    async def edit(self, work: Work, on_step: Callable[[], None]) -> list[Image.Image]:
        """The pictures of `work`; `on_step` is called after each step of each sample, from any thread. Cancelled, its
        samples leave their batch at the next step.

        Raises `Full`, `Late`, `EngineGone`, FloatingPointError for an output that is not finite, `InputError` for what
        the model cannot take (free of the places of files), and RuntimeError where the engine failed.
        """

    def stats(self) -> Mapping[str, Mapping[str, float]]:
        """`StepBatcher.stats` of each model, by name."""

    @property
    def is_alive(self) -> bool:
        """Whether it takes work, and gets on with what it has."""

    def restart(self) -> bool:
        """Begin anew where it is not alive, without waiting for it; what was in it is lost (`EngineGone`). Says whether
        it did: not while it starts already."""

    def close(self) -> None:
        """End it, with the work in it."""

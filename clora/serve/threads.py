"""The engine as threads of this process: models side by side."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

from PIL import Image

from clora.inference.batching import Expired, QueueFull
from clora.serve.engine import EngineGone, Full, Late, OnPhase, Work
from clora.serve.lanes import Closed
from clora.serve.models import Model, Parts
from clora.serve.offer import Offer
from clora.serve.settings import Settings


class ThreadEngine:
    """`Engine` over models opened in this process."""

    def __init__(self, opened: Mapping[str, Parts], settings: Settings) -> None:
        self.on_phase: OnPhase = lambda phase, seconds, number: None
        self.models = {
            name: Model(parts, settings.batches, settings.stall_seconds, self._note) for name, parts in opened.items()
        }

    @property
    def offers(self) -> Mapping[str, Offer]:
        return {name: model.parts.offer for name, model in self.models.items()}

    async def edit(self, work: Work, on_step: Callable[[], None]) -> list[Image.Image]:
        try:
            return await self.models[work.model].edit(work, on_step)
        except QueueFull as error:
            raise Full(str(error)) from error
        except Expired as error:
            raise Late(str(error)) from error
        except Closed as error:
            raise EngineGone(str(error)) from error
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            raise EngineGone("its samples were cancelled") from error  # by a restart

    def stats(self) -> Mapping[str, Mapping[str, float]]:
        return {name: model.batcher.stats() for name, model in self.models.items()}

    @property
    def is_alive(self) -> bool:
        # Each is asked, because each notes its progress when it is.
        return all([model.is_alive for model in self.models.values()])

    def restart(self) -> bool:
        gone = [model for model in self.models.values() if not model.is_alive]
        for model in gone:
            model.restart()
        return bool(gone)

    def close(self) -> None:
        for model in self.models.values():
            model.close(drain=False, timeout=5)

    def _note(self, phase: str, seconds: float, number: int | None) -> None:
        self.on_phase(phase, seconds, number)

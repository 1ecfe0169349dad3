"""A server's parts in one place, and whether it takes requests."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from clora.serve.engine import Engine
from clora.serve.jobs import Jobs
from clora.serve.limits import Quotas, Room, Uploads
from clora.serve.metrics import Metrics
from clora.serve.offer import Offer
from clora.serve.problems import Problem
from clora.serve.settings import Settings

log = logging.getLogger(__name__)

WATCH = 0.5  # seconds between looks at the engine


class Service:
    """What the routes share. `keys`: hashes by name, None where everybody may call. `effects_at`: where a client finds
    the effects."""

    def __init__(
        self,
        settings: Settings,
        engine: Engine,
        keys: Mapping[str, str] | None = None,
        effects_at: str = "GET /v1/effects",
    ) -> None:
        limits = settings.limits
        self.settings, self.engine, self.keys, self.effects_at = settings, engine, keys, effects_at
        self.jobs = Jobs(limits.result_seconds, limits.results_kept)
        self.quotas = Quotas(limits.requests_per_minute, limits.burst, limits.concurrent)
        self.uploads = Uploads(limits.uploads)
        self.pictures = Room(limits.waiting_bytes)
        self.pool = ThreadPoolExecutor(settings.decode_threads, "pictures")
        self.metrics = Metrics(engine.stats, lambda: self.is_ready)
        engine.on_phase = self.metrics.on_phase
        self.is_draining = False
        self.thumbnails: dict[tuple[str, str], str] = {}  # data URLs of results by model and effect
        self.thumbnail_source: str | None = None

    @property
    def offers(self) -> Mapping[str, Offer]:
        """The models by name."""
        return self.engine.offers

    @property
    def is_ready(self) -> bool:
        """Whether edits are taken."""
        return not self.is_draining and self.engine.is_alive

    def check_open(self) -> None:
        """Raise `Problem` 503 while edits are not taken."""
        if self.is_draining:
            raise Problem(503, "the server is shutting down; try another, or later", "draining", retry_after=5)
        if not self.engine.is_alive:
            raise Problem(503, "the engine is being started anew; try again", "engine_down", retry_after=2)

    def reserve(self, samples: int) -> None:
        """Raise `Problem` 503 where so many more samples do not fit into the queue."""
        batches, waiting = self.settings.batches, self.jobs.samples_in_flight()
        if waiting + samples > batches.max_queue + batches.denoise:
            message = f"{waiting} samples are waiting, no more than {batches.max_queue} may; try again"
            raise Problem(503, message, "queue_full", retry_after=self.seconds_for(waiting))

    def seconds_for(self, samples: int) -> float:
        """About how long so many samples take, from 1 to 60 s."""
        rate = 0.0
        for name, stats in self.engine.stats().items():
            rate += stats["steps_per_second"] * stats["batch_mean"] / self.offers[name].collection.num_steps
        return min(60.0, max(1.0, samples / rate)) if rate > 0 else 5.0

    def revive(self) -> bool:
        """Start the engine anew where it is gone or hangs; says whether that was begun."""
        if self.engine.is_alive or not self.engine.restart():
            return False
        self.metrics.restarts.inc()
        return True

    async def watch(self) -> None:
        """Start the engine anew whenever it is gone or hangs; ends when it is cancelled."""
        while True:
            await asyncio.sleep(WATCH)
            try:
                self.revive()
            except Exception as error:
                log.error("the engine could not be started anew", exc_info=error)

    def facts(self, model: str) -> dict[str, Any]:
        """What a model's results are made by, whatever they are of."""
        offer = self.offers[model]
        collection = offer.collection
        return {
            "model": offer.name,
            "collection": f"sha256:{collection.digest}",
            "sampler": collection.sampler,
            "steps": collection.num_steps,
            "shift": collection.shift,
        }

    def close(self) -> None:
        """End the engine and all threads."""
        self.engine.close()
        self.pool.shutdown(wait=False, cancel_futures=True)

"""A thread that works on what is waiting for it, like items together."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from typing import Generic, TypeVar

log = logging.getLogger(__name__)

Item = TypeVar("Item")
Made = TypeVar("Made")


class Closed(RuntimeError):
    """The lane takes nothing more."""


class Lane(Generic[Item, Made]):
    """Runs `work` on up to `max_batch` items of one `key` at a time, oldest first, in a thread of its own.

    `work` returns one result for each item, in order. Where it raises for several items each is tried alone, so that
    one bad item harms no other. Items whose future was cancelled are left out.
    """

    def __init__(
        self,
        name: str,
        work: Callable[[Sequence[Item]], Sequence[Made]],
        key: Callable[[Item], Hashable],
        max_batch: int,
    ) -> None:
        self._work, self._key, self._max_batch = work, key, max_batch
        self._waiting: deque[tuple[Item, Future[Made]]] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._began: float | None = None  # when the work at hand did
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, item: Item) -> Future[Made]:
        """Queue an item; raises `Closed` once the lane is closed or its thread is gone."""
        future: Future[Made] = Future()
        with self._changed:
            if self._closed or not self.is_alive:
                raise Closed(f"{self._thread.name} is closed")
            self._waiting.append((item, future))
            self._changed.notify()
        return future

    @property
    def is_alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    @property
    def busy_seconds(self) -> float:
        """How long the batch at hand has been worked on; 0 where there is none."""
        began = self._began
        return 0.0 if began is None else time.monotonic() - began

    def close(self) -> None:
        """Let the thread end after the batch at hand; what waits is cancelled."""
        with self._changed:
            self._closed = True
            left = list(self._waiting)
            self._waiting.clear()
            self._changed.notify()
        for _, future in left:
            future.cancel()
        self._thread.join(timeout=30)

    def _run(self) -> None:
        while batch := self._next():
            items = [item for item, _ in batch]
            try:
                for (_, future), made in zip(batch, self._timed(items), strict=True):
                    future.set_result(made)
            except Exception as error:
                if len(batch) == 1:
                    batch[0][1].set_exception(error)
                    continue
                log.warning("a batch of %d failed and is tried one by one", len(batch))
                for item, future in batch:
                    if not future.done():
                        self._alone(item, future)

    def _timed(self, items: Sequence[Item]) -> Sequence[Made]:
        self._began = time.monotonic()
        try:
            return self._work(items)
        finally:
            self._began = None

    def _alone(self, item: Item, future: Future[Made]) -> None:
        try:
            future.set_result(self._timed([item])[0])
        except Exception as error:
            future.set_exception(error)

    def _next(self) -> list[tuple[Item, Future[Made]]]:
        """The next batch; an empty one ends the thread."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if self._closed:
                    return []
                key = self._key(self._waiting[0][0])
                fitting = [pair for pair in self._waiting if self._key(pair[0]) == key][: self._max_batch]
                taken = {id(pair) for pair in fitting}  # items have no equality that could be asked for
                self._waiting = deque(pair for pair in self._waiting if id(pair) not in taken)
            if batch := [pair for pair in fitting if pair[1].set_running_or_notify_cancel()]:
                return batch

"""How much may be asked for: of one key a rate and a number of requests at a time, of all together the bodies that are
being read and the memory of the pictures that were."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from clora.serve.problems import Problem

MOST_OWNERS = 10_000
SLOW_AFTER = 1.0  # seconds before a body's rate tells something


@dataclass
class _Owner:
    tokens: float
    seen: float
    running: int = 0


class Quotas:
    """A token bucket and a count of requests for each owner. It belongs to the event loop: no locks."""

    def __init__(self, per_minute: int, burst: int, concurrent: int, now: Callable[[], float] = time.monotonic) -> None:
        self._per_second, self._burst, self._concurrent, self._now = per_minute / 60, burst, concurrent, now
        self._owners: OrderedDict[str, _Owner] = OrderedDict()

    @property
    def running(self) -> int:
        """Requests being worked on, of all owners."""
        return sum(state.running for state in self._owners.values())

    @contextmanager
    def request(self, owner: str) -> Iterator[None]:
        """Count a request while the block runs; `Problem` 429 where the owner has too many, or asks too fast."""
        state = self._owner(owner)
        if state.running >= self._concurrent:
            message = f"{self._concurrent} requests of this key are being worked on; wait for one of them"
            raise Problem(429, message, "too_many_concurrent", retry_after=1)
        if state.tokens < 1:
            wait = (1 - state.tokens) / self._per_second
            message = f"more than {self._per_second * 60:g} requests a minute; try again in {wait:.1f} s"
            raise Problem(429, message, "rate_limit_exceeded", retry_after=wait + 0.5)
        state.tokens -= 1
        state.running += 1
        try:
            yield
        finally:
            state.running -= 1

    def _owner(self, name: str) -> _Owner:
        now = self._now()
        state = self._owners.setdefault(name, _Owner(self._burst, now))
        self._owners.move_to_end(name)
        state.tokens = min(self._burst, state.tokens + (now - state.seen) * self._per_second)
        state.seen = now
        while len(self._owners) > MOST_OWNERS:
            idle = next((known for known, other in self._owners.items() if not other.running), None)
            if idle is None or idle == name:
                break
            del self._owners[idle]
        return state


@dataclass(eq=False)
class Upload:
    """A body that is being read. Its reader counts `received` bytes and puts the `timeout` there under which it reads,
    None once it has everything."""

    started: float = field(default_factory=time.monotonic)
    received: int = 0
    timeout: asyncio.Timeout | None = None
    had_to_go: bool = False

    @property
    def rate(self) -> float:
        """Bytes a second."""
        return self.received / max(1e-6, time.monotonic() - self.started)

    @property
    def is_slow(self) -> bool:
        """Whether it may have to go, for a quicker one."""
        return self.timeout is not None and time.monotonic() - self.started > SLOW_AFTER


class Uploads:
    """Room for `most` bodies at a time, as each takes memory. It belongs to the event loop."""

    def __init__(self, most: int) -> None:
        self._most, self._held = most, list[Upload]()

    @contextmanager
    def one(self) -> Iterator[Upload]:
        """Room for a body while the block runs. Where there is none, the slowest of those that have had their second
        has to go, so that clients that trickle keep nobody out; `Problem` 503 where none is slow."""
        if len(self._held) >= self._most:
            slow = [upload for upload in self._held if upload.is_slow]
            if not slow:
                raise Problem(503, "too many uploads at once; try again", "too_many_uploads", retry_after=1)
            self._end(min(slow, key=lambda upload: upload.rate))
        upload = Upload()
        self._held.append(upload)
        try:
            yield upload
        finally:
            if upload in self._held:
                self._held.remove(upload)

    def _end(self, upload: Upload) -> None:
        assert upload.timeout is not None
        self._held.remove(upload)
        upload.had_to_go = True
        upload.timeout.reschedule(asyncio.get_running_loop().time())


class Room:
    """`most` bytes for what all requests together keep in memory. It belongs to the event loop."""

    def __init__(self, most: int) -> None:
        self._most, self.held = most, 0

    @contextmanager
    def hold(self, num_bytes: int, retry_after: Callable[[], float]) -> Iterator[None]:
        """So many bytes while the block runs; `Problem` 503 where others hold too much. One that is alone is let in
        whatever it needs: the budgets of a request bound that, and it could never be."""
        if self.held and self.held + num_bytes > self._most:
            message = "the pictures that are waiting fill the memory for them; try again"
            raise Problem(503, message, "queue_full", retry_after=retry_after())
        self.held += num_bytes
        try:
            yield
        finally:
            self.held -= num_bytes

"""How much one key may ask for: a rate, and a number of requests at a time."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from clora.serve.problems import Problem

MOST_OWNERS = 10_000


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

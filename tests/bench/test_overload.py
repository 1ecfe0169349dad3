"""The goodput of an overload counts the time until the last answer, by a clock that the test turns."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from bench.serving import overload

CAPACITY, LATE = 2.0, 5.0


class Clock:
    now = 100.0


class Client:
    """One edit takes a second; the last answer of the overload comes LATE seconds after the last arrival."""

    def __init__(self, clock: Clock, wait: object) -> None:
        self.clock, self.wait = clock, wait

    async def capacity(self, seconds: float) -> float:
        return CAPACITY

    async def edit(self) -> tuple[int, float]:
        await self.wait(0)  # type: ignore[operator]
        self.clock.now += 1
        return 200, 1.0

    async def open_loop(self, rate: float, seconds: float) -> list[tuple[int, float]]:
        assert rate == overload.TIMES * CAPACITY
        end = self.clock.now + seconds + LATE
        while self.clock.now < end:
            await self.wait(0)  # type: ignore[operator]
            if self.clock.now >= end - LATE:
                self.clock.now = end
        return [(200, 1.0)] * 42 + [(429, 0.1)] * 7


def test_measure_divides_what_was_made_by_the_time_until_the_last_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, wait = Clock(), asyncio.sleep

    async def sleep(seconds: float) -> None:
        await wait(0)
        clock.now += seconds

    @asynccontextmanager
    async def prepared(address: str, seed: int) -> AsyncIterator[Client]:
        yield Client(clock, wait)

    monkeypatch.setattr(overload.time, "perf_counter", lambda: clock.now)
    monkeypatch.setattr(overload.asyncio, "sleep", sleep)
    monkeypatch.setattr(overload, "prepared", prepared)
    monkeypatch.setattr(overload, "memory_mb", lambda pid: 7)
    found = asyncio.run(overload.measure("", 1, 16.0, 0))
    assert (found["made"], found["refused"]) == (42, 7)
    assert found["goodput_of_capacity"] == pytest.approx(42 / (16 + LATE) / CAPACITY, abs=0.06)

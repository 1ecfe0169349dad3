"""Edits that were asked for: where each stands, its progress as it comes, its results for a while.

Everything here belongs to the event loop; only `Job.note_step` is called from elsewhere.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal

from clora.serve.problems import Problem

State = Literal["queued", "running", "succeeded", "failed", "cancelled"]
FINAL = ("succeeded", "failed", "cancelled")
HEARTBEAT = 10.0  # seconds between lines of a silent stream, so that proxies keep it open


@dataclass(eq=False)
class Job:
    """One edit of one owner. `steps` counts those of all its samples; `answer` is what the edit's request gets."""

    id: str
    owner: str
    samples: int
    steps_in_all: int
    created: float
    number: int
    state: State = "queued"
    steps: int = 0
    answer: dict[str, Any] | None = None
    problem: Problem | None = None
    headers: dict[str, str] = field(default_factory=dict)
    task: asyncio.Task[None] | None = None
    ended: float | None = None
    cancel_asked: bool = False
    is_fetched: bool = False
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def is_over(self) -> bool:
        return self.state in FINAL

    def change(self, state: State | None = None) -> None:
        """Move on, and wake whoever watches."""
        if state is not None and not self.is_over:
            self.state = state
            self.ended = time.monotonic() if state in FINAL else None
        self._changed.set()
        self._changed = asyncio.Event()

    def note_step(self, loop: asyncio.AbstractEventLoop) -> None:
        """A sample has done a step; from any thread."""

        def note() -> None:
            self.steps += 1
            self.change("running" if self.state == "queued" else None)

        if not loop.is_closed():
            loop.call_soon_threadsafe(note)

    def cancel(self) -> None:
        """End the job: its samples leave their batch at the next step."""
        if not self.is_over:
            self.cancel_asked = True
            if self.task is not None:
                self.task.cancel()

    @property
    def changed(self) -> asyncio.Event:
        """Set at the next change; take it before looking at the job, so that none is missed."""
        return self._changed


class Jobs:
    """The jobs of a server. Finished ones are kept for `seconds`, `most` of them at most. Beyond that those of the
    owner who has most go first, so that nobody loses a result to another, and those without a result before others."""

    def __init__(self, seconds: float, most: int) -> None:
        self._seconds, self._most = seconds, most
        self._jobs: OrderedDict[str, Job] = OrderedDict()
        self._count = 0

    def add(self, owner: str, samples: int, steps_in_all: int) -> Job:
        """A new job."""
        self._forget()
        self._count += 1
        job = Job(f"job_{secrets.token_hex(16)}", owner, samples, steps_in_all, time.time(), self._count)
        self._jobs[job.id] = job
        return job

    def drop(self, job: Job) -> None:
        """Forget a job whose answer has been given."""
        self._jobs.pop(job.id, None)

    def find(self, owner: str, name: str) -> Job:
        """An owner's job; `Problem` 404 for one that is not there, is over for long, or is another's."""
        self._forget()
        job = self._jobs.get(name)
        if job is None or job.owner != owner:
            raise Problem(404, "there is no such job (results are kept for a while only)", "job_not_found", param="id")
        return job

    def running(self) -> list[Job]:
        """Those that are not over, oldest first."""
        return [job for job in self._jobs.values() if not job.is_over]

    def unfetched(self) -> bool:
        """Whether there are results that nobody has asked for yet."""
        return any(job.is_over and not job.is_fetched for job in self._jobs.values())

    def samples_in_flight(self) -> int:
        """Samples of the jobs that are not over."""
        return sum(job.samples for job in self.running())

    def describe(self, job: Job) -> dict[str, Any]:
        """A job as its owner sees it: `position` counts the samples that wait before it (0 once it runs)."""
        ahead = [other for other in self.running() if other.number < job.number and other.state == "queued"]
        position = sum(other.samples for other in ahead) + 1 if job.state == "queued" else 0
        error = None if job.problem is None else job.problem.to_json()["error"]
        return {
            "id": job.id,
            "object": "image.edit.job",
            "status": job.state,
            "created": int(job.created),
            "position": position,
            "samples": job.samples,
            "steps": job.steps,
            "steps_in_all": job.steps_in_all,
            "progress": round(job.steps / job.steps_in_all, 4),
            "error": error,
        }

    async def events(self, job: Job) -> AsyncIterator[bytes]:
        """Server-sent events: the job whenever it changes, the last when it is over."""
        shown = None
        while True:
            changed, now = job.changed, json.dumps(self.describe(job))
            yield b": still here\n\n" if now == shown else f"event: job\ndata: {now}\n\n".encode()
            shown = now
            if job.is_over:
                return
            with suppress(TimeoutError):
                await asyncio.wait_for(changed.wait(), HEARTBEAT)

    def _forget(self) -> None:
        now = time.monotonic()
        for job in [job for job in self._jobs.values() if job.ended is not None and now - job.ended > self._seconds]:
            del self._jobs[job.id]
        over = [job for job in self._jobs.values() if job.ended is not None]
        kept = Counter(job.owner for job in over)
        while kept.total() > self._most:
            [(owner, _)] = kept.most_common(1)
            theirs = [job for job in over if job.owner == owner and job.id in self._jobs]
            del self._jobs[next((job for job in theirs if job.state != "succeeded"), theirs[0]).id]
            kept[owner] -= 1

"""The step-level batcher of `csrc/` as a plain Python loop: its reference in tests.

Shape legend: T tokens of the result, R of the references, C channels of a token, M a text bucket, D text width.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import Generator, Tensor

from clora.method.flow import consistency_step, euler_step
from clora.method.samplers import draw_noise


class QueueFull(Exception):
    pass


@dataclass(eq=False)
class Request:
    ticket: int
    bucket: int
    x: Tensor
    given: tuple[Tensor, ...]
    text_len: int
    generator: Generator
    effect: str
    until: float | None
    on_step: Callable[[int, int], None] | None
    on_done: Callable[[str, Tensor | None, str], None]
    step: int = 0
    turn: int = 0
    cancelled: bool = False


class PythonBatcher:
    """As `clora._C.Batcher`."""

    def __init__(
        self, engine: Any, sigmas: Tensor, sampler: str, dtype: torch.dtype, max_batch: int, max_queue: int
    ) -> None:
        self.engine, self.sigmas, self.sampler, self.dtype = engine, sigmas.tolist(), sampler, dtype
        self.max_batch, self.max_queue = max_batch, max_queue
        self.requests: list[Request] = []
        self.changed = threading.Condition()
        self.tickets, self.turns = count(), count(1)
        self.closing = False
        self.counts = dict.fromkeys(("done", "cancelled", "expired", "failed", "rejected", "steps", "samples"), 0.0)
        self.effects: list[int] = []
        self.busy = 0.0
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def submit(
        self, bucket: int, noise: Tensor, refs: Tensor, text: Tensor, cos: Tensor, sin: Tensor, text_len: int,
        generator: Generator, effect: str, timeout: float | None, on_step: Any, on_done: Any,
    ) -> int:  # fmt: skip
        with self.changed:
            if self.closing:
                raise RuntimeError("the batcher is closed")
            if sum(request.step == 0 for request in self.requests) >= self.max_queue:
                self.counts["rejected"] += 1
                raise QueueFull(f"{self.max_queue} requests wait already")
            until = None if timeout is None else time.monotonic() + timeout
            ticket = next(self.tickets)
            self.requests.append(
                Request(
                    ticket, bucket, noise, (refs, text, cos, sin), text_len, generator, effect, until, on_step, on_done
                )
            )
            self.changed.notify()
        return ticket

    def cancel(self, ticket: int) -> bool:
        with self.changed:
            for request in self.requests:
                if request.ticket == ticket:
                    request.cancelled = True
                    self.changed.notify()
                    return True
        return False

    def stats(self) -> dict[str, float]:
        with self.changed:
            queued = sum(request.step == 0 for request in self.requests)
            found = self.counts | {"queued": queued, "running": len(self.requests) - queued, "busy_seconds": self.busy}
        steps = max(1.0, found["steps"])
        mean = found.pop("samples") / steps
        effects = self.effects or [0]
        found |= {"effects_last": effects[-1], "effects_max": max(effects), "effects_mean": sum(effects) / len(effects)}
        return found | {
            "batch_mean": mean,
            "batch_fill": mean / self.max_batch,
            "steps_per_second": steps / (self.busy or 1),
        }

    def close(self, drain: bool, timeout: float | None) -> None:
        with self.changed:
            self.closing = True
            if not drain:
                for request in self.requests:
                    request.cancelled = True
            self.changed.notify()
        if threading.current_thread() is not self.thread:
            self.thread.join(timeout)
            if self.thread.is_alive() and drain:
                self.close(False, None)

    def run(self) -> None:
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.requests or self.closing)
                if not self.requests:
                    return
                now, ended = time.monotonic(), []
                for request in list(self.requests):
                    outcome = "cancelled" if request.cancelled else ""
                    if not outcome and request.until is not None and now > request.until:
                        outcome = "expired"
                    if outcome:
                        self.requests.remove(request)
                        ended.append((request, outcome))
                        self.counts[outcome] += 1
                batch: list[Request] = []
                if self.requests:
                    first = min(self.requests, key=lambda request: (request.turn, request.ticket))
                    batch = [request for request in self.requests if request.bucket == first.bucket][: self.max_batch]
                    turn = next(self.turns)
                    for request in batch:
                        request.turn = turn
            for request, outcome in ended:
                request.on_done(outcome, None, f"the request was {outcome}")
            if batch:
                self.step(batch)

    def step(self, batch: list[Request]) -> None:
        started = time.perf_counter()
        x = torch.stack([request.x for request in batch])
        refs, text = (torch.stack([request.given[i] for request in batch]) for i in (0, 1))
        steps, lengths = torch.tensor([r.step for r in batch]), torch.tensor([r.text_len for r in batch])
        cos, sin = batch[0].given[2:]
        try:
            v = self.engine(x.to(self.dtype), refs, text, cos, sin, steps, lengths).float()
        except Exception as error:
            self.end([(request, "failed", None, str(error)) for request in batch])
            return
        ended = []
        for number, request in enumerate(batch):
            if not v[number].isfinite().all():
                ended.append((request, "non_finite", None, f"velocity is not finite at step {request.step}"))
                continue
            one = slice(number, number + 1)
            level = torch.tensor([self.sigmas[request.step]])
            after = torch.tensor([self.sigmas[request.step + 1] if request.step + 1 < len(self.sigmas) else 0.0])
            if self.sampler == "consistency":
                eps = draw_noise([request.generator], tuple(request.x.shape)) if after.any() else None
                request.x = consistency_step(x[one], v[one], level, after, eps)[0]
            else:
                request.x = euler_step(x[one], v[one], level, after)[0]
            request.step += 1
            if request.on_step is not None:
                request.on_step(request.step, len(self.sigmas))
            if request.step == len(self.sigmas):
                ended.append((request, "done", request.x, ""))
        self.busy += time.perf_counter() - started
        self.counts["steps"] += 1
        self.counts["samples"] += len(batch)
        self.effects.append(len({request.effect for request in batch}))
        self.end(ended)

    def end(self, ended: list[tuple[Request, str, Tensor | None, str]]) -> None:
        with self.changed:
            for request, outcome, _, _ in ended:
                self.requests.remove(request)
                self.counts["done" if outcome == "done" else "failed"] += 1
        for request, outcome, x0, message in ended:
            request.on_done(outcome, x0, message)

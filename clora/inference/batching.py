"""Requests of different effects, seeds and steps denoised together: the step-level batcher of `csrc/`, typed.

A request is one image. Requests whose shapes are equal (tokens of result, references and padded text, positions) share
forwards, each at its own step; a new one joins at the next step. In fp32 on one thread a request's result is, bit for
bit, what it is alone.

Shape legend: T tokens of the result, R of the references, C latent channels per token, M a text bucket, D text width,
J = T + R + M, E width of a head.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import count
from typing import Literal, Protocol

import torch
from torch import Tensor

from clora import _C
from clora.backbones.cond import Cond
from clora.method.samplers import draw_noise, noise_generators, pipeline_order

Engine = _C.AotiEngine | Callable[..., Tensor]
"""(x (B, T, C), refs (B, R, C), text (B, M, D), cos, sin (J, E / 2), step (B,) int64, text_len (B,) int64) -> velocity
(B, T, C). One in Python is called by the batcher's own thread."""

OnStep = Callable[[int, int], None]
"""on_step(steps done, steps in all), on the batcher's thread after each step; what it raises fails its request."""

MOST_BUCKETS = 256  # shapes whose positions are kept


class QueueFull(Exception):
    """As many requests wait as the batcher lets wait; try again later."""


class Expired(TimeoutError):
    """A request whose time ran out before it was done."""


@dataclass(frozen=True, eq=False)
class Conditions:
    """What one request is conditioned on, as an engine takes it: refs (R, C), text (M, D) in the engine's dtype, padded
    to its bucket; cos, sin (J, E / 2) fp32; text_len, the tokens of text that count."""

    refs: Tensor
    text: Tensor
    cos: Tensor
    sin: Tensor
    text_len: int


@dataclass(frozen=True, eq=False)
class Served:
    """A network for serving: `engine` at the noise levels `sigmas` (S,), which `sampler` visits; `conditions` makes of
    a `Cond` of batch 1 what the engine takes. `dtype` is that of x, refs and text; `most_batch` its largest batch."""

    engine: Engine
    conditions: Callable[[Cond], Conditions]
    sigmas: Tensor
    sampler: Literal["consistency", "euler"]
    dtype: torch.dtype
    most_batch: int


class Servable(Protocol):
    """What can be served: `clora.export.artefact.Artefact` is one."""

    def served(self) -> Served:
        """The network, opened."""


class StepBatcher:
    """Denoises requests of different effects, seeds and steps together; thread-safe."""

    def __init__(self, served: Served, *, max_batch: int = 8, max_queue: int = 64) -> None:
        """max_batch: requests of one forward, at most `served.most_batch`. max_queue: requests that may wait for their
        first step. Raises ValueError for others than positive numbers."""
        self._served = served
        self._buckets: dict[object, tuple[int, Tensor, Tensor]] = {}
        self._numbers = count()
        max_batch = min(max_batch, served.most_batch)
        self._native = _C.Batcher(served.engine, served.sigmas, served.sampler, served.dtype, max_batch, max_queue)
        # Also at the interpreter's exit, after which a thread could not call Python any more.
        self._finalizer = weakref.finalize(self, self._native.close, False, None)

    @classmethod
    def over_artefact(cls, artefact: Servable, *, max_batch: int = 8, max_queue: int = 64) -> StepBatcher:
        """Over an opened artefact: of format aoti its native code, without Python in the loop; of onnx and merged a
        Python callable."""
        return cls(artefact.served(), max_batch=max_batch, max_queue=max_queue)

    def submit(
        self,
        cond: Cond,
        *,
        seed: int,
        effect: str = "",
        timeout: float | None = None,
        on_step: OnStep | None = None,
    ) -> Future[Tensor]:
        """Ask for one image, whose latents x0 (T, C), fp32 on the CPU, the future gives.

        cond: of batch 1. seed: of the noise, in the order of `Editor`: the same image as `clora edit` makes. effect:
        for the counters alone. timeout: seconds until it is answered `Expired` and not sampled on; None waits for ever.

        Raises `QueueFull` when max_queue requests wait, RuntimeError after `close`, ValueError for another batch than
        one, and what the network says of sizes beyond its limits (`InputError`). The future raises `Expired`,
        CancelledError (after `cancel`, `future.cancel()` or `close(drain=False)`), FloatingPointError for a velocity
        that is not finite, and RuntimeError where the engine or `on_step` failed. Its callbacks run on the batcher's
        thread: let them be short.
        """
        if cond.batch_size != 1:
            raise ValueError(f"a request is one image, this condition is of {cond.batch_size}; submit one at a time")
        given = self._served.conditions(cond)
        bucket, cos, sin = self._bucket(cond, given)
        generators = noise_generators([seed])
        shape_TC = (cond.grid[0] * cond.grid[1], given.refs.shape[1])
        noise_TC = pipeline_order(draw_noise(generators, shape_TC), cond.grid)[0]
        future: Future[Tensor] = Future()
        native = self._native
        try:
            ticket = native.submit(
                bucket,
                noise_TC,
                given.refs,
                given.text,
                cos,
                sin,
                given.text_len,
                generators[0],
                effect,
                timeout,
                on_step,
                lambda outcome, x0, message: _answer(future, outcome, x0, message),
            )
        except _C.QueueFull as error:
            raise QueueFull(str(error)) from None
        future.add_done_callback(lambda done: native.cancel(ticket) if done.cancelled() else None)
        return future

    def cancel(self, future: Future[Tensor]) -> bool:
        """`future.cancel()`: False where the request is answered already. The future is cancelled at once, the request
        leaves its batch at the next step."""
        return future.cancel()

    def stats(self) -> dict[str, float]:
        """Counters since the start. Requests: `queued` (no step yet), `running`, `done`, `cancelled`, `expired`,
        `failed`, `rejected`. Forwards: `steps`, `steps_per_second` (of the time in which it had work), `batch_mean`
        (requests a forward), `batch_fill` (that of max_batch); `effects_last`, `effects_max` and `effects_mean`, the
        distinct effects of a forward. `busy_seconds`: time spent in steps."""
        return self._native.stats()

    def close(self, drain: bool = True, timeout: float | None = None) -> None:
        """Take no more requests, finish those there are (drain) and end the thread. What is left after `timeout`
        seconds, or without drain, is cancelled; returns when the step that runs is over. Twice does no harm."""
        self._native.close(drain, timeout)

    def _bucket(self, cond: Cond, given: Conditions) -> tuple[int, Tensor, Tensor]:
        """The number of the shapes and positions that a batch must share, with the positions."""
        key = (cond.grid, cond.ref_grids, given.text.shape[0])
        found = self._buckets.get(key)
        if found is None:
            if len(self._buckets) >= MOST_BUCKETS:
                self._buckets = {}
            found = self._buckets.setdefault(key, (next(self._numbers), given.cos, given.sin))
        return found


def _answer(future: Future[Tensor], outcome: str, x0: Tensor | None, message: str) -> None:
    """Give a future its answer, unless it was cancelled meanwhile."""
    if outcome == "cancelled":
        future.cancel()
    if not future.set_running_or_notify_cancel():
        return
    errors = {"expired": Expired, "non_finite": FloatingPointError}
    if outcome == "done" and x0 is not None:
        future.set_result(x0)
    else:
        future.set_exception(errors.get(outcome, RuntimeError)(message))

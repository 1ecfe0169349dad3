"""What is served: one base with one collection, its three stages in threads of their own.

Pictures and prompt are encoded in one lane, denoised by the step-level batcher, decoded in another lane: while the
batcher samples one request the lanes encode the next and decode the last, several at a time.

Shape legend: B batch, T tokens of the result, C latent channels per token, L text tokens, D text width.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch
from PIL import Image
from torch import Tensor

from clora.backbones.base import Backbone
from clora.backbones.cond import Cond, Grid, Size, make_cond
from clora.errors import InputError
from clora.inference.batching import OnStep, StepBatcher
from clora.serve.engine import OnPhase, Work
from clora.serve.lanes import Lane
from clora.serve.offer import Offer
from clora.serve.settings import Batches

log = logging.getLogger(__name__)

MOST_FAILURES = 3  # of the engine, one after the other, before the batcher is made anew


@dataclass(frozen=True, eq=False)
class Picture:
    """A request to encode: RGB pictures, the sizes at which the model sees them, the size of the result."""

    images: tuple[Image.Image, ...]
    text: str
    seen: tuple[Size, ...]
    size: Size


@dataclass(frozen=True, eq=False)
class Encoders:
    """A base's encoders and decoder, which several models may share. They keep the state of a run in themselves, so
    that one thread at a time may be in each."""

    backbone: Backbone
    text: threading.Lock = field(default_factory=threading.Lock)
    vae: threading.Lock = field(default_factory=threading.Lock)


@dataclass(frozen=True, eq=False)
class Parts:
    """A model opened. `start` makes a batcher over the network; `secrets` are texts (its folders) that no answer may
    show."""

    offer: Offer
    encoders: Encoders
    start: Callable[[], StepBatcher]
    secrets: tuple[str, ...] = ()


class Model:
    """`Parts` at work; thread-safe."""

    def __init__(self, parts: Parts, batches: Batches, stall_seconds: float, on_phase: OnPhase) -> None:
        self.parts, self.stall_seconds, self._on_phase = parts, stall_seconds, on_phase
        self._backbone = parts.encoders.backbone
        self._batches = batches
        self._lanes()
        self._start()
        self.restarts = 0

    def _lanes(self) -> None:
        self.encoder: Lane[Picture, Cond] = Lane("encoder", self._encode, lambda item: item.seen, self._batches.encode)
        self.decoder: Lane[tuple[Tensor, Grid], Image.Image] = Lane(
            "decoder", self._decode, lambda item: item[1], self._batches.decode
        )

    def _start(self) -> None:
        self.batcher = self.parts.start()
        self._engine_failures, self._failed_step = 0, -1.0
        self._progress = (-1.0, time.monotonic())

    async def edit(self, work: Work, on_step: Callable[[], None]) -> list[Image.Image]:
        """The pictures of `work`, as `Engine.edit`; of the batcher it raises `QueueFull` and `Expired`."""
        end = time.monotonic() + work.seconds
        try:
            cond = await asyncio.wrap_future(self.encode(work.images, work.text, work.size))
            latents = await self._denoise_all(cond, work, end, on_step)
        except InputError as error:
            raise InputError(self._public(str(error))) from error
        decoding = [self.decode(x0_TC, cond.grid) for x0_TC in latents]
        return list(await asyncio.gather(*map(asyncio.wrap_future, decoding)))

    async def _denoise_all(self, cond: Cond, work: Work, end: float, on_step: Callable[[], None]) -> list[Tensor]:
        started, samples = time.perf_counter(), list[Future[Tensor]]()
        try:
            for seed in work.seeds:
                left = max(0.01, end - time.monotonic())
                samples.append(self.denoise(cond, seed, work.effect, left, lambda *_: on_step()))
            latents = list(await asyncio.gather(*map(asyncio.wrap_future, samples)))
        finally:
            for sample in samples:
                if not sample.done():
                    self.batcher.cancel(sample)
        self._on_phase("denoise", time.perf_counter() - started, None)
        return latents

    # The three stages

    def encode(self, images: Sequence[Image.Image], text: str, size: Size | None = None) -> Future[Cond]:
        """The condition, of batch 1, of RGB pictures and what the model reads. The last picture gives the result its
        shape where `size` does not. Raises `InputError` for a shape that the base has no size for; the future does for
        a text too long."""
        seen = tuple(self._backbone.output_size(image) for image in images)
        return self.encoder.submit(Picture(tuple(images), text, seen, size or seen[-1]))

    def denoise(self, cond: Cond, seed: int, effect: str, timeout: float, on_step: OnStep | None) -> Future[Tensor]:
        """Latents x0 (T, C), as `StepBatcher.submit`, whose errors it raises."""
        batcher = self.batcher
        future = batcher.submit(cond, seed=seed, effect=effect, timeout=timeout, on_step=on_step)
        future.add_done_callback(lambda done: self._note_engine(batcher, done))
        return future

    def decode(self, x0_TC: Tensor, grid: Grid) -> Future[Image.Image]:
        """The picture of latents."""
        return self.decoder.submit((x0_TC, grid))

    # Health

    @property
    def is_alive(self) -> bool:
        """Whether every thread runs, and lanes and batcher make progress with what they have."""
        if self._engine_failures >= MOST_FAILURES:
            return False
        if not all(lane.is_alive and lane.busy_seconds < self.stall_seconds for lane in (self.encoder, self.decoder)):
            return False
        stats = self.batcher.stats()
        if not stats["queued"] + stats["running"] or stats["steps"] != self._progress[0]:
            self._progress = (stats["steps"], time.monotonic())
        return time.monotonic() - self._progress[1] < self.stall_seconds

    def restart(self) -> None:
        """New lanes and a new batcher; what was in the old ones is cancelled."""
        old = self.batcher, self.encoder, self.decoder
        self._lanes()
        self._start()
        self.restarts += 1
        log.warning("batcher and lanes are started anew")
        # An engine that hangs would hold whoever closes it.
        threading.Thread(target=_close, args=old, name="closer", daemon=True).start()

    def close(self, drain: bool = True, timeout: float | None = None) -> None:
        """End all threads; with `drain` what the batcher has is finished first."""
        self.batcher.close(drain, timeout)
        self.encoder.close()
        self.decoder.close()

    def _public(self, message: str) -> str:
        """A message without the places of files."""
        for secret in self.parts.secrets:
            message = message.replace(secret, self.parts.offer.name)
        return message

    # In the lanes' threads

    @torch.no_grad()
    def _encode(self, wanted: Sequence[Picture]) -> list[Cond]:
        backbone, started = self._backbone, time.perf_counter()
        with self.parts.encoders.text:
            texts = backbone.encode_prompts([item.text for item in wanted], [list(item.images) for item in wanted])
        with self.parts.encoders.vae:
            refs = [
                backbone.encode_references(same)
                for same in map(list, zip(*(item.images for item in wanted), strict=True))
            ]
        made = [
            make_cond([text_LD], [(latents[i : i + 1], grid) for latents, grid in refs], backbone.grid(item.size))
            for i, (item, text_LD) in enumerate(zip(wanted, texts, strict=True))
        ]
        self._on_phase("encode", time.perf_counter() - started, len(wanted))
        return made

    @torch.no_grad()
    def _decode(self, wanted: Sequence[tuple[Tensor, Grid]]) -> list[Image.Image]:
        backbone, started = self._backbone, time.perf_counter()
        x0_BTC = torch.stack([x0_TC for x0_TC, _ in wanted]).to(backbone.device)
        with self.parts.encoders.vae:
            pixels = backbone.decode(x0_BTC, wanted[0][1])
        made = backbone.to_pil(pixels)
        self._on_phase("decode", time.perf_counter() - started, len(wanted))
        return made

    def _note_engine(self, batcher: StepBatcher, future: Future[Tensor]) -> None:
        if future.cancelled() or batcher is not self.batcher:
            return
        error = future.exception()
        if error is None:
            self._engine_failures = 0
        elif isinstance(error, RuntimeError) and (step := batcher.stats()["steps"]) != self._failed_step:
            # All samples of a step fail with it, one after the other and before the next step.
            self._failed_step = step
            self._engine_failures += 1
            log.warning("the engine failed: %s", type(error).__name__)


def _close(batcher: StepBatcher, *lanes: Lane[Picture, Cond] | Lane[tuple[Tensor, Grid], Image.Image]) -> None:
    for lane in lanes:
        lane.close()
    batcher.close(drain=False, timeout=1)

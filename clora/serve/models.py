"""What is served: one base with one collection, its three stages in threads of their own.

Pictures and prompt are encoded in one lane, denoised by the step-level batcher, decoded in another lane: while the
batcher samples one request the lanes encode the next and decode the last, several at a time.

Shape legend: B batch, T tokens of the result, C latent channels per token, L text tokens, D text width.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from clora.backbones.base import Backbone
from clora.backbones.cond import Cond, Grid, Size, make_cond
from clora.inference.batching import OnStep, StepBatcher
from clora.serve.lanes import Lane
from clora.serve.offer import Collection
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
class Parts:
    """A model opened. `backbone` has encoders and decoder; `start` makes a batcher over the network; `secrets` are
    texts (its folders) that no answer may show."""

    name: str
    collection: Collection
    backbone: Backbone
    start: Callable[[], StepBatcher]
    secrets: tuple[str, ...] = ()


class Model:
    """`Parts` at work; thread-safe. `on_phase(phase, seconds, number)` is told of each batch of a lane."""

    def __init__(self, parts: Parts, batches: Batches, stall_seconds: float = 120) -> None:
        self.parts, self.stall_seconds = parts, stall_seconds
        self.on_phase: Callable[[str, float, int], None] = lambda phase, seconds, number: None
        self._batches = batches
        self._vae = threading.Lock()  # diffusers' VAE keeps the state of a run in itself
        self._engine_failures = 0
        self._progress = (-1.0, time.monotonic())
        self._lanes()
        self.batcher = parts.start()
        self.restarts = 0

    def _lanes(self) -> None:
        self.encoder: Lane[Picture, Cond] = Lane("encoder", self._encode, lambda item: item.seen, self._batches.encode)
        self.decoder: Lane[tuple[Tensor, Grid], Image.Image] = Lane(
            "decoder", self._decode, lambda item: item[1], self._batches.decode
        )

    # The three stages

    def encode(self, images: Sequence[Image.Image], text: str, size: Size | None = None) -> Future[Cond]:
        """The condition, of batch 1, of RGB pictures and what the model reads. The last picture gives the result its
        shape where `size` does not. Raises `InputError` for a shape that the base has no size for; the future does for
        a text too long."""
        seen = tuple(self.parts.backbone.output_size(image) for image in images)
        return self.encoder.submit(Picture(tuple(images), text, seen, size or seen[-1]))

    def denoise(self, cond: Cond, seed: int, effect: str, timeout: float, on_step: OnStep | None) -> Future[Tensor]:
        """Latents x0 (T, C), as `StepBatcher.submit`, whose errors it raises."""
        future = self.batcher.submit(cond, seed=seed, effect=effect, timeout=timeout, on_step=on_step)
        future.add_done_callback(self._note_engine)
        return future

    def decode(self, x0_TC: Tensor, grid: Grid) -> Future[Image.Image]:
        """The picture of latents."""
        return self.decoder.submit((x0_TC, grid))

    def cancel(self, future: Future[Tensor]) -> None:
        """Take a sample out of the batch at the next step."""
        self.batcher.cancel(future)

    # Health

    @property
    def is_alive(self) -> bool:
        """Whether every thread runs and the batcher makes progress with what it has."""
        if not (self.encoder.is_alive and self.decoder.is_alive) or self._engine_failures >= MOST_FAILURES:
            return False
        stats = self.batcher.stats()
        if not stats["queued"] + stats["running"] or stats["steps"] != self._progress[0]:
            self._progress = (stats["steps"], time.monotonic())
        return time.monotonic() - self._progress[1] < self.stall_seconds

    def restart(self) -> None:
        """New lanes and a new batcher; what was in the old ones is cancelled."""
        old = self.batcher, self.encoder, self.decoder
        self._lanes()
        self.batcher = self.parts.start()
        self._engine_failures, self._progress = 0, (-1.0, time.monotonic())
        self.restarts += 1
        log.warning("batcher and lanes are started anew")
        # An engine that hangs would hold whoever closes it.
        threading.Thread(target=_close, args=old, name="closer", daemon=True).start()

    def close(self, drain: bool = True, timeout: float | None = None) -> None:
        """End all threads; with `drain` what the batcher has is finished first."""
        self.batcher.close(drain, timeout)
        self.encoder.close()
        self.decoder.close()

    def public(self, message: str) -> str:
        """A message without the places of files."""
        for secret in self.parts.secrets:
            message = message.replace(secret, self.parts.name)
        return message

    # In the lanes' threads

    @torch.no_grad()
    def _encode(self, wanted: Sequence[Picture]) -> list[Cond]:
        backbone, started = self.parts.backbone, time.perf_counter()
        texts = backbone.encode_prompts([item.text for item in wanted], [list(item.images) for item in wanted])
        with self._vae:
            refs = [
                backbone.encode_references(same)
                for same in map(list, zip(*(item.images for item in wanted), strict=True))
            ]
        made = [
            make_cond([text_LD], [(latents[i : i + 1], grid) for latents, grid in refs], backbone.grid(item.size))
            for i, (item, text_LD) in enumerate(zip(wanted, texts, strict=True))
        ]
        self.on_phase("encode", time.perf_counter() - started, len(wanted))
        return made

    @torch.no_grad()
    def _decode(self, wanted: Sequence[tuple[Tensor, Grid]]) -> list[Image.Image]:
        backbone, started = self.parts.backbone, time.perf_counter()
        x0_BTC = torch.stack([x0_TC for x0_TC, _ in wanted]).to(backbone.device)
        with self._vae:
            pixels = backbone.decode(x0_BTC, wanted[0][1])
        made = backbone.to_pil(pixels)
        self.on_phase("decode", time.perf_counter() - started, len(wanted))
        return made

    def _note_engine(self, future: Future[Tensor]) -> None:
        if future.cancelled():
            return
        error = future.exception()
        if error is None:
            self._engine_failures = 0
        elif isinstance(error, RuntimeError):
            self._engine_failures += 1
            log.warning("the engine failed: %s", type(error).__name__)


def _close(batcher: StepBatcher, *lanes: Lane[Picture, Cond] | Lane[tuple[Tensor, Grid], Image.Image]) -> None:
    for lane in lanes:
        lane.close()
    batcher.close(drain=False, timeout=1)

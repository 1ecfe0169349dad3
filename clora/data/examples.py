"""Training examples with everything frozen already encoded: reference latents, prompts, targets.

Nothing is encoded twice: each part is cached under a hash of what it was made from (`clora.data.cache`).

Shape legend: B batch, T tokens, C latent channels per token, L text tokens, D text width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from clora.backbones.base import Backbone
from clora.backbones.cond import Cond, Grid, make_cond
from clora.config import BucketConfig
from clora.data.cache import TensorCache, cache_key
from clora.data.images import aspect_buckets, choose_bucket, cover_crop, load_image
from clora.data.pairs import Pair

ENCODING_VERSION = "examples/2"


@dataclass(frozen=True, eq=False)
class Example:
    """One source (one or more reference images) of one effect; `effect` None belongs to the general stream.

    refs: packed latents (Tr, C) per reference. texts: role -> (L, D), roles "student", "teacher", "negative" and, where
    the pair has one that counts, "caption". x0: latents (T, C) of the pair's own target. y: the teacher's images of it,
    (T, C) each. key: tells the examples of a run apart, and is the same in each of its processes and when it goes on:
    the effect, and where its pair stands.
    """

    effect: str | None
    sources: tuple[Path, ...]
    grid: Grid
    refs: tuple[Tensor, ...]
    ref_grids: tuple[Grid, ...]
    texts: dict[str, Tensor]
    x0: Tensor | None = None
    y: tuple[Tensor, ...] = ()
    key: tuple[str | None, str] = field(kw_only=True)

    @property
    def num_tokens(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def sizes(self) -> tuple[Grid, tuple[Grid, ...]]:
        """What must be equal for two examples to share a batch."""
        return self.grid, self.ref_grids


class ExampleEncoder:
    """Encodes pairs with a backbone's frozen encoders, through a cache; every image is cut to a bucket's shape."""

    def __init__(self, backbone: Backbone, cache: TensorCache, identity: str, buckets: BucketConfig) -> None:
        self._backbone = backbone
        self._cache = cache
        self._identity = identity
        self._buckets = aspect_buckets(buckets.max_area, buckets.multiple, buckets.aspect_ratios)

    def encode(self, pair: Pair, effect: str | None, prompts: dict[str, str]) -> Example:
        """One pair with its prompts by role. Raises `InputError` for images or prompts that cannot be used."""
        opened: dict[Path, Image.Image] = {}

        def image(path: Path) -> Image.Image:
            if path not in opened:
                opened[path] = load_image(path)
            return opened[path]

        # The last reference gives the result its shape, as in the stock pipeline.
        width, height = choose_bucket(image(pair.sources[-1]).size, self._buckets)
        references = [self._latents(path, image, None) for path in pair.sources[:-1]]
        references.append(self._latents(pair.sources[-1], image, (width, height)))
        texts = {role: self._text(prompt, pair.sources, image, (width, height)) for role, prompt in prompts.items()}
        target = None if pair.target is None else self._target(pair.target, image, (width, height))
        return Example(
            effect=effect,
            sources=pair.sources,
            grid=self._backbone.grid((height, width)),
            refs=tuple(latents for latents, _ in references),
            ref_grids=tuple(grid for _, grid in references),
            texts=texts,
            x0=target,
            key=(effect, f"{pair.place} {pair.sources[-1]}"),
        )

    def _key(self, paths: Sequence[Path], prompt: str | None, what: str) -> str:
        return cache_key(list(paths), prompt, self._identity, f"{ENCODING_VERSION}/{self._backbone.dtype}/{what}")

    def _latents(
        self, path: Path, image: Callable[[Path], Image.Image], crop: tuple[int, int] | None
    ) -> tuple[Tensor, Grid]:
        def make() -> dict[str, Tensor]:
            picture = image(path) if crop is None else cover_crop(image(path), crop)
            latents, grid = self._backbone.encode_references([picture])
            return {"latents": latents[0].cpu(), "grid": torch.tensor(grid)}

        found = self._cache.get_or_make(self._key([path], None, f"reference/{crop}"), make)
        height, width = found["grid"].tolist()
        return found["latents"], (height, width)

    def _target(self, path: Path, image: Callable[[Path], Image.Image], size: tuple[int, int]) -> Tensor:
        def make() -> dict[str, Tensor]:
            latents, _ = self._backbone.encode_targets([cover_crop(image(path), size)], (size[1], size[0]))
            return {"latents": latents[0].cpu()}

        return self._cache.get_or_make(self._key([path], None, f"target/{size}"), make)["latents"]

    def _text(
        self, prompt: str, paths: Sequence[Path], image: Callable[[Path], Image.Image], size: tuple[int, int]
    ) -> Tensor:
        def make() -> dict[str, Tensor]:
            pictures = [image(path) for path in paths[:-1]] + [cover_crop(image(paths[-1]), size)]
            return {"text": self._backbone.encode_prompts([prompt], [pictures])[0].cpu()}

        return self._cache.get_or_make(self._key(paths, prompt, f"text/{size}"), make)["text"]


def group_by_size(examples: Sequence[Example]) -> list[list[int]]:
    """The positions of examples that can share a batch, in order; groups in order of their first."""
    groups: dict[object, list[int]] = {}
    for position, example in enumerate(examples):
        groups.setdefault(example.sizes, []).append(position)
    return list(groups.values())


def collate(examples: Sequence[Example], role: str | Sequence[str], device: torch.device) -> Cond:
    """The examples' conditions with the prompts of `role` (one, or one per example).

    Raises `ValueError` where they differ in size or in number of references; `group_by_size` parts them.
    """
    first, roles = examples[0], [role] * len(examples) if isinstance(role, str) else role
    if other := next((e for e in examples if e.sizes != first.sizes), None):
        what = " and ".join(f"{e.effect} on {e.sources[-1].name} {e.sizes}" for e in (first, other))
        raise ValueError(f"examples of different sizes cannot share a batch: {what}; group them by size")
    refs = [(torch.stack([e.refs[i] for e in examples]), grid) for i, grid in enumerate(first.ref_grids)]
    texts = [e.texts[r] for e, r in zip(examples, roles, strict=True)]
    return make_cond(texts, refs, first.grid, [e.effect for e in examples]).to(device)

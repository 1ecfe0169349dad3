"""What a batch is conditioned on: text, reference images, the size of the result.

Shape legend: B batch, L text tokens, D text width, T image tokens, C latent channels per token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

Size = tuple[int, int]  # height and width of an image in pixels
Grid = tuple[int, int]  # and in tokens
VaeGraph = Callable[[Tensor], Tensor]
"""pixels (B, 3, H, W) in [-1, 1] -> normalised latents (B, z, h, w), or latents -> pixels in [0, 1], fp32."""


@dataclass(frozen=True, eq=False)
class Cond:
    """Conditioning of B samples. All share the grids of the result and of the references, as the model
    demands.

    text_BLD: prompt embeddings, padded right. text_lengths: each sample's real tokens; None when all are (a mask
    that masks nothing would cost attention its fast path). refs: per reference image packed latents (B, Tr, C).
    grid, ref_grids: (height, width) in tokens. effects: each sample's effect, None for the base's own skill.
    """

    text_BLD: Tensor
    text_lengths: tuple[int, ...] | None
    refs: tuple[Tensor, ...]
    ref_grids: tuple[Grid, ...]
    grid: Grid
    effects: tuple[str | None, ...]

    @property
    def batch_size(self) -> int:
        return self.text_BLD.shape[0]

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Cond:
        """The same on another device, text and references in `dtype` if given."""
        refs = tuple(ref.to(device, dtype) for ref in self.refs)
        return replace(self, text_BLD=self.text_BLD.to(device, dtype), refs=refs)

    @property
    def text_mask_BL(self) -> Tensor | None:
        """bool, True at real tokens; None when all are."""
        if self.text_lengths is None:
            return None
        lengths = torch.tensor(self.text_lengths, device=self.text_BLD.device)
        return torch.arange(self.text_BLD.shape[1], device=self.text_BLD.device) < lengths[:, None]

    def select(self, indices: Sequence[int]) -> Cond:
        """The samples at `indices`, in that order; text is cut to the longest of them."""
        index = torch.tensor(list(indices), device=self.text_BLD.device)
        text, lengths = self.text_BLD[index], None
        if self.text_lengths is not None:
            lengths = tuple(self.text_lengths[i] for i in indices)
            text, lengths = text[:, : max(lengths)], None if len(set(lengths)) == 1 else lengths
        refs = tuple(ref[index] for ref in self.refs)
        effects = tuple(self.effects[i] for i in indices)
        return replace(self, text_BLD=text, text_lengths=lengths, refs=refs, effects=effects)


def make_cond(
    text: Sequence[Tensor],
    refs: Sequence[tuple[Tensor, Grid]],
    grid: Grid,
    effects: Sequence[str | None] | None = None,
) -> Cond:
    """A `Cond` from B prompt embeddings (L_i, D) and, per reference image, packed latents (B, Tr, C) and
    their grid."""
    text_BLD, lengths = pad_text(text)
    for latents, (height, width) in refs:
        if latents.shape[:2] != (len(text), height * width):
            expected = (len(text), height * width)
            raise ValueError(f"reference latents {tuple(latents.shape)} do not have (B, T) = {expected}")
    chosen = (None,) * len(text) if effects is None else tuple(effects)
    if len(chosen) != len(text):
        raise ValueError(f"{len(chosen)} effects for {len(text)} prompts")
    return Cond(text_BLD, lengths, tuple(ref for ref, _ in refs), tuple(g for _, g in refs), grid, chosen)


def pad_text(text: Sequence[Tensor]) -> tuple[Tensor, tuple[int, ...] | None]:
    """Stack embeddings (L_i, D), padding right with zeros; the lengths are None when nothing is padded."""
    lengths = tuple(len(one) for one in text)
    padded = torch.nn.utils.rnn.pad_sequence(list(text), batch_first=True)
    return padded, None if len(set(lengths)) == 1 else lengths


def cat_conds(conds: Sequence[Cond]) -> Cond:
    """Join along the batch, padding text right. The grids must be the same in all."""
    if not conds:
        raise ValueError("no cond to join")
    grids = {(cond.grid, cond.ref_grids) for cond in conds}
    if len(grids) > 1:
        raise ValueError(f"conds of different grids cannot share a batch: {sorted(grids)}; bucket by size")
    text, lengths = pad_text([row for cond in conds for row in _text_rows(cond)])
    refs = tuple(torch.cat(parts) for parts in zip(*(cond.refs for cond in conds), strict=True))
    effects = tuple(effect for cond in conds for effect in cond.effects)
    return Cond(text, lengths, refs, conds[0].ref_grids, conds[0].grid, effects)


def _text_rows(cond: Cond) -> list[Tensor]:
    """The samples' embeddings without padding."""
    if cond.text_lengths is None:
        return list(cond.text_BLD)
    return [row[:length] for row, length in zip(cond.text_BLD, cond.text_lengths, strict=True)]

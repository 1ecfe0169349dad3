"""A graph, or the network itself, as the velocity that a sampler follows.

Shape legend: B batch, T image tokens, C latent channels per token, L text tokens, D text width, M a text bucket.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from clora.backbones.cond import Cond, Grid
from clora.errors import InputError
from clora.export.graph import Run
from clora.export.manifest import Limits
from clora.inference.batching import Conditions
from clora.method.flow import few_step_sigmas

Positions = Callable[[tuple[Grid, ...], int], tuple[Tensor, Tensor]]
"""(grids of result and references, text tokens) -> cos and sin: `backbones.load.rotary_positions` of a base."""


@dataclass(eq=False)
class GraphVelocity:
    """A graph as a velocity: noise level -> step, text padded to its bucket, positions of the grids. `name` is what
    errors call it."""

    run: Run
    name: str
    positions: Positions
    num_steps: int
    shift: float
    limits: Limits
    dtype: torch.dtype
    _known: dict[tuple[object, ...], tuple[Tensor, Tensor]] = field(default_factory=dict)

    @torch.no_grad()
    def __call__(self, x_BTC: Tensor, sigma_B: Tensor, cond: Cond) -> Tensor:
        """Raises `InputError` for a noise level that is not the schedule's, and for sizes beyond the limits."""
        batch, most = len(x_BTC), self.limits.batch
        if not 1 <= batch <= most:
            raise InputError(f"{self.name}: a batch of {batch} is beyond its {most}; make it smaller")
        refs, text, cos, sin, lengths = self._inputs(x_BTC.shape[1], cond)
        step = self._steps(sigma_B.expand(batch))
        return self.run(x_BTC.to(self.dtype), refs, text, cos, sin, step, torch.tensor(lengths)).to(x_BTC.dtype)

    def conditions(self, cond: Cond) -> Conditions:
        """What the graph takes besides x and step, for a condition of batch 1, on the CPU, where the batcher gathers
        its batches; raises `InputError` for sizes beyond the limits."""
        refs, text, cos, sin, lengths = self._inputs(cond.grid[0] * cond.grid[1], cond)
        return Conditions(refs[0].cpu(), text[0].cpu(), cos, sin, lengths[0])

    def _inputs(self, tokens: int, cond: Cond) -> tuple[Tensor, Tensor, Tensor, Tensor, tuple[int, ...]]:
        """refs, text, cos, sin and the lengths of the texts, for a result of so many tokens."""
        text = self._bucketed(cond)
        self._check(tokens, cond)
        lengths = cond.text_lengths or (cond.text_BLD.shape[1],) * cond.batch_size
        grids = (cond.grid, *cond.ref_grids)
        key = (grids, text.shape[1])
        if (positions := self._known.get(key)) is None:
            if len(self._known) >= 64:
                self._known.clear()
            positions = self._known[key] = self.positions(grids, text.shape[1])
        return torch.cat(cond.refs, dim=1).to(self.dtype), text, *positions, lengths

    def _steps(self, sigma_B: Tensor) -> Tensor:
        """The number of each noise level in the schedule, int64 (B,), on the CPU."""
        levels = few_step_sigmas(self.num_steps, self.shift)
        found = sigma_B.float().cpu()[:, None] == levels
        if not found.any(dim=1).all():
            odd = sigma_B[~found.any(dim=1)][0].item()
            raise InputError(
                f"{self.name}: noise level {odd:.6g} is none of its {self.num_steps} (shift {self.shift:g}); sample"
                " by its own schedule"
            )
        return found.int().argmax(dim=1)

    def _bucketed(self, cond: Cond) -> Tensor:
        """Text (B, M, D) padded to the smallest bucket that holds it."""
        length = cond.text_BLD.shape[1]
        fitting = [bucket for bucket in self.limits.text_buckets if bucket >= length]
        if not fitting:
            most = self.limits.text_buckets[-1]
            raise InputError(f"{self.name}: a text of {length} tokens is longer than its {most}; shorten the prompt")
        return F.pad(cond.text_BLD.to(self.dtype), (0, 0, 0, fitting[0] - length))

    def _check(self, tokens: int, cond: Cond) -> None:
        most, ref_tokens = self.limits.tokens, sum(ref.shape[1] for ref in cond.refs)
        for what, number in (("a result", tokens), ("references", ref_tokens)):
            if not 2 <= number <= most:
                raise InputError(f"{self.name}: {what} of {number} tokens; it takes 2 to {most}: use other sizes")

"""Trained parameters in one flat buffer, whose shards the processes own (ZeRO-1), and their gradients.

The parameters are views into one buffer of the dtype they are computed with. Process r of N keeps the fp32 masters of
shard r alone: gradients are summed into that shard by one reduce-scatter, an optimizer updates it, and the parameters
come back by one all-gather, less than the traffic of one all-reduce. One process has the whole and communicates
nothing.

A bfloat16 parameter is the upper half of its master, rounded (`split_bf16_master`); the lower half is kept beside it,
so that masters take four bytes a number in all and no forward has to round them anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from clora.training import distributed
from clora.training.bf16_master import merge_bf16_master, split_bf16_master

_ALIGN = 64  # elements: every parameter starts at a multiple of 128 bytes
_AT_ONCE = {"cpu": 1 << 18, "cuda": 1 << 24}  # elements updated at a time: what caches hold, few launches


def stretches(at: slice, device: torch.device) -> Iterator[slice]:
    """A part of a flat buffer in slices for which working copies are small."""
    size = _AT_ONCE["cpu" if device.type == "cpu" else "cuda"]
    return (slice(first, min(first + size, at.stop)) for first in range(at.start, at.stop, size))


@dataclass(frozen=True)
class Piece:
    """The part of one parameter that lies in this process's shard."""

    name: str
    start: int  # where in the parameter it begins
    at: slice  # where in the shard it lies


class GradientBuffer:
    """fp32 gradients of one `FlatParameters` at a time; those that take turns share one buffer, as long as the longest.

    From a holder's first gradient until its `release` the buffer is the holder's: `take` by another raises
    `RuntimeError`, before anything is overwritten.
    """

    def __init__(self) -> None:
        self._values = torch.empty(0)
        self._holder: object | None = None

    def reserve(self, length: int, device: torch.device) -> None:
        """Make room for `length` elements on `device`. Raises `RuntimeError` while gradients are held, `ValueError`
        where the buffer lies on another device."""
        if len(self._values) and self._values.device != device:
            raise ValueError(f"the gradient buffer lies on {self._values.device}, these parameters on {device}")
        if len(self._values) < length:
            if self._holder is not None:
                raise RuntimeError("a gradient buffer cannot grow while it holds gradients; update or drop them first")
            self._values = torch.zeros(length, device=device)

    def first(self, length: int) -> Tensor:
        """Its first `length` elements; `reserve` has made room for them."""
        return self._values[:length]

    def take(self, holder: object) -> None:
        """Called at the first gradient of `holder`."""
        if self._holder is not None and self._holder is not holder:
            raise RuntimeError(
                "the gradient buffer holds another's gradients; update those or drop them before this backward"
            )
        self._holder = holder

    def release(self, holder: object) -> None:
        """The gradients of `holder`, where it has some, are no longer needed."""
        if self._holder is holder:
            self._holder = None


class FlatParameters:
    """`parameters` (fp32, on one device) moved into one buffer of `dtype`, fp32 or bfloat16.

    `gradients`: the buffer of other parameters that take turns with these; left out, they have their own.
    """

    def __init__(
        self,
        parameters: dict[str, nn.Parameter],
        dtype: torch.dtype = torch.float32,
        gradients: GradientBuffer | None = None,
    ) -> None:
        first = next(iter(parameters.values()))
        if any(p.dtype != torch.float32 or p.device != first.device for p in parameters.values()):
            raise ValueError("trained parameters must be fp32 and on one device")
        if dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"parameters cannot be {dtype}; give float32 or bfloat16")
        self.parameters = parameters
        self.dtype, self.device = dtype, first.device
        self._offsets: dict[str, int] = {}
        end = 0
        for name, parameter in parameters.items():
            self._offsets[name] = end
            end += -(-parameter.numel() // _ALIGN) * _ALIGN
        self.total = end  # length of the buffer without the padding at its end
        length = -(-end // (distributed.world_size() * _ALIGN)) * _ALIGN
        self.shard = slice(distributed.rank() * length, (distributed.rank() + 1) * length)
        whole = length * distributed.world_size()
        self._flat = torch.zeros(whole, dtype=dtype, device=self.device)
        self._low = None if dtype == torch.float32 else torch.zeros(length, dtype=torch.int16, device=self.device)
        self.gradients = gradients or GradientBuffer()
        self.gradients.reserve(whole, self.device)
        # Kept apart from the gradients, so that one that is not finite can be traced to its process.
        self._sums = None if distributed.world_size() == 1 else torch.zeros(length, device=self.device)
        self._touched: set[str] = set()  # parameters with a gradient since the last update
        self.pieces = {piece.name: piece for piece in self._cut()}
        for name, parameter in parameters.items():
            self._put(name, parameter.detach())
            parameter.data = self._view(self._flat, name)
            parameter.register_post_accumulate_grad_hook(self._collector(name))

    def _cut(self) -> Iterator[Piece]:
        for name, parameter in self.parameters.items():
            offset = self._offsets[name]
            start, stop = max(offset, self.shard.start), min(offset + parameter.numel(), self.shard.stop)
            if start < stop:
                yield Piece(name, start - offset, slice(start - self.shard.start, stop - self.shard.start))

    def _view(self, flat: Tensor, name: str) -> Tensor:
        parameter, offset = self.parameters[name], self._offsets[name]
        return flat[offset : offset + parameter.numel()].view(parameter.shape)

    def _put(self, name: str, value: Tensor) -> None:
        """Give a parameter the value of an fp32 tensor of its shape."""
        if self._low is None:
            self._view(self._flat, name).copy_(value)
            return
        high, low = split_bf16_master(value)
        self._view(self._flat, name).copy_(high)
        if (piece := self.pieces.get(name)) is not None:
            self._low[piece.at] = low.flatten()[piece.start : piece.start + piece.at.stop - piece.at.start]

    def _collector(self, name: str) -> Callable[[Tensor], None]:
        """Moves a parameter's gradient into the buffer as soon as the backward pass has made it."""

        def collect(parameter: Tensor) -> None:
            if parameter.grad is not None:
                self.gradients.take(self)
                view = self._view(self._gradient, name)
                view.add_(parameter.grad) if name in self._touched else view.copy_(parameter.grad)
                self._touched.add(name)
                parameter.grad = None

        return collect

    @property
    def _gradient(self) -> Tensor:
        return self.gradients.first(len(self._flat))

    @property
    def shard_gradient(self) -> Tensor:
        """fp32, as long as the shard: the gradients' sum over all processes once `sum_gradients` was called."""
        return self._gradient if self._sums is None else self._sums

    @property
    def shard_length(self) -> int:
        """Elements of the shard without the padding at the buffer's end."""
        return max(0, min(int(self.shard.stop), self.total) - int(self.shard.start))

    @property
    def touched(self) -> frozenset[str]:
        """The parameters with a gradient since the last update."""
        return frozenset(self._touched)

    def gradient(self, name: str) -> Tensor | None:
        """This process's gradient (fp32) of a parameter since the last update; None where there was none."""
        return self._view(self._gradient, name) if name in self._touched else None

    def sum_gradients(self) -> list[tuple[Piece, Tensor]]:
        """Sum the gradients over all processes; returns the shard's pieces that have some, each with its part of
        `shard_gradient`."""
        if self._sums is not None:
            for name in self.parameters.keys() - self._touched:
                self._view(self._gradient, name).zero_()
            distributed.reduce_scatter(self._sums, self._gradient)
        sums = self.shard_gradient
        return [(piece, sums[piece.at]) for piece in self.pieces.values() if piece.name in self._touched]

    def forget_gradients(self) -> None:
        """Drop the gradients, and give the buffer free."""
        self._touched.clear()
        self.gradients.release(self)

    def read(self, at: slice) -> Tensor:
        """The masters (fp32) of a stretch of the shard; fp32 parameters themselves, not a copy."""
        stored = self._flat[self.shard][at]
        return stored if self._low is None else merge_bf16_master(stored, self._low[at])

    def write(self, at: slice, value: Tensor) -> None:
        """Set masters (fp32) of a stretch of the shard; `share` then gives them to the other processes."""
        stored = self._flat[self.shard][at]
        if self._low is not None:
            value, self._low[at] = split_bf16_master(value)
        if value.data_ptr() != stored.data_ptr():
            stored.copy_(value)

    def share(self) -> None:
        """Give every process the shards that the others keep."""
        if distributed.world_size() > 1:
            distributed.all_gather(self._flat, self._flat[self.shard].clone())

    def fp32_parameters(self) -> dict[str, Tensor]:
        """The parameters in fp32. All processes must call it."""
        if self._low is None:
            return {name: self._view(self._flat, name) for name in self.parameters}
        return self.gather(self.read(slice(0, len(self._low))))

    def gather(self, shard: Tensor) -> dict[str, Tensor]:
        """The parameters' shapes filled from every process's fp32 `shard`, which it gives in whole length. All
        processes must call it."""
        flat = shard
        if distributed.world_size() > 1:
            flat = torch.empty(len(self._flat), device=self.device)
            distributed.all_gather(flat, shard)
        return {name: self._view(flat, name) for name in self.parameters}

    def assign(self, values: Mapping[str, Tensor]) -> None:
        """Give the parameters these values (fp32, the same on all processes)."""
        for name, value in values.items():
            self._put(name, value)

    def layout(self) -> list[tuple[str, list[int]]]:
        """Names and shapes in the buffer's order; what a checkpoint must have to fit."""
        return [(name, list(parameter.shape)) for name, parameter in self.parameters.items()]

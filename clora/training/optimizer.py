"""Parameters with their optimizer, flat in memory and shared out among the processes (ZeRO-1).

The parameters of a group are views into one buffer of the dtype they are computed with. Process r of N keeps their fp32
masters, AdamW's moments and the average of the r-th part of it alone: gradients are summed into that part by one
reduce-scatter, updated there, and the parameters come back by one all-gather, less than the traffic of one all-reduce.
One process has the whole and communicates nothing.

A bfloat16 parameter is the upper half of its master, rounded (`split`); the lower half is kept beside it, so that
masters take four bytes a number in all and no forward has to round them anew.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from clora.errors import NonFiniteError
from clora.training import distributed
from clora.training.bf16_master import merge_bf16_master, split_bf16_master, stochastic_round

_ALIGN = 64  # elements: every parameter starts at a multiple of 128 bytes
_AT_ONCE = {"cpu": 1 << 18, "cuda": 1 << 24}  # elements updated at a time: what caches hold, few launches


@dataclass(frozen=True)
class Piece:
    """What of one parameter lies in this process's part of the buffer."""

    name: str
    start: int  # where in the parameter it begins
    own: slice  # where in this process's part it lies
    grad: Tensor  # (n,) fp32, a view of the gradients


@dataclass
class Group:
    """Parameters with one AdamW and one learning-rate schedule; `ema_decay` 0 keeps no average.

    They are given in fp32 and become `dtype`, fp32 or bfloat16. Those that had no gradient since the last update are
    left alone by it, decay included, as in torch. `gradients_of`: another group whose buffer of gradients serves for
    these too; between the first gradient and the update of one of them the other must get none.
    """

    parameters: dict[str, nn.Parameter]
    learning_rate: float
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    ema_decay: float = 0.0
    ema_start: int = 0
    per_slot: bool = False  # parameters are stacked (S, ...): S independent jobs, each clipped by its own norm
    gradients_of: Group | None = None
    dtype: torch.dtype = torch.float32
    moments: torch.dtype = torch.float32  # in which AdamW's are kept: fp32 or bfloat16
    updates: int = field(init=False, default=0)
    steps: dict[str, int] = field(init=False)  # updates of each parameter
    own: slice = field(init=False)  # this process's part of the buffer
    total: int = field(init=False)  # length of the buffer without the padding at its end
    device: torch.device = field(init=False)

    def __post_init__(self) -> None:
        first = next(iter(self.parameters.values()))
        if any(p.dtype != torch.float32 or p.device != first.device for p in self.parameters.values()):
            raise ValueError("trained parameters must be fp32 and on one device")
        for what, dtype in (("parameters", self.dtype), ("moments", self.moments)):
            if dtype not in (torch.float32, torch.bfloat16):
                raise ValueError(f"{what} cannot be {dtype}; give float32 or bfloat16")
        self.device = first.device
        self._offsets: dict[str, int] = {}
        end = 0
        for name, parameter in self.parameters.items():
            self._offsets[name] = end
            end += -(-parameter.numel() // _ALIGN) * _ALIGN
        self.total = end
        part = -(-end // (distributed.world_size() * _ALIGN)) * _ALIGN
        self.own = slice(distributed.rank() * part, (distributed.rank() + 1) * part)
        self.steps = dict.fromkeys(self.parameters, 0)
        self._touched: set[str] = set()  # parameters with a gradient since the last update
        self._allocate(part)

    def _allocate(self, part: int) -> None:
        """The buffers; the parameters move into theirs, and their gradients are collected in the other."""
        whole, device = part * distributed.world_size(), self.device
        self._flat = torch.zeros(whole, dtype=self.dtype, device=device)
        self._low = None if self.dtype == torch.float32 else torch.zeros(part, dtype=torch.int16, device=device)
        lent: Tensor | None = None if self.gradients_of is None else self.gradients_of._grad
        fits = lent is not None and len(lent) >= whole
        self._grad: Tensor = lent[:whole] if lent is not None and fits else torch.zeros(whole, device=device)
        # Kept apart from the sum, so that a gradient that is not finite can be traced to its process.
        self._own_grad = self._grad if distributed.world_size() == 1 else torch.zeros(part, device=device)
        self._pieces = {piece.name: piece for piece in self._cut()}
        for name, parameter in self.parameters.items():
            self._put(name, parameter.detach())
            parameter.data = self._view(self._flat, name)
            parameter.register_post_accumulate_grad_hook(self._collector(name))
        self._state = {"param": self._flat[self.own]}  # by kind: this process's part as it is stored
        for kind in ("exp_avg", "exp_avg_sq"):
            self._state[kind] = torch.zeros(part, dtype=self.moments, device=device)
        if self.ema_decay:
            self._state["ema"] = torch.empty(part, device=device)
            for at in self._parts(slice(0, part)):
                self._state["ema"][at] = self._read("param", at)

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
        if (piece := self._pieces.get(name)) is not None:
            self._low[piece.own] = low.flatten()[piece.start : piece.start + len(piece.grad)]

    def _cut(self) -> Iterator[Piece]:
        for name, parameter in self.parameters.items():
            offset = self._offsets[name]
            start, stop = max(offset, self.own.start), min(offset + parameter.numel(), self.own.stop)
            if start < stop:
                own = slice(start - self.own.start, stop - self.own.start)
                yield Piece(name, start - offset, own, self._own_grad[own])

    def _read(self, kind: str, at: slice) -> Tensor:
        """A stretch of this process's part of the state in fp32; the stored numbers themselves where they are fp32."""
        stored = self._state[kind][at]
        return merge_bf16_master(stored, self._low[at]) if kind == "param" and self._low is not None else stored.float()

    def _write(self, kind: str, at: slice, value: Tensor) -> None:
        stored = self._state[kind][at]
        if kind == "param" and self._low is not None:
            high, self._low[at] = split_bf16_master(value)
            stored.copy_(high)
        elif stored.dtype == torch.bfloat16:
            stored.copy_(stochastic_round(value, self.updates))
        elif value.data_ptr() != stored.data_ptr():
            stored.copy_(value)

    def _parts(self, at: slice) -> Iterator[slice]:
        """A stretch in pieces for which the working copies are small."""
        size = _AT_ONCE["cpu" if self.device.type == "cpu" else "cuda"]
        return (slice(first, min(first + size, at.stop)) for first in range(at.start, at.stop, size))

    def _collector(self, name: str) -> Callable[[Tensor], None]:
        """Moves a parameter's gradient into the buffer as soon as the backward pass has made it."""

        def collect(parameter: Tensor) -> None:
            if parameter.grad is not None:
                view = self._view(self._grad, name)
                view.add_(parameter.grad) if name in self._touched else view.copy_(parameter.grad)
                self._touched.add(name)
                parameter.grad = None

        return collect

    def gradient(self, name: str) -> Tensor | None:
        """This process's gradient (fp32) of a parameter since the last update; None where there was none."""
        return self._view(self._grad, name) if name in self._touched else None

    def fp32_parameters(self) -> dict[str, Tensor]:
        """The parameters in fp32. All processes must call it."""
        return self._whole("param")

    def averaged(self) -> dict[str, Tensor]:
        """The parameters to export, fp32: their average where one is kept. All processes must call it."""
        return self._whole("ema" if "ema" in self._state else "param")

    def _whole(self, kind: str) -> dict[str, Tensor]:
        flat = self._flat
        if kind != "param" or self._low is not None:
            own = self._read(kind, slice(0, self.own.stop - self.own.start))
            flat = own
            if distributed.world_size() > 1:
                flat = torch.empty(len(self._flat), device=self.device)
                distributed.all_gather(flat, own)
        return {name: self._view(flat, name) for name in self.parameters}

    def assign(self, values: Mapping[str, Tensor]) -> None:
        """Give the parameters these values (fp32, the same on all processes); moments and average stay."""
        for name, value in values.items():
            self._put(name, value)

    def forget_gradients(self) -> None:
        self._touched.clear()

    def sum_gradients(self) -> list[Piece]:
        """Sum the gradients over all processes; returns this process's pieces of the parameters that have some."""
        if distributed.world_size() > 1:
            for name in self.parameters.keys() - self._touched:
                self._view(self._grad, name).zero_()
            distributed.reduce_scatter(self._own_grad, self._grad)
        return [piece for piece in self._pieces.values() if piece.name in self._touched]

    def update(self, learning_rate: float) -> None:
        """AdamW and average on this process's part; then every process has all parameters again."""
        for run, steps in self._runs():
            for at in self._parts(run):
                self._adamw(at, steps, learning_rate)
        for name in self._touched:
            self.steps[name] += 1
        self.forget_gradients()
        self.updates += 1
        if "ema" in self._state:
            since = self.updates - self.ema_start
            # The average starts as a copy and forgets the start at the pace of its own age.
            decay = 0.0 if since <= 0 else min(self.ema_decay, since / (since + 10))
            for at in self._parts(slice(0, self.own.stop - self.own.start)):
                self._state["ema"][at].lerp_(self._read("param", at), 1 - decay)
        self.share_parameters()

    def _runs(self) -> Iterator[tuple[slice, int]]:
        """Stretches of this process's part without a gap, all of gradients, and how often they were updated."""
        run, steps = slice(0, 0), 0
        for piece in self._pieces.values():
            if piece.name not in self._touched:
                continue
            if piece.own.start == run.stop and self.steps[piece.name] == steps:
                run = slice(run.start, piece.own.stop)
                continue
            if run.start < run.stop:
                yield run, steps
            run, steps = piece.own, self.steps[piece.name]
        if run.start < run.stop:
            yield run, steps

    def _adamw(self, at: slice, steps: int, learning_rate: float) -> None:
        now = {kind: self._read(kind, at) for kind in ("param", "exp_avg", "exp_avg_sq")}
        adamw(
            [now["param"]],
            [self._own_grad[at]],
            [now["exp_avg"]],
            [now["exp_avg_sq"]],
            [],
            [torch.full((), float(steps), device=self.device)],
            fused=True,
            amsgrad=False,
            beta1=self.betas[0],
            beta2=self.betas[1],
            lr=learning_rate,
            weight_decay=self.weight_decay,
            eps=self.epsilon,
            maximize=False,
        )
        for kind, value in now.items():
            self._write(kind, at, value)

    def share_parameters(self) -> None:
        """Give every process the parts of the parameters that the others keep."""
        if distributed.world_size() > 1:
            distributed.all_gather(self._flat, self._state["param"].clone())

    def layout(self) -> list[tuple[str, list[int]]]:
        """Names and shapes in the buffer's order; what a checkpoint must have to fit."""
        return [(name, list(parameter.shape)) for name, parameter in self.parameters.items()]

    @property
    def own_length(self) -> int:
        """Elements of this process's part without the padding at the buffer's end."""
        start, stop = int(self.own.start), int(self.own.stop)
        return max(0, min(stop, self.total) - start)

    def snapshot(self) -> dict[str, Tensor]:
        """Copies (own_length,) of this process's part of the state by kind ("param", "exp_avg", "exp_avg_sq", "ema"),
        in fp32 whatever `dtype` is, in CPU memory."""
        copies = {kind: torch.empty(self.own_length) for kind in self._state}
        for kind, copy in copies.items():
            for at in self._parts(slice(0, self.own_length)):
                copy[at] = self._read(kind, at)
        return copies

    def restore(self, read: Callable[[str, int, int], Tensor], steps: dict[str, int], updates: int) -> None:
        """Take over a state: `read(kind, start, stop)` gives that part of the unpadded buffer of a kind, as
        `snapshot` has it."""
        length = self.own_length
        for kind in self._state if length else ():
            values = read(kind, self.own.start, self.own.start + length).to(self.device)
            self._write(kind, slice(0, length), values)
        self.share_parameters()
        self.steps = {name: steps[name] for name in self.parameters}
        self.updates = updates
        self.forget_gradients()


def apply_gradients(group: Group, factor: float, where: str) -> float:
    """Sum over processes, clip, step, average, clear; returns the gradient norm before clipping.

    Raises `NonFiniteError` on every process, naming `where` of those whose gradient is not finite; parameters and
    optimizer are then untouched.
    """
    pieces = group.sum_gradients()
    norm = _clip_per_slot(group, pieces) if group.per_slot else _clip(group, pieces)
    if not math.isfinite(norm):
        own = (group.gradient(name) for name in group.parameters)
        sound = all(bool(grad.isfinite().all()) for grad in own if grad is not None)
        group.forget_gradients()
        raise NonFiniteError(f"gradient is not finite at {_whose('' if sound else where)}; nothing was updated")
    group.update(group.learning_rate * factor)
    return norm


def check_finite(loss: Tensor, where: str) -> Tensor:
    """`loss` itself, this process's share of it; or on every process `NonFiniteError`, naming `where` of those whose
    share is not finite."""
    sound = bool(torch.isfinite(loss))
    if distributed.max_over_processes([float(not sound)], loss.device)[0]:
        fault = "" if sound else f"loss is {loss.item()} at {where}"
        raise NonFiniteError(f"{_whose(fault)}; nothing was updated")
    return loss


def _whose(fault: str) -> str:
    """The faults of all processes, one each at most, in one text."""
    texts = distributed.gather_texts(fault)
    if distributed.world_size() == 1:
        return texts[0]
    found = [f"{text} on process {rank} of {len(texts)}" for rank, text in enumerate(texts) if text]
    return "; ".join(found) or "the sum of all processes"


def _clip(group: Group, pieces: list[Piece]) -> float:
    grads = [piece.grad for piece in pieces]
    total = torch.nn.utils.get_total_norm(grads) if grads else torch.zeros((), device=group.device)
    if distributed.world_size() > 1:
        total = distributed.sum_over_processes(total.square()).sqrt()
    norm = float(total)
    if grads and norm > group.max_grad_norm:
        torch._foreach_mul_(grads, group.max_grad_norm / (norm + 1e-6))
    return norm


def _clip_per_slot(group: Group, pieces: list[Piece]) -> float:
    """Clip each slot of stacked parameters by its own norm; returns the largest."""
    slots = len(next(iter(group.parameters.values())))
    squares = [torch.zeros(slots, device=group.device)] if not pieces else []
    for piece in pieces:
        squares.append(torch.zeros(slots, device=group.device))
        for first, rows in _by_slot(piece, group.parameters[piece.name]):
            squares[-1][first : first + len(rows)] += rows.square().sum(1)
    norms = distributed.sum_over_processes(torch.stack(squares).sum(0)).sqrt()
    factors = (group.max_grad_norm / norms.clamp_min(1e-12)).clamp_max(1.0)
    for piece in pieces:
        for first, rows in _by_slot(piece, group.parameters[piece.name]):
            rows.mul_(factors[first : first + len(rows), None])
    return float(norms.max())


def _by_slot(piece: Piece, parameter: Tensor) -> Iterator[tuple[int, Tensor]]:
    """The gradient of a piece of stacked parameters as rows of one slot each, with the first row's slot: the end of a
    slot, whole slots, the beginning of one."""
    grad, size = piece.grad, parameter[0].numel()
    head = min(len(grad), -piece.start % size)
    body = head + (len(grad) - head) // size * size
    for start, stop, width in ((0, head, head), (head, body, size), (body, len(grad), len(grad) - body)):
        if start < stop:
            yield (piece.start + start) // size, grad[start:stop].view(-1, width)


@contextmanager
def averaged_weights(group: Group) -> Iterator[None]:
    """Put what a group exports, in fp32, in place of its parameters for a while (files, sample grids). All processes
    must enter it; nothing can be trained inside."""
    kept = {name: value.data for name, value in group.parameters.items()}
    for name, value in group.averaged().items():
        group.parameters[name].data = value
    try:
        yield
    finally:
        for name, value in kept.items():
            group.parameters[name].data = value

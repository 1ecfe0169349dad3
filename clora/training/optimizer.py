"""AdamW on flat parameters, their average, and the one way in which gradients reach them.

Each process keeps the moments and the average of its shard alone, and updates that (`FlatParameters`).
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
from clora.training.bf16_master import stochastic_round
from clora.training.flat_parameters import FlatParameters, Piece, stretches
from clora.training.muon import MOMENTUM, muon_steps


@dataclass
class AdamW:
    """AdamW with one learning-rate schedule on `flat`, and the average of its parameters; `ema_decay` 0 keeps none.

    Parameters that had no gradient since the last update are left alone by it, decay included, as in torch. The first
    `coarse_updates` are a stage of their own, with `muon` Muon's, whose momentum is kept in the first moment's place.
    What follows starts without moments: those of a stage with smaller gradients would make its steps too long, until
    they had faded after some 1 / (1 - beta2) updates.
    """

    flat: FlatParameters
    learning_rate: float
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    ema_decay: float = 0.0
    ema_start: int = 0
    per_slot: bool = False  # parameters are stacked (S, ...): S independent jobs, each clipped by its own norm
    moments: torch.dtype = torch.float32  # the type they are kept in: fp32 or bfloat16
    coarse_updates: int = 0
    muon: bool = False
    updates: int = field(init=False, default=0)
    steps: dict[str, int] = field(init=False)  # updates of each parameter

    def __post_init__(self) -> None:
        if self.moments not in (torch.float32, torch.bfloat16):
            raise ValueError(f"moments cannot be {self.moments}; give float32 or bfloat16")
        self.steps = dict.fromkeys(self.flat.parameters, 0)
        device, length = self.flat.device, self._whole_shard.stop
        # By kind: this process's shard of the state besides the parameters, as it is stored.
        self._state = {
            kind: torch.zeros(length, dtype=self.moments, device=device) for kind in ("exp_avg", "exp_avg_sq")
        }
        if self.ema_decay:
            self._state["ema"] = torch.empty(length, device=device)
            for at in stretches(self._whole_shard, device):
                self._state["ema"][at] = self.flat.read(at)

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The parameters as they are computed with."""
        return self.flat.parameters

    @property
    def _whole_shard(self) -> slice:
        return slice(0, self.flat.shard.stop - self.flat.shard.start)

    def fp32_parameters(self) -> dict[str, Tensor]:
        """The parameters in fp32. All processes must call it."""
        return self.flat.fp32_parameters()

    def averaged(self) -> dict[str, Tensor]:
        """The parameters to export, fp32: their average where one is kept. All processes must call it."""
        return self.flat.gather(self._state["ema"]) if "ema" in self._state else self.flat.fp32_parameters()

    def assign(self, values: Mapping[str, Tensor]) -> None:
        """Give the parameters these values (fp32, the same on all processes); moments and average stay."""
        self.flat.assign(values)

    def update(self, learning_rate: float) -> None:
        """An update, and the average, of this process's shard; then every process has all parameters again."""
        if self.updates == self.coarse_updates > 0:
            self._start_moments()
        if self.muon and self.updates < self.coarse_updates:
            self._muon(learning_rate)
        else:
            for run, steps in self._runs():
                for at in stretches(run, self.flat.device):
                    self._adamw(at, steps, learning_rate)
        for name in self.flat.touched:
            self.steps[name] += 1
        self.flat.forget_gradients()
        self.updates += 1
        if "ema" in self._state:
            since = self.updates - self.ema_start
            # The average starts as a copy and forgets the start at the pace of its own age.
            decay = 0.0 if since <= 0 else min(self.ema_decay, since / (since + 10))
            for at in stretches(self._whole_shard, self.flat.device):
                self._state["ema"][at].lerp_(self.flat.read(at), 1 - decay)
        self.flat.share()

    def _runs(self) -> Iterator[tuple[slice, int]]:
        """Stretches of the shard without a gap, all of gradients, and how often they were updated."""
        run, steps = slice(0, 0), 0
        for piece in self.flat.pieces.values():
            if piece.name not in self.flat.touched:
                continue
            if piece.at.start == run.stop and self.steps[piece.name] == steps:
                run = slice(run.start, piece.at.stop)
                continue
            if run.start < run.stop:
                yield run, steps
            run, steps = piece.at, self.steps[piece.name]
        if run.start < run.stop:
            yield run, steps

    def _adamw(self, at: slice, steps: int, learning_rate: float) -> None:
        now = {kind: self._read(kind, at) for kind in ("param", "exp_avg", "exp_avg_sq")}
        adamw(
            [now["param"]],
            [self.flat.shard_gradient[at]],
            [now["exp_avg"]],
            [now["exp_avg_sq"]],
            [],
            [torch.full((), float(steps), device=self.flat.device)],
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

    def _start_moments(self) -> None:
        """AdamW's beginning: no moments, no updates of any parameter."""
        for kind in ("exp_avg", "exp_avg_sq"):
            self._state[kind].zero_()
        self.steps = dict.fromkeys(self.steps, 0)

    def _muon(self, learning_rate: float) -> None:
        """Nesterov's momentum and a step along it. A matrix that lies in several shards is made orthogonal by each of
        their processes, from the whole of it."""
        pieces = [piece for piece in self.flat.pieces.values() if piece.name in self.flat.touched]
        directions = torch.zeros(self._whole_shard.stop, device=self.flat.device)
        for piece in pieces:
            gradient = self.flat.shard_gradient[piece.at]
            momentum = self._read("exp_avg", piece.at).lerp(gradient, 1 - MOMENTUM)
            self._write("exp_avg", piece.at, momentum)
            directions[piece.at] = gradient.lerp(momentum, MOMENTUM)
        whole = self.flat.gather(directions)
        for name, step in muon_steps({piece.name: whole[piece.name] for piece in pieces}):
            piece = self.flat.pieces[name]
            step = step.flatten()[piece.start :][: piece.at.stop - piece.at.start]
            kept = self.flat.read(piece.at) * (1 - learning_rate * self.weight_decay)
            self.flat.write(piece.at, kept - learning_rate * step)

    def _read(self, kind: str, at: slice) -> Tensor:
        """A stretch of the shard of the state in fp32; the stored numbers themselves where they are fp32."""
        return self.flat.read(at) if kind == "param" else self._state[kind][at].float()

    def _write(self, kind: str, at: slice, value: Tensor) -> None:
        if kind == "param":
            self.flat.write(at, value)
            return
        stored = self._state[kind][at]
        if stored.dtype == torch.bfloat16:
            stored.copy_(stochastic_round(value, self.updates))
        elif value.data_ptr() != stored.data_ptr():
            stored.copy_(value)

    def snapshot(self) -> dict[str, Tensor]:
        """Copies (flat.shard_length,) of the shard of the state by kind ("param", "exp_avg", "exp_avg_sq", "ema"), in
        fp32 whatever type it is kept in, in CPU memory."""
        length = self.flat.shard_length
        copies = {kind: torch.empty(length) for kind in ("param", *self._state)}
        for kind, copy in copies.items():
            for at in stretches(slice(0, length), self.flat.device):
                copy[at] = self._read(kind, at)
        return copies

    def restore(self, read: Callable[[str, int, int], Tensor], steps: dict[str, int], updates: int) -> None:
        """Take over a state: `read(kind, start, stop)` gives that part of the unpadded buffer of a kind, as
        `snapshot` has it."""
        start, length = self.flat.shard.start, self.flat.shard_length
        for kind in ("param", *self._state) if length else ():
            values = read(kind, start, start + length).to(self.flat.device)
            self._write(kind, slice(0, length), values)
        self.flat.share()
        self.steps = {name: steps[name] for name in self.flat.parameters}
        self.updates = updates
        self.flat.forget_gradients()


def apply_gradients(optimizer: AdamW, factor: float, where: str) -> float:
    """Sum over processes, clip, step, average, clear; returns the gradient norm before clipping.

    Raises `NonFiniteError` on every process, naming `where` of those whose gradient is not finite; parameters and
    optimizer are then untouched.
    """
    flat = optimizer.flat
    pieces = flat.sum_gradients()
    norm = _clip_per_slot(optimizer, pieces) if optimizer.per_slot else _clip(optimizer, pieces)
    if not math.isfinite(norm):
        own = (flat.gradient(name) for name in flat.parameters)
        sound = all(bool(grad.isfinite().all()) for grad in own if grad is not None)
        flat.forget_gradients()
        raise NonFiniteError(f"gradient is not finite at {_whose('' if sound else where)}; nothing was updated")
    optimizer.update(optimizer.learning_rate * factor)
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


def _clip(optimizer: AdamW, pieces: list[tuple[Piece, Tensor]]) -> float:
    grads = [grad for _, grad in pieces]
    total = torch.nn.utils.get_total_norm(grads) if grads else torch.zeros((), device=optimizer.flat.device)
    if distributed.world_size() > 1:
        total = distributed.sum_over_processes(total.square()).sqrt()
    norm = float(total)
    if grads and norm > optimizer.max_grad_norm:
        torch._foreach_mul_(grads, optimizer.max_grad_norm / (norm + 1e-6))
    return norm


def _clip_per_slot(optimizer: AdamW, pieces: list[tuple[Piece, Tensor]]) -> float:
    """Clip each slot of stacked parameters by its own norm; returns the largest."""
    parameters, device = optimizer.parameters, optimizer.flat.device
    slots = len(next(iter(parameters.values())))
    squares = [torch.zeros(slots, device=device)] if not pieces else []
    for piece, grad in pieces:
        squares.append(torch.zeros(slots, device=device))
        for first, rows in _by_slot(piece, grad, parameters[piece.name]):
            squares[-1][first : first + len(rows)] += rows.square().sum(1)
    norms = distributed.sum_over_processes(torch.stack(squares).sum(0)).sqrt()
    factors = (optimizer.max_grad_norm / norms.clamp_min(1e-12)).clamp_max(1.0)
    for piece, grad in pieces:
        for first, rows in _by_slot(piece, grad, parameters[piece.name]):
            rows.mul_(factors[first : first + len(rows), None])
    return float(norms.max())


def _by_slot(piece: Piece, grad: Tensor, parameter: Tensor) -> Iterator[tuple[int, Tensor]]:
    """The gradient of a piece of stacked parameters as rows of one slot each, with the first row's slot: the end of a
    slot, whole slots, the beginning of one."""
    size = parameter[0].numel()
    head = min(len(grad), -piece.start % size)
    body = head + (len(grad) - head) // size * size
    for start, stop, width in ((0, head, head), (head, body, size), (body, len(grad), len(grad) - body)):
        if start < stop:
            yield (piece.start + start) // size, grad[start:stop].view(-1, width)


@contextmanager
def averaged_weights(optimizer: AdamW) -> Iterator[None]:
    """Put the fp32 values to export in place of an optimizer's parameters for a while (files, sample grids). All
    processes must enter it; nothing can be trained inside."""
    kept = {name: value.data for name, value in optimizer.parameters.items()}
    for name, value in optimizer.averaged().items():
        optimizer.parameters[name].data = value
    try:
        yield
    finally:
        for name, value in kept.items():
            optimizer.parameters[name].data = value

"""Parameters with their optimizer, flat in memory and shared out among the processes (ZeRO-1).

The parameters of a group are views into one fp32 buffer. Process r of N keeps AdamW's moments and the average of the
r-th part of it alone: gradients are summed into that part by one reduce-scatter, updated there, and the parameters come
back by one all-gather, together the traffic of one all-reduce. One process has the whole and communicates nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from clora import distributed

_ALIGN = 64  # elements: every parameter starts at a multiple of 256 bytes


class NonFiniteError(ArithmeticError):
    """A loss or gradient that is not finite: nothing was updated."""


@dataclass(frozen=True)
class Piece:
    """The part of one parameter in this process's part of the buffer; `start`: where in the parameter it begins."""

    name: str
    start: int
    value: nn.Parameter  # (n,), a view of the buffer; its grad one of the gradients


@dataclass
class Group:
    """Parameters with one AdamW and one learning-rate schedule; `ema_decay` 0 keeps no average.

    Parameters that had no gradient since the last update are left alone by it, decay included, as in torch.
    `gradients_of`: another group whose buffer of gradients serves for these too; between the first gradient and the
    update of one of them the other must get none.
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
    optimizer: torch.optim.AdamW = field(init=False)
    updates: int = field(init=False, default=0)
    steps: dict[str, int] = field(init=False)  # updates of each parameter
    own: slice = field(init=False)  # this process's part of the buffer
    total: int = field(init=False)  # length of the buffer without the padding at its end
    state: dict[str, Tensor] = field(init=False)  # "param", "exp_avg", "exp_avg_sq", "ema": this process's part

    def __post_init__(self) -> None:
        first = next(iter(self.parameters.values()))
        if any(p.dtype != torch.float32 or p.device != first.device for p in self.parameters.values()):
            raise ValueError("trained parameters must be fp32 and on one device")
        self._offsets: dict[str, int] = {}
        end = 0
        for name, parameter in self.parameters.items():
            self._offsets[name] = end
            end += -(-parameter.numel() // _ALIGN) * _ALIGN
        self.total = end
        part = -(-end // (distributed.world() * _ALIGN)) * _ALIGN
        self.own = slice(distributed.rank() * part, (distributed.rank() + 1) * part)
        self.steps = dict.fromkeys(self.parameters, 0)
        self._touched: set[str] = set()  # parameters with a gradient since the last update
        self._allocate(part, first.device)
        self._pieces = list(self._cut())
        self.optimizer = torch.optim.AdamW(
            [piece.value for piece in self._pieces] or [nn.Parameter(torch.zeros(0))],
            lr=self.learning_rate,
            betas=self.betas,
            eps=self.epsilon,
            weight_decay=self.weight_decay,
        )
        for piece in self._pieces:
            moments = {key: self._of_piece(self.state[key], piece) for key in ("exp_avg", "exp_avg_sq")}
            self.optimizer.state[piece.value] = {"step": torch.tensor(0.0), **moments}

    def _allocate(self, part: int, device: torch.device) -> None:
        """The buffers; the parameters move into theirs, and their gradients are collected in the other."""
        whole = part * distributed.world()
        self._flat = torch.zeros(whole, device=device)
        lent: Tensor | None = None if self.gradients_of is None else self.gradients_of._grad
        fits = lent is not None and len(lent) >= whole
        self._grad: Tensor = lent[:whole] if lent is not None and fits else torch.zeros(whole, device=device)
        # Kept apart from the sum, so that a gradient that is not finite can be traced to its process.
        self._own_grad = self._grad if distributed.world() == 1 else torch.zeros(part, device=device)
        for name, parameter in self.parameters.items():
            view = self._view(self._flat, name)
            view.copy_(parameter.detach())
            parameter.data = view
            parameter.register_post_accumulate_grad_hook(self._collector(name))
        self.state = {"param": self._flat[self.own]}
        self.state |= {key: torch.zeros(part, device=device) for key in ("exp_avg", "exp_avg_sq")}
        if self.ema_decay:
            self.state["ema"] = self.state["param"].clone()

    def _view(self, flat: Tensor, name: str) -> Tensor:
        parameter, offset = self.parameters[name], self._offsets[name]
        return flat[offset : offset + parameter.numel()].view(parameter.shape)

    def _cut(self) -> Iterator[Piece]:
        for name, parameter in self.parameters.items():
            offset = self._offsets[name]
            start, stop = max(offset, self.own.start), min(offset + parameter.numel(), self.own.stop)
            if start < stop:
                value = nn.Parameter(self._flat[start:stop])
                piece = Piece(name, start - offset, value)
                value.grad = self._of_piece(self._own_grad, piece)
                yield piece

    def _of_piece(self, own: Tensor, piece: Piece) -> Tensor:
        start = self._offsets[piece.name] + piece.start - self.own.start
        return own[start : start + piece.value.numel()]

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
        """This process's gradient of a parameter since the last update; None where there was none."""
        return self._view(self._grad, name) if name in self._touched else None

    def averaged(self) -> dict[str, Tensor]:
        """The parameters to export: their average where one is kept. All processes must call it."""
        flat = self._flat
        if "ema" in self.state:
            flat = self.state["ema"]
            if distributed.world() > 1:
                flat = torch.empty_like(self._flat)
                distributed.all_gather(flat, self.state["ema"])
        return {name: self._view(flat, name) for name in self.parameters}

    def forget_gradients(self) -> None:
        self._touched.clear()

    def sum_gradients(self) -> list[Piece]:
        """Sum the gradients over all processes; returns this process's pieces of the parameters that have some."""
        if distributed.world() > 1:
            for name in self.parameters.keys() - self._touched:
                self._view(self._grad, name).zero_()
            distributed.reduce_scatter(self._own_grad, self._grad)
        return [piece for piece in self._pieces if piece.name in self._touched]

    def update(self, learning_rate: float) -> None:
        """AdamW and average on this process's part; then every process has all parameters again."""
        idle = [piece for piece in self._pieces if piece.name not in self._touched]
        for piece in idle:
            piece.value.grad = None  # torch leaves it alone then
        for settings in self.optimizer.param_groups:
            settings["lr"] = learning_rate
        self.optimizer.step()
        for piece in idle:
            piece.value.grad = self._of_piece(self._own_grad, piece)
        for name in self._touched:
            self.steps[name] += 1
        self.forget_gradients()
        self.updates += 1
        if "ema" in self.state:
            since = self.updates - self.ema_start
            # The average starts as a copy and forgets the start at the pace of its own age.
            decay = 0.0 if since <= 0 else min(self.ema_decay, since / (since + 10))
            self.state["ema"].lerp_(self.state["param"], 1 - decay)
        self.share_parameters()

    def share_parameters(self) -> None:
        """Give every process the parts of the parameters that the others keep."""
        if distributed.world() > 1:
            distributed.all_gather(self._flat, self.state["param"].clone())

    def layout(self) -> list[tuple[str, list[int]]]:
        """Names and shapes in the buffer's order; what a checkpoint must have to fit."""
        return [(name, list(parameter.shape)) for name, parameter in self.parameters.items()]

    def restore(self, read: Callable[[str, int, int], Tensor], steps: dict[str, int], updates: int) -> None:
        """Take over a state: `read(kind, start, stop)` gives that part of the unpadded buffer of `state[kind]`."""
        length = max(0, min(self.own.stop, self.total) - self.own.start)
        with torch.no_grad():
            for kind, part in self.state.items():
                if length:
                    part[:length].copy_(read(kind, self.own.start, self.own.start + length))
        self.share_parameters()
        self.steps = {name: steps[name] for name in self.parameters}
        for piece in self._pieces:
            self.optimizer.state[piece.value]["step"].fill_(self.steps[piece.name])
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
    if distributed.world() == 1:
        return texts[0]
    found = [f"{text} on process {rank} of {len(texts)}" for rank, text in enumerate(texts) if text]
    return "; ".join(found) or "the sum of all processes"


def _clip(group: Group, pieces: list[Piece]) -> float:
    grads = [piece.value.grad for piece in pieces if piece.value.grad is not None]
    norm = torch.nn.utils.get_total_norm(grads) if grads else torch.zeros((), device=group.state["param"].device)
    if distributed.world() > 1:
        norm = distributed.sum_over_processes(norm.square()).sqrt()
    torch.nn.utils.clip_grads_with_norm_([piece.value for piece in pieces], group.max_grad_norm, norm)
    return float(norm)


def _clip_per_slot(group: Group, pieces: list[Piece]) -> float:
    """Clip each slot of stacked parameters by its own norm; returns the largest."""
    slots = len(next(iter(group.parameters.values())))
    squares = [torch.zeros(slots, device=group.state["param"].device)] if not pieces else []
    for piece in pieces:
        squares.append(torch.zeros(slots, device=piece.value.device))
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
    grad, size = piece.value.grad, parameter[0].numel()
    assert grad is not None
    head = min(len(grad), -piece.start % size)
    body = head + (len(grad) - head) // size * size
    for start, stop, width in ((0, head, head), (head, body, size), (body, len(grad), len(grad) - body)):
        if start < stop:
            yield (piece.start + start) // size, grad[start:stop].view(-1, width)

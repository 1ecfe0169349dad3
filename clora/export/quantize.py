"""Numbers of eight bits: which linears of a served network take them, with which scales, and what it costs, simulated
in torch.

The inputs of a linear have one scale, the largest value seen over the format's largest; its weight has one too, in int8
one for each output. What lies beyond is clipped. The layers that cost most when they alone are rounded stay as they
are.

Shape legend: B batch, T image tokens, C latent channels per token.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

KEPT_SHARE = 0.1  # of the linears: those that cost most
LEAST = 1e-12  # that a largest value is taken for, so that a scale is none of zero
Inputs = tuple[Tensor, ...]
EightBits = Literal["fp8", "int8"]


@dataclass(frozen=True)
class Numbers:
    """A format of eight bits, with values from -most to most. per_output: each output of a weight has its own scale."""

    dtype: torch.dtype
    most: float
    per_output: bool


NUMBERS: Mapping[EightBits, Numbers] = {
    "fp8": Numbers(torch.float8_e4m3fn, 448.0, per_output=False),
    "int8": Numbers(torch.int8, 127.0, per_output=True),
}


@dataclass(frozen=True, eq=False)
class Scale:
    """What the input and the weight of a linear are divided by before rounding; the weight's is (1, 1), or (N, 1) for
    N outputs."""

    activation: float
    weight: Tensor


@dataclass(frozen=True, eq=False)
class Choice:
    """The scales of all linears of blocks, the layers kept, each layer's cost alone, and the cost of all and of those
    not kept. A cost is ||v' - v|| / ||v|| of velocities, the largest of the cases; `worst` is the largest difference of
    one value instead, relative to the largest value."""

    numbers: Numbers
    scales: dict[str, Scale]
    kept: tuple[str, ...]
    costs: dict[str, float]
    cost_of_all: float
    cost: float
    worst: float

    @property
    def rounded(self) -> dict[str, Scale]:
        """The scales of the layers that are rounded."""
        return {name: scale for name, scale in self.scales.items() if name not in self.kept}


def block_linears(network: nn.Module) -> dict[str, nn.Linear]:
    """The linears of a served network's blocks, by name; those at its ends are small, and stay as they are."""
    named = network.named_modules()
    return {name: m for name, m in named if isinstance(m, nn.Linear) and name.startswith("blocks.")}


@contextmanager
def watched(network: nn.Module) -> Iterator[dict[str, float]]:
    """While open, the largest magnitude of each block linear's input so far, by name."""
    most: dict[str, float] = {}

    def see(name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        most[name] = max(most.get(name, 0.0), args[0].detach().abs().max().item())

    with ExitStack() as stack:
        for name, linear in block_linears(network).items():
            stack.callback(linear.register_forward_pre_hook(partial(see, name)).remove)
        yield most


def scales_of(network: nn.Module, most: Mapping[str, float], numbers: Numbers) -> dict[str, Scale]:
    """Scales from what was watched; a linear that never ran has none."""
    linears, found = block_linears(network), {}
    for name, seen in most.items():
        weight = linears[name].weight.detach().abs().float()
        largest = weight.amax(dim=1, keepdim=True) if numbers.per_output else weight.max().view(1, 1)
        found[name] = Scale(max(seen, LEAST) / numbers.most, largest.clamp_min(LEAST) / numbers.most)
    return found


def to_eight_bits(x: Tensor, scale: Tensor | float, numbers: Numbers) -> Tensor:
    """x over a scale, which is rounded to x's dtype, to the nearest number; what is beyond is clipped."""
    by = torch.as_tensor(scale).to(x.dtype).float()
    values = (x.float() / by).clamp(-numbers.most, numbers.most)
    return (values if numbers.dtype.is_floating_point else values.round()).to(numbers.dtype)


def rounded(x: Tensor, scale: Tensor | float, numbers: Numbers) -> Tensor:
    """x in eight bits with a scale and back, in x's dtype: what quantizing and dequantizing in a graph does to it."""
    return to_eight_bits(x, scale, numbers).to(x.dtype) * torch.as_tensor(scale).to(x.dtype)


@contextmanager
def simulated(network: nn.Module, scales: Mapping[str, Scale], numbers: Numbers) -> Iterator[None]:
    """While open, the named linears round their weights and inputs; the weights come back as they were."""
    linears = block_linears(network)
    with ExitStack() as stack:
        for name, scale in scales.items():
            linear, weight = linears[name], linears[name].weight.data
            linear.weight.data = rounded(weight, scale.weight, numbers)
            stack.callback(partial(setattr, linear.weight, "data", weight))

            def before(module: nn.Module, args: tuple[Any, ...], by: float = scale.activation) -> tuple[Tensor, ...]:
                return (rounded(args[0], by, numbers), *args[1:])

            stack.callback(linear.register_forward_pre_hook(before).remove)
        yield


@torch.no_grad()
def choose(network: nn.Module, most: Mapping[str, float], cases: Sequence[Inputs], numbers: Numbers) -> Choice:
    """Choose which linears are rounded, and measure the cost on `cases`, inputs of the network."""
    scales = scales_of(network, most, numbers)
    wanted = [network(*case) for case in cases]
    cost = partial(_cost, network, numbers, cases, wanted)
    costs = {name: cost({name: scale}) for name, scale in scales.items()}
    kept = choose_kept(costs)
    left = {name: scale for name, scale in scales.items() if name not in kept}
    with simulated(network, left, numbers):
        worst = max(_worst(network(*case), truth) for case, truth in zip(cases, wanted, strict=True))
    return Choice(numbers, scales, kept, costs, cost(scales), cost(left), worst)


def choose_kept(costs: Mapping[str, float], share: float = KEPT_SHARE) -> tuple[str, ...]:
    """The layers that cost most, in the order of the network; at least one."""
    number = max(1, round(share * len(costs)))
    most = set(sorted(costs, key=lambda name: costs[name], reverse=True)[:number])
    return tuple(name for name in costs if name in most)


def _cost(
    network: nn.Module,
    numbers: Numbers,
    cases: Iterable[Inputs],
    wanted: Iterable[Tensor],
    scales: Mapping[str, Scale],
) -> float:
    with simulated(network, scales, numbers):
        errors = [_relative(network(*case), truth) for case, truth in zip(cases, wanted, strict=True)]
    return max(errors)


def _relative(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def _worst(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).abs().max() / wanted.double().abs().max())

"""FP8 (e4m3): which linears of a served network take it, with which scales, and what it costs, simulated in torch.

Weights and inputs of a linear have one scale each: the largest value seen over 448, the largest of e4m3. What lies
beyond is clipped. The layers that cost most when they alone are rounded stay as they are.

Shape legend: B batch, T image tokens, C latent channels per token.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

E4M3_MOST = 448.0
KEPT_SHARE = 0.1  # of the linears: those that cost most
Inputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Scale:
    """What the input and the weight of a linear are divided by before rounding."""

    activation: float
    weight: float


@dataclass(frozen=True, eq=False)
class Fp8:
    """The scales of all linears of blocks, the layers kept, each layer's cost alone, and the cost of all and of those
    not kept. A cost is ||v' - v|| / ||v|| of velocities, the largest of the cases; `worst` is the largest difference of
    one value instead, relative to the largest value."""

    scales: dict[str, Scale]
    kept: tuple[str, ...]
    costs: dict[str, float]
    cost_of_all: float
    cost: float
    worst: float

    @property
    def rounded(self) -> dict[str, Scale]:
        """The scales of the layers that take FP8."""
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


def scales_of(network: nn.Module, most: Mapping[str, float]) -> dict[str, Scale]:
    """Scales from what was watched; a linear that never ran has none."""
    linears = block_linears(network)
    return {name: Scale(_scale(seen), _scale(linears[name].weight.abs().max().item())) for name, seen in most.items()}


def to_fp8(x: Tensor, scale: float) -> Tensor:
    """x over a scale, which is of x's dtype, to the nearest of e4m3; what is beyond is clipped."""
    by = torch.tensor(scale, dtype=x.dtype)
    return (x / by).clamp(-E4M3_MOST, E4M3_MOST).to(torch.float8_e4m3fn)


def rounded(x: Tensor, scale: float) -> Tensor:
    """x as FP8 with a scale and back, in x's dtype: what quantizing and dequantizing in a graph does to it."""
    return to_fp8(x, scale).to(x.dtype) * torch.tensor(scale, dtype=x.dtype)


@contextmanager
def simulated(network: nn.Module, scales: Mapping[str, Scale]) -> Iterator[None]:
    """While open, the named linears round their weights and inputs to FP8; the weights come back as they were."""
    linears = block_linears(network)
    with ExitStack() as stack:
        for name, scale in scales.items():
            linear, weight = linears[name], linears[name].weight.data
            linear.weight.data = rounded(weight, scale.weight)
            stack.callback(partial(setattr, linear.weight, "data", weight))

            def before(module: nn.Module, args: tuple[Any, ...], by: float = scale.activation) -> tuple[Tensor, ...]:
                return (rounded(args[0], by), *args[1:])

            stack.callback(linear.register_forward_pre_hook(before).remove)
        yield


@torch.no_grad()
def measure(network: nn.Module, most: Mapping[str, float], cases: Sequence[Inputs]) -> Fp8:
    """Choose what takes FP8 and measure its cost on `cases`, inputs of the network."""
    scales = scales_of(network, most)
    wanted = [network(*case) for case in cases]
    cost = partial(_cost, network, cases, wanted)
    costs = {name: cost({name: scale}) for name, scale in scales.items()}
    kept = choose_kept(costs)
    left = {name: scale for name, scale in scales.items() if name not in kept}
    with simulated(network, left):
        worst = max(_worst(network(*case), truth) for case, truth in zip(cases, wanted, strict=True))
    return Fp8(scales, kept, costs, cost(scales), cost(left), worst)


def choose_kept(costs: Mapping[str, float], share: float = KEPT_SHARE) -> tuple[str, ...]:
    """The layers that cost most, in the order of the network; at least one."""
    number = max(1, round(share * len(costs)))
    most = set(sorted(costs, key=lambda name: costs[name], reverse=True)[:number])
    return tuple(name for name in costs if name in most)


def _cost(network: nn.Module, cases: Iterable[Inputs], wanted: Iterable[Tensor], scales: Mapping[str, Scale]) -> float:
    with simulated(network, scales):
        errors = [_relative(network(*case), truth) for case, truth in zip(cases, wanted, strict=True)]
    return max(errors)


def _relative(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def _worst(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).abs().max() / wanted.double().abs().max())


def _scale(most: float) -> float:
    return max(most, 1e-12) / E4M3_MOST

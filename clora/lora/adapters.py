"""Adapter slots: one frozen base, many LoRAs on it, chosen per sample.

`inject_adapters` turns the target linears of a transformer into `SlotLinear`s that hold the same weights.
Adapters live in stacks: a stack has S slots of one rank, and per linear two parameters `A_SrK`, `B_SNr`.
`Adapters.use` names the slot of every sample of the next forwards:

    with adapters.use(["teachers/0", None, ("student", "fast")]):  # a slot, the base, the sum of two slots
        transformer(...)

    y = x W^T + b + sum over the sample's slots of (alpha / rank) x A^T B^T

Shape legend: S slots of a stack, r rank, K inputs, N outputs of a linear; B samples, R rows, T tokens; G
groups of consecutive samples with one slot each.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from clora.errors import InputError, did_you_mean, raise_faults
from clora.lora.module import LoraModule
from clora.lora.slots import Plan, Slot, SlotChoice, SlotLinear, make_plan, merge_weight

Init = Literal["lora", "zeros"]


class Adapters:
    """All adapters of one transformer, by slot name."""

    def __init__(self, linears: Mapping[str, SlotLinear], choice: SlotChoice) -> None:
        self.linears = dict(linears)
        self.choice = choice
        self._slots: dict[str, tuple[str, int]] = {}  # slot name -> (stack, index)
        self._stacks: dict[str, tuple[int, float]] = {}  # stack -> (rank, alpha)
        self._plans: dict[tuple[tuple[Slot, ...], torch.device], Plan] = {}
        self._merged: Slot = None
        self.device: torch.device | None = None  # of the adapters; None: where the linears' weights are

    @property
    def module_shapes(self) -> dict[str, tuple[int, int]]:
        """The adapted linears, (N, K) by module name; what `read_lora` checks a file against."""
        return {name: (linear.out_features, linear.in_features) for name, linear in self.linears.items()}

    @property
    def dtype(self) -> torch.dtype:
        """What adapters are computed in: the type of the base's weights, before any quantization."""
        return next(iter(self.linears.values())).weight.dtype

    @property
    def slot_names(self) -> tuple[str, ...]:
        return tuple(self._slots)

    def add_stack(
        self,
        name: str,
        slots: Sequence[str],
        rank: int,
        alpha: float,
        trainable: bool,
        init: Init = "lora",
        generator: torch.Generator | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Add `len(slots)` adapters of one rank to every linear.

        init "lora": A uniform in +-1/sqrt(K) from `generator` (a CPU generator; the draws do not depend on
        the device) and B zero, so that the model is unchanged and A and B both learn. "zeros": empty slots
        that do nothing until `load_slot`. `dtype` is the stored type; keep fp32 for trained stacks.
        """
        if not name.isidentifier() or name in self._stacks:
            raise ValueError(f"stack name {name!r} is taken or no identifier")
        if taken := [slot for slot in slots if slot in self._slots]:
            raise ValueError(f"slot names {taken} are taken")
        if len(set(slots)) != len(slots) or not slots or rank < 1 or not alpha > 0:
            raise ValueError(f"stack {name!r} needs distinct slots, a rank of 1 or more and a positive alpha")
        count = len(slots)
        for linear in self.linears.values():
            shape = (count, rank, linear.in_features)
            A = torch.zeros(shape) if init == "zeros" else _draw_A(shape, generator)
            B = torch.zeros(count, linear.out_features, rank)
            device = self.device or linear.weight.device
            linear.add_stack(name, A.to(device, dtype), B.to(device, dtype), trainable)
            for index in range(count):
                linear.set_slot(name, index, 0 if init == "zeros" else rank, float(alpha))
        self._stacks[name] = (rank, float(alpha))
        self._slots |= {slot: (name, index) for index, slot in enumerate(slots)}
        self._plans.clear()

    def add_lora(
        self,
        slot: str,
        modules: Mapping[str, LoraModule],
        trainable: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """A stack of one slot, both named `slot`, that is exactly this LoRA at its largest rank; raises as
        `load_slot` does."""
        rank = max(module.rank for module in modules.values())
        self.add_stack(slot, [slot], rank, rank, trainable=trainable, init="zeros", dtype=dtype)
        self.load_slot(slot, modules)

    def remove_stack(self, name: str) -> None:
        """Remove a stack with all its slots and parameters."""
        if name not in self._stacks:
            raise InputError(f"unknown stack {name!r}; the known ones are {', '.join(self._stacks) or 'none'}")
        for linear in self.linears.values():
            linear.remove_stack(name)
        del self._stacks[name]
        self._slots = {slot: place for slot, place in self._slots.items() if place[0] != name}
        self._plans.clear()

    def named_parameters(self, stack: str) -> dict[str, nn.Parameter]:
        """A stack's parameters as `MODULE.A` (S, r, K) and `MODULE.B` (S, N, r), in a fixed order."""
        return {
            f"{name}.{part}": table[stack]
            for name, linear in self.linears.items()
            for part, table in (("A", linear.A), ("B", linear.B))
        }

    def parameters(self, stack: str) -> list[nn.Parameter]:
        return list(self.named_parameters(stack).values())

    @torch.no_grad()
    def load_slot(self, slot: str, modules: Mapping[str, LoraModule]) -> None:
        """Make `slot` exactly this LoRA: zero in the linears it lacks and in the padding up to the stack's
        rank.

        Raises `InputErrors` naming every module that is not adapted, has another shape or a larger rank; the
        slot is then unchanged. Use `init_slot` to start training from a LoRA.
        """
        stack, index = self._place(slot)
        self._check_fit(slot, modules)
        for name, linear in self.linears.items():
            linear.load(stack, index, modules.get(name))

    @torch.no_grad()
    def init_slot(self, slot: str, modules: Mapping[str, LoraModule], generator: torch.Generator | None = None) -> None:
        """Start training `slot` from this LoRA: the same function, at the stack's own rank and alpha
        everywhere.

        B takes over the ratio of the scales. Unlike after `load_slot`, padding and missing linears can learn:
        their A is drawn as in `add_stack` and their B is zero. Raises as `load_slot` does.
        """
        stack, index = self._place(slot)
        self._check_fit(slot, modules)
        stack_rank, stack_alpha = self._stacks[stack]
        for name, linear in self.linears.items():
            A_rK = _draw_A((stack_rank, linear.in_features), generator)
            linear.start_from(stack, index, A_rK, modules.get(name), stack_alpha)

    def slot_modules(self, slot: str) -> dict[str, LoraModule]:
        """Copies of what a slot holds, at their true ranks, without the linears it leaves alone."""
        place = self._place(slot)
        found = {name: linear.module(*place) for name, linear in self.linears.items()}
        return {name: module for name, module in found.items() if module is not None}

    @torch.no_grad()
    def delta(self, slot: str, module: str) -> Tensor:
        """What `slot` adds to the weight of `module`: (N, K) in fp64, zeros where it does nothing."""
        return self.linears[module].delta(*self._place(slot))

    @contextmanager
    def use(self, slots: Sequence[Slot]) -> Iterator[None]:
        """Choose each sample's slot for the forwards inside: a name, a tuple of names (their sum) or None
        (the base).

        A single entry holds for the whole batch, whatever its size. Nests; the former choice returns on exit.
        Raises `InputError` for an unknown slot.
        """
        if isinstance(slots, str):
            raise TypeError("give `use` a sequence of slots, one per sample; a single slot is [slot]")
        if self._merged is not None and set(slots) != {self._merged}:
            raise ValueError(f"slot {self._merged!r} is merged into the weights; leave `merged` to use {tuple(slots)}")
        with self._planned(self._plan(tuple(slots))):
            yield

    @contextmanager
    def merged(self, slot: str | tuple[str, ...]) -> Iterator[None]:
        """Sample at the base's speed: inside, the weights are copies with the slot's update added (in fp32).

        The original tensors are set aside, not changed, so that leaving restores them bit for bit; the price
        is a second copy of the adapted weights, in floats where they are quantized. For inference only: needs
        `torch.no_grad`, and no other slot can be used inside. In bf16 the sum is rounded once more than without
        merging.
        """
        if torch.is_grad_enabled():
            raise RuntimeError("`merged` gives the adapters no gradient; wrap it in torch.no_grad()")
        if self._merged is not None:
            raise RuntimeError(f"slot {self._merged!r} is merged already")
        places = [self._place(name) for name in ((slot,) if isinstance(slot, str) else slot)]
        try:
            for linear in self.linears.values():
                linear.merged = merge_weight(linear, places)
            self._merged = slot
            with self._planned(None):
                yield
        finally:
            self._merged = None
            for linear in self.linears.values():
                linear.merged = None

    @contextmanager
    def _planned(self, plan: Plan | None) -> Iterator[None]:
        before, self.choice.plan = self.choice.plan, plan
        try:
            yield
        finally:
            self.choice.plan = before

    def _plan(self, slots: tuple[Slot, ...]) -> Plan:
        device = self.device or next(iter(self.linears.values())).weight.device
        if (slots, device) not in self._plans:
            sizes = {stack: sum(place[0] == stack for place in self._slots.values()) for stack in self._stacks}
            if len(self._plans) >= 256:
                self._plans.clear()
            self._plans[slots, device] = make_plan(slots, self._place, sizes, device)
        return self._plans[slots, device]

    def _place(self, slot: str) -> tuple[str, int]:
        if slot not in self._slots:
            raise InputError(f"unknown slot {slot!r}; {did_you_mean(slot, self._slots)}")
        return self._slots[slot]

    def _check_fit(self, slot: str, modules: Mapping[str, LoraModule]) -> None:
        max_rank = self._stacks[self._place(slot)[0]][0]
        raise_faults([f"slot {slot}: {fault}" for fault in _fit_faults(self.module_shapes, modules, max_rank)])


def _fit_faults(shapes: Mapping[str, tuple[int, int]], modules: Mapping[str, LoraModule], max_rank: int) -> list[str]:
    """Why these modules cannot lie in a slot (names, shapes, ranks above `max_rank`); all of them."""
    faults = []
    for name, module in modules.items():
        if name not in shapes:
            faults.append(f"{name} has no adapter here; add it to the targets")
            continue
        given = (module.B.shape[0], module.A.shape[1])
        if given != shapes[name]:
            faults.append(f"{name} is for a weight {list(given)}, the base's is {list(shapes[name])}")
        if module.rank > max_rank:
            faults.append(f"{name} has rank {module.rank}, the slot holds up to {max_rank}")
    return faults


def inject_adapters(transformer: nn.Module, targets: Sequence[str]) -> Adapters:
    """Freeze `transformer` and make every linear whose name is, or ends in `.` and, a target a `SlotLinear`.

    The weights stay the same tensors under the same names. Raises `InputErrors` listing targets that match
    nothing.
    """
    choice = SlotChoice()
    found = {name: module for name, module in transformer.named_modules() if isinstance(module, nn.Linear)}
    if any(isinstance(module, SlotLinear) for module in found.values()):
        raise ValueError("this transformer has adapters already; use the Adapters it was given")
    chosen = matching_linears(found, targets)
    transformer.requires_grad_(False)
    linears: dict[str, SlotLinear] = {}
    for name in chosen:
        parent, _, child = name.rpartition(".")
        linears[name] = SlotLinear(found[name], choice).train(found[name].training)
        setattr(transformer.get_submodule(parent), child, linears[name])
    return Adapters(linears, choice)


def matching_linears(names: Iterable[str], targets: Sequence[str]) -> list[str]:
    """Those of a transformer's linears, in their order, whose name is a target, or ends in `.` and one.

    Raises `InputErrors` listing targets that match nothing.
    """
    found, faults = list(names), []
    chosen: set[str] = set()
    endings = sorted({".".join(name.split(".")[2:]) or name for name in found})
    for target in targets:
        matches = {name for name in found if f".{name}".endswith(f".{target}")}
        if not matches:
            hint = did_you_mean(target, endings)
            faults.append(f"target {target!r} matches no linear layer of the transformer; {hint}")
        chosen |= matches
    if not targets:
        faults.append("targets is empty; name the linear layers to adapt")
    raise_faults(faults)
    return [name for name in found if name in chosen]


def _draw_A(shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
    """Uniform in +-1/sqrt(K), which is kaiming_uniform_(a=sqrt(5)), the usual start of a LoRA."""
    bound = 1 / math.sqrt(shape[-1])
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def slot_to_cpu(adapters: Adapters, slot: str) -> dict[str, LoraModule]:
    """A slot's modules as CPU tensors, ready to be written."""
    return {
        name: LoraModule(m.A.detach().cpu(), m.B.detach().cpu(), m.alpha)
        for name, m in adapters.slot_modules(slot).items()
    }

"""The linear layer with adapter slots, and plans: which rows of a batch go through which slots.

    y = x W^T + b + sum over the sample's slots of (alpha / rank) x A^T B^T

Shape legend: S slots of a stack, r rank, K inputs, N outputs of a linear; B samples, R rows, T tokens, m
repeats of the batch; G groups of consecutive samples with one slot each, n samples in a group.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clora.lora.frozen_linear import float_weight, frozen_linear, is_quantized
from clora.lora.module import LoraModule

# What one sample goes through: the base, one slot, or the sum of several.
Slot = str | tuple[str, ...] | None


@dataclass(frozen=True, eq=False)
class Term:
    """One update to add: `slots` of one stack, each for equally many consecutive samples of `rows`."""

    stack: str
    slots: tuple[int, ...]
    index: Tensor | None  # the slots on the device; None for one slot and for the whole stack in order
    rows: Tensor | None  # samples concerned, None = all of them in order
    num_samples: int


@dataclass(frozen=True, eq=False)
class KernelArgs:
    """The same choice as `clora.kernels.lora_linear` takes it: matrices, and one place among them per sample.

    Where every sample uses at most one slot and all are of one stack, that stack's own matrices serve. Else each
    distinct sum of slots becomes one adapter, made by `SlotLinear.lanes`.
    """

    stack: str | None  # the one stack; None where `sums` serve
    sums: tuple[tuple[tuple[str, Tensor], ...], ...]  # the distinct sums: (stack, index (1,)) of each slot in it
    place_B: Tensor  # int32, the slot in `stack` or the place in `sums`, -1 = the base; (1,) where it serves any batch


@dataclass(frozen=True, eq=False)
class Plan:
    """The terms of a forward, and the same as lanes (None where there is no term). `num_samples` is the batch they
    were made for; 0 = any."""

    terms: tuple[Term, ...]
    num_samples: int
    lanes: KernelArgs | None


class SlotChoice:
    """What the `SlotLinear`s of one transformer share: the current plan, None for the base alone."""

    plan: Plan | None = None


class SlotLinear(nn.Linear):
    """A frozen linear with adapters. Its weight and bias are the given linear's own parameters, not copies.

    Input (R, K) or (R, T, K), where row i belongs to sample i mod B: the modulation layers of models with
    `zero_cond_t` see the batch twice.
    """

    def __init__(self, linear: nn.Linear, choice: SlotChoice) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.choice = choice
        self.A = nn.ParameterDict()  # stack -> (S, r, K)
        self.B = nn.ParameterDict()  # stack -> (S, N, r)
        # True rank and alpha of what each slot holds; rank 0 = the slot does nothing here.
        self.ranks: dict[str, list[int]] = {}
        self.alphas: dict[str, list[float]] = {}
        self.merged: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.merged is not None:
            return F.linear(x, self.merged, self.bias)
        plan = self.choice.plan
        if plan is None:
            return frozen_linear(x, self.weight, self.bias)
        _check_rows(x.shape[0], plan)
        terms = [term for term in plan.terms if self.max_rank(term)]
        if self._summing_first_pays(x, terms):
            return F.linear(x, _with_updates(self, [(term.stack, term.slots[0]) for term in terms]), self.bias)
        out = frozen_linear(x, self.weight, self.bias)
        for term in terms:
            out = self._add_shared(x, out, term) if len(term.slots) == 1 else self._add_grouped(x, out, term)
        return out

    def _summing_first_pays(self, x: Tensor, terms: Sequence[Term]) -> bool:
        """Whether `x (W + scale B A)^T` takes fewer multiplications than `x W^T + scale (x A^T) B^T`, gradients counted
        where there are any. In fp32 alone: a narrower type would round the weight away from what is trained, and int8
        has no such sum. In a small linear a LoRA's rank is no longer low, and the sum is what costs least."""
        if self.weight.dtype != torch.float32 or is_quantized(self.weight) or not terms:
            return False
        if any(len(term.slots) > 1 or term.rows is not None for term in terms):
            return False
        N, K, rows = self.out_features, self.in_features, x.numel() // self.in_features
        rank = sum(self.max_rank(term) for term in terms)
        saved = 3 * rank * (rows * (N + K) - N * K)  # of the product, and of both gradients
        return saved > (rows * N * K if torch.is_grad_enabled() else 0)  # what the gradient of the sum takes

    def lanes(self, rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
        """What `lora_linear` takes beside x, weight and bias for an input of this many rows: A (S, r, K),
        B (S, N, r), scale (S,) and each row's slot (R,), int32. None where no adapter is in use.

        Padded ranks are zero and slots that do nothing have scale 0, so that the true ranks need not be known.
        """
        plan = self.choice.plan
        if self.merged is not None or plan is None or plan.lanes is None:
            return None
        _check_rows(rows, plan)
        lanes = plan.lanes
        place_R = lanes.place_B.repeat(rows // len(lanes.place_B))
        if lanes.stack is None:
            return *self._summed(lanes), place_R
        return self.A[lanes.stack], self.B[lanes.stack], self.get_buffer(f"scale_{lanes.stack}"), place_R

    def _summed(self, lanes: KernelArgs) -> tuple[Tensor, Tensor, Tensor]:
        """One adapter for each sum of slots: their matrices side by side along the rank, the scales folded into B."""
        As, Bs = [], []
        for members in lanes.sums:
            As.append(torch.cat([self.A[stack].index_select(0, index)[0] for stack, index in members]))
            scaled = [
                self.B[stack].index_select(0, index)[0] * self.get_buffer(f"scale_{stack}").index_select(0, index)
                for stack, index in members
            ]
            Bs.append(torch.cat(scaled, dim=1))
        rank = max(len(A) for A in As)
        A_SrK = torch.stack([F.pad(A, (0, 0, 0, rank - len(A))) for A in As])
        B_SNr = torch.stack([F.pad(B, (0, rank - B.shape[1])) for B in Bs])
        return A_SrK, B_SNr, torch.ones(len(As), dtype=torch.float32, device=A_SrK.device)

    def max_rank(self, term: Term) -> int:
        """The largest true rank among a term's slots."""
        ranks = self.ranks[term.stack]
        return max(ranks[slot] for slot in term.slots)

    def scale(self, stack: str, slot: int) -> float:
        """alpha / rank of a slot; 0 where it does nothing."""
        rank = self.ranks[stack][slot]
        return self.alphas[stack][slot] / rank if rank else 0.0

    def add_stack(self, stack: str, A_SrK: Tensor, B_SNr: Tensor, trainable: bool) -> None:
        """Make these a stack's parameters; its slots do nothing until `set_slot`."""
        self.A[stack] = nn.Parameter(A_SrK, requires_grad=trainable)
        self.B[stack] = nn.Parameter(B_SNr, requires_grad=trainable)
        self.ranks[stack], self.alphas[stack] = [0] * len(A_SrK), [0.0] * len(A_SrK)
        # The scales once more on the device, for terms of several slots.
        scale_S = torch.zeros(len(A_SrK), dtype=torch.float32, device=A_SrK.device)
        self.register_buffer(f"scale_{stack}", scale_S, persistent=False)

    def remove_stack(self, stack: str) -> None:
        del self.A[stack], self.B[stack], self.ranks[stack], self.alphas[stack]
        delattr(self, f"scale_{stack}")

    def set_slot(self, stack: str, slot: int, rank: int, alpha: float) -> None:
        """State the true rank (0: does nothing) and alpha of what a slot's parameters hold."""
        self.ranks[stack][slot], self.alphas[stack][slot] = rank, alpha
        self.get_buffer(f"scale_{stack}")[slot] = self.scale(stack, slot)

    def load(self, stack: str, slot: int, module: LoraModule | None) -> None:
        """Make a slot exactly this update, None for none: what is left of the stack's rank is zero."""
        A_rK, B_Nr = self.A[stack][slot], self.B[stack][slot]
        rank = 0 if module is None else module.rank
        if module is not None:
            # Waits for the copies only where the modules lie in memory that is not pinned.
            A_rK[:rank].copy_(module.A, non_blocking=True)
            B_Nr[:, :rank].copy_(module.B, non_blocking=True)
        A_rK[rank:].zero_()
        B_Nr[:, rank:].zero_()
        self.set_slot(stack, slot, rank, 0.0 if module is None else module.alpha)

    def start_from(self, stack: str, slot: int, A_rK: Tensor, module: LoraModule | None, alpha: float) -> None:
        """Make a slot this update at the full rank of `A_rK` (r, K) and at `alpha`; the rows of A beyond the update's
        rank are those of `A_rK`, with zeros in B."""
        rank = len(A_rK)
        self.A[stack][slot].copy_(A_rK)
        self.B[stack][slot].zero_()
        self.set_slot(stack, slot, rank, alpha)
        if module is not None:
            self.A[stack][slot, : module.rank].copy_(module.A)
            self.B[stack][slot, :, : module.rank].copy_(module.B.double() * (module.scale / (alpha / rank)))

    def module(self, stack: str, slot: int) -> LoraModule | None:
        """A copy of what a slot holds at its true rank, None where it does nothing."""
        rank = self.ranks[stack][slot]
        if not rank:
            return None
        A_rK, B_Nr = self.A[stack][slot, :rank], self.B[stack][slot, :, :rank]
        return LoraModule(A_rK.detach().clone(), B_Nr.detach().clone(), self.alphas[stack][slot])

    def delta(self, stack: str, slot: int) -> Tensor:
        """What a slot adds to the weight: (N, K) in fp64, zeros where it does nothing."""
        A_rK: Tensor = self.A[stack][slot].double()
        B_Nr: Tensor = self.B[stack][slot].double()
        return B_Nr @ A_rK * self.scale(stack, slot)

    def _add_shared(self, x: Tensor, out: Tensor, term: Term) -> Tensor:
        """One slot: two matrix products, the second fused with the addition."""
        slot, rank = term.slots[0], self.max_rank(term)
        A_rK = self.A[term.stack][slot, :rank].to(x.dtype)
        B_Nr = self.B[term.stack][slot, :, :rank].to(x.dtype)
        scale = self.scale(term.stack, slot)
        if term.rows is None:
            down = F.linear(x.reshape(-1, self.in_features), A_rK)
            return torch.addmm(out.reshape(-1, self.out_features), down, B_Nr.t(), alpha=scale).view(out.shape)
        x_mBTK = _by_sample(x, term)
        update = F.linear(F.linear(x_mBTK.index_select(1, term.rows), A_rK), B_Nr) * scale
        return _by_sample(out, term).index_add(1, term.rows, update).view(out.shape)

    def _add_grouped(self, x: Tensor, out: Tensor, term: Term) -> Tensor:
        """G slots, each for equally many consecutive samples: two batched matrix products."""
        rank = self.max_rank(term)
        A, B = self.A[term.stack][:, :rank], self.B[term.stack][:, :, :rank]
        scale = self.get_buffer(f"scale_{term.stack}")
        if term.index is not None:
            A, B = A.index_select(0, term.index), B.index_select(0, term.index)
            scale = scale.index_select(0, term.index)
        x_mBTK = _by_sample(x, term)
        if term.rows is not None:
            x_mBTK = x_mBTK.index_select(1, term.rows)
        repeats, rows, tokens, _ = x_mBTK.shape
        groups = len(term.slots)
        x_GRK = _group(x_mBTK, groups)
        down = torch.bmm(x_GRK, A.to(x.dtype).mT)
        down = (down * scale[:, None, None]).to(x.dtype)
        B_GrN = B.to(x.dtype).mT
        if term.rows is None:
            out_GRN = torch.baddbmm(_group(_by_sample(out, term), groups), down, B_GrN)
            return _ungroup(out_GRN, repeats, rows, tokens).reshape(out.shape)
        update = _ungroup(torch.bmm(down, B_GrN), repeats, rows, tokens)
        return _by_sample(out, term).index_add(1, term.rows, update).view(out.shape)


def _check_rows(rows: int, plan: Plan) -> None:
    if plan.num_samples and rows % plan.num_samples:
        raise ValueError(f"{rows} rows are no multiple of the {plan.num_samples} samples slots were given for")


def _by_sample(x: Tensor, term: Term) -> Tensor:
    """(m B, ..., C) as (m, B, T, C): m repeats of the batch."""
    repeats = x.shape[0] // term.num_samples
    return x.reshape(repeats, term.num_samples, -1, x.shape[-1])


def _group(x_mBTC: Tensor, groups: int) -> Tensor:
    """(m, G n, T, C) as (G, m n T, C); a view when m is 1."""
    repeats, _, _, channels = x_mBTC.shape
    return x_mBTC.reshape(repeats, groups, -1, channels).transpose(0, 1).reshape(groups, -1, channels)


def _ungroup(x_GRC: Tensor, repeats: int, rows: int, tokens: int) -> Tensor:
    """The inverse of `_group`."""
    groups, _, channels = x_GRC.shape
    return x_GRC.reshape(groups, repeats, -1, channels).transpose(0, 1).reshape(repeats, rows, tokens, channels)


def merge_weight(linear: SlotLinear, places: Sequence[tuple[str, int]]) -> Tensor | None:
    """The weight with the slots' updates, in its own dtype (a quantized one's before it was); None where they change
    nothing."""
    places = [(stack, index) for stack, index in places if linear.ranks[stack][index]]
    return _with_updates(linear, places).to(linear.weight.dtype) if places else None


def _with_updates(linear: SlotLinear, places: Sequence[tuple[str, int]]) -> Tensor:
    """The weight with the slots' updates, in fp32."""
    weight = float_weight(linear.weight)
    for stack, index in places:
        A_rK, B_Nr = linear.A[stack][index].float(), linear.B[stack][index].float()
        weight = torch.addmm(weight, B_Nr, A_rK, alpha=linear.scale(stack, index))
    return weight


def make_plan(
    slots: tuple[Slot, ...],
    place: Callable[[str], tuple[str, int]],
    stack_sizes: Mapping[str, int],
    device: torch.device,
) -> Plan:
    """Split a choice of slots into terms.

    `place` gives a slot's stack and index. A choice that is the same for every sample holds for any batch
    size. A sample that sums several slots of one stack takes part in several terms of it.
    """
    if not slots:
        raise ValueError("slots is empty; give one entry per sample")
    members = [
        tuple(place(name) for name in (() if entry is None else (entry,) if isinstance(entry, str) else entry))
        for entry in slots
    ]
    # layers[stack][k]: the k-th slot that each sample uses in this stack, as (sample, slot index).
    layers: dict[str, list[list[tuple[int, int]]]] = {}
    for sample, places in enumerate(members):
        depth: dict[str, int] = {}
        for stack, index in places:
            layer = depth.get(stack, 0)
            depth[stack] = layer + 1
            table = layers.setdefault(stack, [])
            if layer == len(table):
                table.append([])
            table[layer].append((sample, index))
    terms = tuple(
        _make_term(stack, pairs, len(slots), stack_sizes[stack], device)
        for stack, table in layers.items()
        for pairs in table
    )
    return Plan(terms, 0 if len(slots) == 1 else len(slots), _make_lanes(members, device) if terms else None)


def _make_lanes(members: Sequence[tuple[tuple[str, int], ...]], device: torch.device) -> KernelArgs:
    stacks = {stack for places in members for stack, _ in places}
    if len(stacks) == 1 and all(len(places) <= 1 for places in members):
        indices = [places[0][1] if places else -1 for places in members]
        return KernelArgs(stacks.pop(), (), torch.tensor(indices, dtype=torch.int32, device=device))
    sums = list(dict.fromkeys(places for places in members if places))
    indices = [sums.index(places) if places else -1 for places in members]
    on_device = tuple(
        tuple((stack, torch.tensor([index], device=device)) for stack, index in places) for places in sums
    )
    return KernelArgs(None, on_device, torch.tensor(indices, dtype=torch.int32, device=device))


def _make_term(
    stack: str, pairs: list[tuple[int, int]], num_samples: int, stack_size: int, device: torch.device
) -> Term:
    runs = [(index, len(list(group))) for index, group in groupby(index for _, index in pairs)]
    if len({length for _, length in runs}) > 1:  # unequal runs: every sample is a group of its own
        runs = [(index, 1) for _, index in pairs]
    slots = tuple(index for index, _ in runs)
    whole = len(slots) == 1 or slots == tuple(range(stack_size))
    index = None if whole else torch.tensor(slots, device=device)
    everyone = len(pairs) == num_samples
    rows = None if everyone else torch.tensor([sample for sample, _ in pairs], device=device)
    return Term(stack, slots, index, rows, num_samples)

"""Rewriting a LoRA file in another tool's layout, and as a plain LoRA of a chosen rank."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clora.errors import InputError, raise_faults
from clora.io.safetensors import read_tensors
from clora.lora.base_weights import BaseWeights
from clora.lora.files import Layout, RawModule, exact_modules, read_values, write_lora
from clora.lora.kinds import dora_delta, nearest_module, nearest_to, whole_delta
from clora.lora.module import LoraModule
from clora.lora.peft_folder import check_folder
from clora.lora.summary import LoraSummary, summarise, unready_faults, width_findings


@dataclass(frozen=True, eq=False)
class Conversion:
    """What a file was and became: its layout, the rank of each module written, what each lost where it was changed
    (||D - D'|| / ||D||; none without a rank), and notes about the file."""

    layout: str
    ranks: dict[str, int]
    lost: dict[str, float]
    notes: tuple[str, ...]

    @property
    def max_rank(self) -> int:
        return max(self.ranks.values())

    @property
    def mean_lost(self) -> float:
        return sum(self.lost.values()) / len(self.lost)

    @property
    def worst(self) -> str:
        """The module that lost most."""
        return max(self.lost, key=lambda name: self.lost[name])

    def loss_sentence(self) -> str:
        return f"lost {self.lost[self.worst]:.2%} of an update at most ({self.worst}), {self.mean_lost:.2%} on average"

    def to_json(self) -> dict[str, Any]:
        lost = {"max": self.lost[self.worst], "mean": self.mean_lost, "worst": self.worst} if self.lost else None
        return {"num_modules": len(self.ranks), "max_rank": self.max_rank, "lost": lost, "notes": list(self.notes)}


def convert_lora(
    src: str | Path, dst: str | Path, to: Layout, rank: int | None = None, base: BaseWeights | None = None
) -> Conversion:
    """Rewrite a LoRA file, or PEFT's folder, in another layout, in the file's own dtypes; `peft` makes a folder `dst`.

    Folding alpha rounds B to its dtype, exactly so where alpha / rank is a power of two; `kohya` and `peft` fold none.
    LoHa, LoKr and whole updates become the LoRA that is exactly them, in fp32. With `rank`, every module above that
    rank becomes the nearest one of that rank, in fp32 too, and smaller ones stay as they are. DoRA needs `rank` and the
    `base` that it rescales; a base's shapes are held against the file as well. Metadata is kept but for entries that
    state alpha or rank.

    Raises `InputErrors` with every fault of the file.
    """
    src, dst = Path(src), Path(dst)
    if to == "peft":
        check_folder(dst)
    elif dst.suffix != ".safetensors":
        raise InputError(f"{dst}: name the output .safetensors, the only format that is written")
    summary, faults = summarise(src, None if base is None else base.shapes)
    notes: list[str] = []
    if base is None:
        misfits, notes = width_findings(summary)
        faults += misfits
    dora = any("dora" in keys for keys in summary.keys.values())
    if rank is None or (dora and base is None):
        faults += unready_faults(summary, to)
    raise_faults(faults)
    tensors, _ = read_tensors(summary.path, summary.header)
    raw = read_values(summary, tensors, [])
    lost: dict[str, float] = {}
    if rank is None:
        modules = exact_modules(summary, raw)
    else:
        modules, lost = _nearest(summary, raw, rank, base)
    write_lora(dst, modules, summary.header.metadata, to, dtype=None)
    ranks = {name: module.rank for name, module in modules.items()}
    return Conversion(summary.layout, ranks, lost, (*summary.notes, *notes))


def _nearest(
    summary: LoraSummary, raw: Mapping[str, RawModule], rank: int, base: BaseWeights | None
) -> tuple[dict[str, LoraModule], dict[str, float]]:
    """Every module at `rank` at most, and what is lost of each."""
    modules: dict[str, LoraModule] = {}
    lost: dict[str, float] = {}
    for name, module in raw.items():
        kind, values = summary.kinds[name], dict(module.values)
        norms = values.pop("dora", None)
        if norms is not None and base is not None:
            delta = dora_delta(base.weight(name), whole_delta(kind, values, module.scale), norms)
            modules[name], lost[name] = nearest_to(delta, rank)
        elif kind == "LoRA" and summary.ranks[name] <= rank:
            modules[name], lost[name] = LoraModule(values["A"], values["B"], module.alpha), 0.0
        else:
            modules[name], lost[name] = nearest_module(kind, values, module.scale, rank)
    return modules, lost

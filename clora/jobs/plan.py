"""`clora train --plan`: memory, communication and cost of a training run, and what makes it fit.

Nothing is loaded, and for a well-known base nothing downloaded: what `clora.distill.memory` counts with comes from the
base's configurations, adapters from the headers of LoRA files.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from clora.backbones.counts import Footprint
from clora.backbones.load import read_footprint
from clora.config import Config, load_preset
from clora.distill.forwards import distillation_forwards
from clora.distill.memory import (
    GB,
    MemoryPlan,
    TrainSettings,
    base_weights,
    budget,
    choose_num_blocks_kept,
    memory_plan,
    on_gpus,
    read_settings,
    trained_parameters,
)

# Of Qwen-Image-Edit-2509 in bf16 at 1024 x 1024 with a reference image on an H200: the fastest that is published.
SECONDS_PER_FORWARD = 0.28


def communication_plan(footprint: Footprint, settings: TrainSettings) -> dict[str, dict[str, int]]:
    """Bytes that each GPU moves in one update of the student (effect stream) and of the critic; none alone.

    A ring sends (N - 1) / N of a tensor to gather it or to scatter its sum. Gradients are scattered once an update in
    fp32, parameters gathered after it in the base's dtype; a base in parts is gathered for every forward and backward,
    and if it is offloaded, first copied from CPU memory. Exit steps of backward simulation count with their mean; the
    critic's rollouts of a step share their forwards until the last of them ends.
    """
    share = (settings.num_gpus - 1) / settings.num_gpus
    ta_fm, dmd_ts, dmd_bs, imitation = settings.terms
    steps, together = settings.num_steps, settings.critic_batches
    longest = sum(1 - (step / steps) ** together for step in range(steps))  # of so many rollouts
    calls = {
        # forwards and backwards; critic and teacher are asked in one forward
        "student": ta_fm * (1 + 1) + dmd_ts * (2 + 1) + dmd_bs * ((steps + 1) / 2 + 1 + 1) + imitation * (2 + 1),
        "critic": longest / max(1, together) + 1 + 1,
    }
    trained = dict(zip(("student", "critic"), trained_parameters(footprint, settings), strict=True))
    base = base_weights(footprint, settings) if settings.shard_base else 0
    return {
        name: {
            "reduce-scatter of gradients": round(share * 4 * trained[name]),
            "all-gather of parameters": round(share * settings.base_bytes * trained[name]),
            "all-gathers of the base": round(share * base * calls[name]),
            "base from CPU memory": round(base / settings.num_gpus * calls[name]) if settings.offload_base else 0,
        }
        for name in trained
    }


def find_mends(footprint: Footprint, settings: TrainSettings, memory: float) -> tuple[list[str], bool]:
    """Changes of the configuration that make a run fit, each on top of those before it, and whether they suffice.

    In this order: what costs time (checkpointing), precision (moments in bfloat16), time again (a base in parts or else
    rounded to int8, swaps of teachers, a base in CPU memory), noise (smaller batches), and a smaller student. A step
    that saves nothing is left out, and what later steps make needless.
    """
    fewest = min(settings.batch_size, settings.teacher_slots)  # a batch may need as many teachers as it has samples
    steps: list[tuple[str, dict[str, Any]]] = [
        ("train.gradient_checkpointing=true", {"checkpointing": True}),
        ("train.adam_moments=bfloat16", {"moments_bytes": 2}),
        ("train.shard_base=true", {"shard_base": settings.num_gpus > 1 and not settings.quantized}),
        ("base.quantize=int8", {"quantized": settings.quantized or settings.num_gpus == 1}),
        (f"train.teacher_slots={fewest}", {"teacher_slots": fewest}),
        ("train.offload_base=true", {"offload_base": settings.num_gpus > 1 and not settings.quantized}),
        ("train.anchor_batch_size=1", {"anchor_batch_size": 1}),
        ("train.batch_size=1", {"batch_size": 1}),
        *((f"student.rank={rank}", {"rank": rank}) for rank in (64, 32, 16) if rank < settings.rank),
    ]
    # By key of the configuration, the latest change of it.
    mends: dict[str, tuple[str, dict[str, Any]]] = {}

    def needed(changes: Iterable[tuple[str, dict[str, Any]]]) -> float:
        return memory_plan(footprint, replace(settings, **{k: v for _, one in changes for k, v in one.items()})).needed

    best = needed(())
    for override, change in steps:
        key = override.partition("=")[0]
        tried = {name: mend for name, mend in mends.items() if name != key} | {key: (override, change)}
        if needed(tried.values()) < best:
            mends, best = tried, needed(tried.values())
        if best <= memory:
            break
    suffices = best <= memory
    for key in list(mends) if suffices else ():  # what later ones made needless
        without = {name: mend for name, mend in mends.items() if name != key}
        if needed(without.values()) <= memory:
            mends = without
    return [override for override, _ in mends.values()], suffices


@dataclass(frozen=True)
class Cost:
    """What a run takes. `forwards`: of one sample on each GPU, a backward counted as two, neither targets nor what
    checkpointing recomputes. `least`: bytes of a GPU that would do, no block left whole."""

    forwards: float
    least: float

    def hours(self, seconds_per_forward: float) -> float:
        return self.forwards * seconds_per_forward / 3600


@dataclass(frozen=True)
class TrainPlan:
    """The answer of `clora train --plan`. `mends`: overrides that make the run fit, or all there are; `paper`: the same
    effects and student by the settings of preset `paper`."""

    settings: TrainSettings
    memory_gb: float
    memory: MemoryPlan
    cost: Cost
    paper: Cost
    seconds_per_forward: float
    num_layers: int
    communication: dict[str, dict[str, int]]
    fits: bool
    mends: list[str]
    mends_suffice: bool

    @property
    def verdict(self) -> str:
        """One sentence: whether it fits, and what to do where it does not."""
        gpus = f"{self.settings.num_gpus} GPU{'s' if self.settings.num_gpus > 1 else ''} of {self.memory_gb:g} GB"
        needs = f"needs {self.cost.least / GB:.1f} GB a GPU in its {self.memory.peak_phase}"
        if self.fits:
            whole = self.settings.num_blocks_kept
            spare = f"; with {self.memory.needed / GB:.1f} GB {whole} of {self.num_layers} blocks are not recomputed"
            return f"fits {gpus}: {needs}{spare if whole else ''}"
        if self.mends_suffice:
            return f"does not fit {gpus}: {needs}; it fits with {' '.join(self.mends)}"
        tried = f", and would not with {' '.join(self.mends)}" if self.mends else ""
        return f"does not fit {gpus}: {needs}{tried}; take more GPUs, larger ones or smaller images"

    def to_json(self) -> dict[str, Any]:
        """Plain values; bytes."""
        phases = {name: parts | {"total": sum(parts.values())} for name, parts in self.memory.phases.items()}
        return {
            "verdict": self.verdict,
            "fits": self.fits,
            "mends": self.mends,
            "mends_suffice": self.mends_suffice,
            "memory_gb": self.memory_gb,
            "needed": round(self.memory.needed),
            "least": round(self.cost.least),
            "peak": self.memory.peak,
            "peak_phase": self.memory.peak_phase,
            "phases": phases,
            "communication": self.communication,
            "cost": self._cost_json(self.cost),
            "cost_by_preset_paper": self._cost_json(self.paper),
            "seconds_per_forward": self.seconds_per_forward,
            "settings": vars(self.settings),
        }

    def _cost_json(self, cost: Cost) -> dict[str, float]:
        hours = round(cost.hours(self.seconds_per_forward), 2)
        return {"forwards": round(cost.forwards), "hours": hours, "least": round(cost.least)}


def plan_training(
    config: Config, num_gpus: int, memory_gb: float, seconds_per_forward: float = SECONDS_PER_FORWARD
) -> TrainPlan:
    """The plan of `clora train CONFIG` on `num_gpus` GPUs of `memory_gb` that take so long for a forward of a sample.

    Reads the base's configurations and the headers of LoRA files; `InputErrors` for those at fault. A teacher that is
    still to be taught counts with `teach.rank`.
    """
    footprint = read_footprint(config.base.model, config.base.revision)
    memory = memory_gb * GB
    settings = on_gpus(read_settings(config, footprint), config, num_gpus)
    if settings.checkpointing:
        kept = choose_num_blocks_kept(footprint, settings, budget(config, memory))
        settings = replace(settings, num_blocks_kept=kept)
    planned = memory_plan(footprint, settings)
    fits = planned.needed <= memory
    mends, suffice = ([], True) if fits else find_mends(footprint, settings, memory)
    communication = communication_plan(footprint, settings)
    own, paper = (training_cost(one, footprint, num_gpus) for one in (config, by_preset(config, "paper")))
    layers = footprint.num_layers
    return TrainPlan(
        settings, memory_gb, planned, own, paper, seconds_per_forward, layers, communication, fits, mends, suffice
    )


def training_cost(config: Config, footprint: Footprint, num_gpus: int) -> Cost:
    """The cost of `clora train CONFIG` on each of so many GPUs."""
    settings = on_gpus(read_settings(config, footprint), config, num_gpus)
    return Cost(distillation_forwards(config), memory_plan(footprint, replace(settings, num_blocks_kept=0)).needed)


def by_preset(config: Config, name: str) -> Config:
    """The same effects, base and student with a preset's objective, schedule and training."""
    preset = load_preset(name)
    return config.with_values(**{section: preset[section] for section in ("objective", "schedule", "train")})

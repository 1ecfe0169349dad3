"""`clora train --plan`: memory and communication of a training run, and what makes it fit.

Nothing is loaded: what `clora.distill.memory` counts with comes from the base's configurations, adapters from the
headers of LoRA files.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import psutil
import torch

from clora.backbones.qwen_image.pipeline import encoder_parameters, pixels_per_token, transformer_config
from clora.config import Config, read_sizes, resolve_base
from clora.distill.memory import (
    GB,
    MemoryPlan,
    ModelShapes,
    TrainSettings,
    base_weights,
    choose_whole_blocks,
    memory_plan,
    model_shapes,
    trained_parameters,
)
from clora.distill.targets import TARGET_BATCH
from clora.distill.workspace import DTYPES, acceleration_of, base_dtype
from clora.lora.files import check_lora

TEXT_TOKENS = 512  # a prompt with one reference image, rounded up; batches are padded to their longest


def communication_plan(shapes: ModelShapes, settings: TrainSettings) -> dict[str, dict[str, int]]:
    """Bytes that each GPU moves in one update of the student (effect stream) and of the critic; none alone.

    A ring sends (N - 1) / N of a tensor to gather it or to scatter its sum. Gradients are scattered once an update in
    fp32, parameters gathered after it in the base's dtype; a base in parts is gathered for every forward and backward,
    and if it is offloaded, first copied from CPU memory. Exit steps of backward simulation count with their mean; the
    critic's rollouts of a step share their forwards until the last of them ends.
    """
    share = (settings.num_gpus - 1) / settings.num_gpus
    ta_fm, dmd_ts, dmd_bs = settings.terms
    steps, together = settings.num_steps, settings.critic_batches
    longest = sum(1 - (step / steps) ** together for step in range(steps))  # of so many rollouts
    calls = {
        # forwards and backwards; critic and teacher are asked in one forward
        "student": ta_fm * (1 + 1) + dmd_ts * (2 + 1) + dmd_bs * ((steps + 1) / 2 + 1 + 1),
        "critic": longest / together + 1 + 1,
    }
    trained = dict(zip(("student", "critic"), trained_parameters(shapes, settings), strict=True))
    base = base_weights(shapes, settings) if settings.shard_base else 0
    return {
        name: {
            "reduce-scatter of gradients": round(share * 4 * trained[name]),
            "all-gather of parameters": round(share * settings.base_bytes * trained[name]),
            "all-gathers of the base": round(share * base * calls[name]),
            "base from CPU memory": round(base / settings.num_gpus * calls[name]) if settings.offload_base else 0,
        }
        for name in trained
    }


def find_mends(shapes: ModelShapes, settings: TrainSettings, memory: float) -> tuple[list[str], bool]:
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
        return memory_plan(shapes, replace(settings, **{k: v for _, one in changes for k, v in one.items()})).needed

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
class TrainPlan:
    """The answer of `clora train --plan`. `mends`: overrides that make the run fit, or all there are."""

    settings: TrainSettings
    memory_gb: float
    memory: MemoryPlan
    least: float  # bytes that would do, no block left whole
    num_layers: int
    communication: dict[str, dict[str, int]]
    fits: bool
    mends: list[str]
    mends_suffice: bool

    @property
    def verdict(self) -> str:
        """One sentence: whether it fits, and what to do where it does not."""
        gpus = f"{self.settings.num_gpus} GPU{'s' if self.settings.num_gpus > 1 else ''} of {self.memory_gb:g} GB"
        needs = f"needs {self.least / GB:.1f} GB a GPU in its {self.memory.peak_phase}"
        if self.fits:
            whole = self.settings.whole_blocks
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
            "least": round(self.least),
            "peak": self.memory.peak,
            "peak_phase": self.memory.peak_phase,
            "phases": phases,
            "communication": self.communication,
            "settings": vars(self.settings),
        }


def plan_training(config: Config, num_gpus: int, memory_gb: float) -> TrainPlan:
    """The plan of `clora train CONFIG` on `num_gpus` GPUs of `memory_gb`.

    Reads the base's configurations and the headers of LoRA files; `InputErrors` for those at fault. A teacher that is
    still to be taught counts with `teach.rank`.
    """
    shapes = model_shapes(transformer_config(config.base.model, config.base.revision))
    memory = memory_gb * GB
    settings = _on_gpus(read_settings(config), config, num_gpus)
    if settings.checkpointing:
        settings = replace(settings, whole_blocks=choose_whole_blocks(shapes, settings, budget(config, memory)))
    planned = memory_plan(shapes, settings)
    fits = planned.needed <= memory
    mends, suffice = ([], True) if fits else find_mends(shapes, settings, memory)
    communication = communication_plan(shapes, settings)
    least = memory_plan(shapes, replace(settings, whole_blocks=0)).needed
    layers = shapes.num_layers
    return TrainPlan(settings, memory_gb, planned, least, layers, communication, fits, mends, suffice)


def whole_blocks(config: Config, num_gpus: int) -> int:
    """Blocks that activation checkpointing leaves whole in a run that starts here: as many as `train.memory_budget_gb`
    has room for, or this device's memory."""
    shapes = model_shapes(transformer_config(config.base.model, config.base.revision))
    settings = _on_gpus(read_settings(config), config, num_gpus)
    return choose_whole_blocks(shapes, settings, budget(config, device_memory()))


def _on_gpus(settings: TrainSettings, config: Config, num_gpus: int) -> TrainSettings:
    shard_base = config.train.shard_base and num_gpus > 1
    offload_base = config.train.offload_base and shard_base
    return replace(settings, num_gpus=num_gpus, shard_base=shard_base, offload_base=offload_base)


def device_memory() -> float:
    """Bytes: all of this process's GPU, or what is free on a machine without one."""
    if torch.cuda.is_available():
        return float(torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory)
    return float(psutil.virtual_memory().available)


def budget(config: Config, memory: float) -> float:
    """Bytes that a process may take of a device with this much: `train.memory_budget_gb`, or all."""
    limit = config.train.memory_budget_gb
    return memory if limit is None else min(memory, limit * GB)


def read_settings(config: Config) -> TrainSettings:
    """The numbers of a configuration, for the largest bucket, one reference image and `TEXT_TOKENS`."""
    base, revision, train, objective = config.base.model, config.base.revision, config.train, config.objective
    token_area = pixels_per_token(base, revision) ** 2
    encoders = encoder_parameters(base, revision)
    slots = min(train.teacher_slots, len(config.effects))
    paths = [config.teacher_path(effect) for effect in config.effects]
    ranks = [check_lora(path).max_rank if path.is_file() else config.teach.rank for path in paths]
    accelerated = acceleration_of(config)
    makes_targets = bool(config.effects) and config.targets.source == "teachers"
    return TrainSettings(
        image_tokens=train.buckets.max_area // token_area,
        reference_tokens=read_sizes(resolve_base(base)).vae_image_area // token_area,
        text_tokens=TEXT_TOKENS,
        batch_size=train.batch_size,
        anchor_batch_size=train.anchor_batch_size or train.batch_size,
        rank=config.student.rank,
        targets=tuple(config.student.targets),
        acceleration_rank=0 if accelerated is None else check_lora(accelerated).max_rank,
        teacher_rank=max(ranks, default=0),
        teacher_slots=slots,
        base_bytes=base_dtype(config.base.dtype, torch.device("cuda")).itemsize,
        quantized=config.base.quantize != "none",
        critic_batches=train.critic_updates * train.gradient_accumulation_steps,
        moments_bytes=DTYPES[train.adam_moments].itemsize,
        ema=train.ema_decay > 0,
        guided=objective.guidance != 1,
        terms=(
            bool(config.effects) and objective.ta_fm_weight > 0,
            bool(config.effects) and objective.dmd_ts_weight > 0,
            objective.dmd_bs_weight > 0,
        ),
        num_steps=config.schedule.num_steps,
        checkpointing=train.gradient_checkpointing,
        targets_batch=min(TARGET_BATCH, slots) * (2 if config.targets.guidance != 1 else 1) if makes_targets else 0,
        text_encoder_parameters=encoders["text_encoder"],
        vae_parameters=encoders["vae"],
    )

"""Bytes that a training run takes, from numbers alone.

Parameters and activations of one block are counted by the base's family (`clora.backbones.base.Footprint`); this file
counts what a run makes of them, and tests/jobs/test_plan.py holds its peaks to 10 %. Memory is that of tensors:
`RESERVED` and `FRAGMENTATION` stand for the CUDA context and the allocator. 1 GB is 1e9 bytes.

On N processes the base, the trained adapters (in the base's dtype) and their gradients are on every GPU, what makes
them fp32 masters, Adam's moments and the average in N parts (`clora.training.optimizer`); with `train.shard_base` the
frozen base is in N parts too (FSDP2), which `train.offload_base` keeps in CPU memory. With `base.quantize` the linears
of its blocks have int8 weights, whose floats are made while it runs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import psutil
import torch

from clora.backbones.counts import Footprint, ForwardSize
from clora.backbones.load import encoder_parameters, read_footprint
from clora.config import Config, acceleration_of
from clora.distill.roles import TARGET_BATCH
from clora.lora.frozen_linear import floats_at_once
from clora.lora.summary import check_lora
from clora.training.device import DTYPES, base_dtype

GB = 1e9
RESERVED = 1.5 * GB  # CUDA context and the libraries' workspaces
FRAGMENTATION = 0.05  # of the peak: what an allocator holds beyond its tensors
BACKWARD_SIMULATION = 2  # its place in `TrainSettings.terms`: the term that the waiting samples are of


@dataclass(frozen=True)
class TrainSettings:
    """What decides a run's memory, as numbers. Ranks of 0: there is no such adapter."""

    image_tokens: int
    reference_tokens: int
    text_tokens: int
    batch_size: int
    anchor_batch_size: int
    rank: int
    targets: tuple[str, ...]
    acceleration_rank: int = 0
    collection_rank: int = 0  # of the frozen collection that an extension's student lies on; its critic holds it too
    teacher_rank: int = 0
    teacher_slots: int = 0
    base_bytes: int = 2  # of one number of the base
    quantized: bool = False  # the linears of its blocks are int8
    ema: bool = True
    guided: bool = True
    terms: tuple[bool, bool, bool, bool] = (True, True, True, False)  # TA-FM, DMD-TS, DMD-BS, imitation
    num_steps: int = 8
    coarse: bool = False  # a stage without a critic
    coarse_teacher: bool = False  # which asks the teachers
    muon: bool = False  # its optimizer
    critic_batches: int = 5  # of a step: critic updates times batches of each
    waiting_batches: int = 0  # of the student's, whose graphs wait while the critic learns from them (critic_reuse)
    moments_bytes: int = 4  # of one number of AdamW's moments
    checkpointing: bool = True
    num_blocks_kept: int = 0  # of them, blocks that checkpointing leaves as they are
    targets_batch: int = 0  # samples in one forward while targets are made
    text_encoder_parameters: int = 0  # on the device until everything is encoded
    vae_parameters: int = 0
    num_gpus: int = 1
    shard_base: bool = False
    offload_base: bool = False

    def forward(self, batch_size: int) -> ForwardSize:
        """A forward over so many samples, with the student's adapters."""
        rank, tokens = self.student_rank, (self.image_tokens, self.reference_tokens, self.text_tokens)
        return ForwardSize(batch_size, *tokens, self.base_bytes, rank)

    @property
    def student_rank(self) -> int:
        """Of all that adds up to the student, frozen or trained."""
        return self.rank + self.acceleration_rank + self.collection_rank


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of tensors on one GPU, by phase of a run and by what they are."""

    phases: dict[str, dict[str, int]]

    @property
    def peak_phase(self) -> str:
        return max(self.phases, key=lambda name: sum(self.phases[name].values()))

    @property
    def peak(self) -> int:
        """Most bytes of tensors at once."""
        return sum(self.phases[self.peak_phase].values())

    @property
    def needed(self) -> float:
        """The GPU memory that the peak asks for."""
        return self.peak * (1 + FRAGMENTATION) + RESERVED


def base_weights(footprint: Footprint, settings: TrainSettings) -> int:
    """Bytes of the transformer's weights, undivided. A quantized linear has one a weight, and five (a scale and a zero)
    for each output."""
    if not settings.quantized:
        return footprint.num_parameters * settings.base_bytes
    inside = footprint.block_linears
    weights = sum(N * K for N, K in inside)
    return (footprint.num_parameters - weights) * settings.base_bytes + weights + 5 * sum(N for N, _ in inside)


def saved_by_forward(footprint: Footprint, settings: TrainSettings, batch: int) -> int:
    """Bytes that a forward with grad keeps until its backward: all of its blocks, or with checkpointing all of
    `num_blocks_kept` and little of the others."""
    forward = settings.forward(batch)
    whole = min(settings.num_blocks_kept, footprint.num_layers) if settings.checkpointing else footprint.num_layers
    again = (footprint.num_layers - whole) * footprint.saved_by_recomputed_block(forward)
    return whole * footprint.saved_by_block(forward) + again + footprint.saved_outside_blocks(forward)


def forward_workspace(footprint: Footprint, settings: TrainSettings, batch: int) -> int:
    """Most bytes alive in a forward without grad, beyond its inputs."""
    return footprint.forward_workspace(settings.forward(batch)) + _made_whole(footprint, settings)


def backward_workspace(footprint: Footprint, settings: TrainSettings, batch: int) -> int:
    """Most bytes of a backward beyond what its forward kept; with checkpointing one block is run again."""
    forward, again = settings.forward(batch), 0
    if settings.checkpointing and settings.num_blocks_kept < footprint.num_layers:
        again = footprint.saved_by_block(forward) - footprint.saved_by_recomputed_block(forward)
    return footprint.backward_workspace(forward) + again + _made_whole(footprint, settings)


def memory_plan(footprint: Footprint, settings: TrainSettings) -> MemoryPlan:
    """Bytes on each GPU of a distillation (`clora.distill.step.full_step`), by phase."""
    s, frozen = settings, _frozen(footprint, settings)
    resident = frozen | _trained(footprint, s)
    phases = {
        # On the first GPU; a base that is to be cut waits in CPU memory meanwhile.
        "encoding": {
            "base": 0 if s.shard_base else base_weights(footprint, s),
            "VAE": frozen["VAE"],
            "text encoder": s.text_encoder_parameters * s.base_bytes,
        },
        "targets": frozen | {"workspace": forward_workspace(footprint, s, s.targets_batch)},
    }
    if s.coarse:
        update, asked = _update(footprint, s, s.anchor_batch_size), s.anchor_batch_size * (2 if s.guided else 1)
        if s.coarse_teacher:  # while the student's graph waits
            update["workspace"] = max(update["workspace"], forward_workspace(footprint, s, asked))
        phases["coarse update"] = resident | update
    student, _ = trained_parameters(footprint, s)
    if s.coarse and s.muon:
        # Directions in fp32, each process's own part and of several the whole.
        whole = 4 * student if s.num_gpus > 1 else 0
        phases["coarse optimizer step"] = resident | {"workspace": part_of(4 * student, s.num_gpus) + whole}
    # Many tokens share a forward only where the base is in parts.
    together = max(1, s.critic_batches) if s.shard_base else 1
    phases["rollouts"] = resident | {"workspace": forward_workspace(footprint, s, together * s.batch_size)}
    if s.critic_batches:
        phases["critic update"] = resident | _update(footprint, s, s.batch_size, 1 + s.waiting_batches)
    phases["student update"] = resident | _student_update(footprint, s)
    # Each process sends a copy of its part, which comes back whole.
    sent = part_of(s.base_bytes * student, s.num_gpus) if s.num_gpus > 1 else 0
    phases["optimizer step"] = resident | {"workspace": sent}
    return MemoryPlan(phases)


def _frozen(footprint: Footprint, settings: TrainSettings) -> dict[str, int]:
    """What is read and never trained."""
    s, e = settings, settings.base_bytes
    # Of an offloaded base what lies outside the blocks stays from a forward on.
    outside = (footprint.num_parameters - footprint.num_layers * footprint.block_parameters) * e
    whole = base_weights(footprint, s)
    frozen = {
        "base": outside if s.offload_base else part_of(whole, s.num_gpus if s.shard_base else 1),
        "VAE": s.vae_parameters * e,
        "teacher slots": s.teacher_slots * footprint.adapter_parameters(s.teacher_rank, s.targets) * e,
    }
    if s.collection_rank:  # and what makes its new effects' teachers few-step ones
        below = s.collection_rank + s.acceleration_rank
        frozen["collection"] = footprint.adapter_parameters(below, s.targets) * e
    return frozen


def _trained(footprint: Footprint, settings: TrainSettings) -> dict[str, int]:
    """Student and critic, and what their optimizers keep."""
    s, e = settings, settings.base_bytes
    student, critic = trained_parameters(footprint, s)
    return {
        "student and critic": e * (student + critic) + part_of((4 - e) * (student + critic), s.num_gpus),
        "AdamW": part_of(2 * s.moments_bytes * (student + critic), s.num_gpus),
        "EMA": part_of(4 * student, s.num_gpus) if s.ema else 0,
        # One buffer that stays for both; of several processes each has its part of the sums besides.
        "gradients": 4 * student + (part_of(4 * (student + critic), s.num_gpus) if s.num_gpus > 1 else 0),
    }


def _update(footprint: Footprint, settings: TrainSettings, batch: int, graphs: int = 1) -> dict[str, int]:
    """An update from one forward with grad, beside which `graphs - 1` others wait for theirs."""
    return {
        "kept for backward": graphs * saved_by_forward(footprint, settings, batch),
        "workspace": backward_workspace(footprint, settings, batch),
    }


def _student_update(footprint: Footprint, settings: TrainSettings) -> dict[str, int]:
    """The fullest moment of a student update: each term's graph is walked before the next is built."""
    s = settings
    moments: list[dict[str, int]] = []
    waiting = s.waiting_batches * saved_by_forward(footprint, s, s.batch_size)
    sizes = (s.anchor_batch_size, s.batch_size, s.batch_size, s.anchor_batch_size)
    for term, (on, batch) in enumerate(zip(s.terms, sizes, strict=True)):
        kept = saved_by_forward(footprint, s, batch)
        # Distribution matching and imitation ask the teacher while their own graph waits.
        teacher = forward_workspace(footprint, s, batch * (2 if s.guided else 1)) if term else 0
        if on:
            workspace = max(backward_workspace(footprint, s, batch), teacher)
            kept = max(kept, waiting) if term == BACKWARD_SIMULATION else kept + waiting
            moments.append({"kept for backward": kept, "workspace": workspace})
    return max(moments, key=lambda parts: sum(parts.values()), default={})


def choose_num_blocks_kept(footprint: Footprint, settings: TrainSettings, memory: float) -> int:
    """The most blocks that checkpointing may leave whole within this memory (bytes); 0 where not even none fits."""
    for count in range(footprint.num_layers, 0, -1):
        if memory_plan(footprint, replace(settings, checkpointing=True, num_blocks_kept=count)).needed <= memory:
            return count
    return 0


def trained_parameters(footprint: Footprint, settings: TrainSettings) -> tuple[int, int]:
    """Trained parameters of the student (with the acceleration LoRA that joins it, which in an extension is frozen) and
    of the critic, if any."""
    s = settings
    student = footprint.adapter_parameters(s.rank + (0 if s.collection_rank else s.acceleration_rank), s.targets)
    critic = footprint.adapter_parameters(s.rank + s.collection_rank, s.targets) if s.critic_batches else 0
    return student, critic


def part_of(count: int, parts: int) -> int:
    """`count` divided by `parts`, rounded up."""
    return -(-count // parts)


def _made_whole(footprint: Footprint, settings: TrainSettings) -> int:
    """Weights in the form that is computed with, where they are kept in another: the block in use and the one fetched
    ahead of a base in parts, some of the largest linear's floats of a quantized one."""
    if settings.shard_base:
        return 2 * footprint.block_parameters * settings.base_bytes
    largest = max(N * K for N, K in footprint.block_linears)
    return min(largest, floats_at_once("cuda")) * settings.base_bytes if settings.quantized else 0


TEXT_TOKENS = 512  # a prompt with one reference image, rounded up; batches are padded to their longest


def num_blocks_kept(config: Config, num_gpus: int, collection_rank: int = 0) -> int:
    """Blocks that activation checkpointing leaves whole in a run that starts here, on a collection of this rank if any:
    as many as `train.memory_budget_gb` has room for, or this device's memory."""
    footprint = read_footprint(config.base.model, config.base.revision)
    settings = replace(read_settings(config, footprint), collection_rank=collection_rank)
    settings = on_gpus(settings, config, num_gpus)
    return choose_num_blocks_kept(footprint, settings, budget(config, device_memory()))


def on_gpus(settings: TrainSettings, config: Config, num_gpus: int) -> TrainSettings:
    """The settings on so many GPUs; a base is split only where there are several."""
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


def read_settings(config: Config, footprint: Footprint) -> TrainSettings:
    """The numbers of a configuration, for the largest bucket, one reference image and `TEXT_TOKENS`."""
    train, objective = config.train, config.objective
    encoders = encoder_parameters(config.base.model, config.base.revision)
    slots = min(train.teacher_slots, len(config.effects))
    paths = [config.teacher_path(effect) for effect in config.effects]
    ranks = [check_lora(path).max_rank if path.is_file() else config.teach.rank for path in paths]
    accelerated = acceleration_of(config)
    makes_targets = bool(config.effects) and config.targets.source == "teachers"
    guided_targets = config.targets.acceleration is None and config.targets.guidance != 1
    return TrainSettings(
        image_tokens=train.buckets.max_area // footprint.pixels_per_token**2,
        reference_tokens=footprint.reference_tokens,
        text_tokens=TEXT_TOKENS,
        batch_size=train.batch_size,
        anchor_batch_size=train.anchor_batch_size or train.batch_size,
        rank=config.student.rank,
        targets=tuple(config.student.targets or footprint.default_targets),
        acceleration_rank=0 if accelerated is None else check_lora(accelerated).max_rank,
        teacher_rank=max(ranks, default=0),
        teacher_slots=slots,
        base_bytes=base_dtype(config.base.dtype, torch.device("cuda")).itemsize,
        quantized=config.base.quantize != "none",
        coarse=bool(config.effects) and train.coarse_steps > 0,
        coarse_teacher=train.coarse_target == "velocity",
        muon=train.coarse_optimizer == "muon",
        critic_batches=train.critic_updates * train.gradient_accumulation_steps,
        waiting_batches=train.gradient_accumulation_steps * train.critic_reuse,
        moments_bytes=DTYPES[train.adam_moments].itemsize,
        ema=train.ema_decay > 0,
        guided=objective.guidance != 1,
        terms=(
            bool(config.effects) and objective.ta_fm_weight > 0,
            bool(config.effects) and objective.dmd_ts_weight > 0,
            objective.dmd_bs_weight > 0,
            objective.imitation_weight > 0,
        ),
        num_steps=max(config.schedule.trained_counts),
        checkpointing=train.gradient_checkpointing,
        targets_batch=min(TARGET_BATCH, slots) * (1 + guided_targets) if makes_targets else 0,
        text_encoder_parameters=encoders["text_encoder"],
        vae_parameters=encoders["vae"],
    )

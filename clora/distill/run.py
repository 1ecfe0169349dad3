"""A distillation from an open workspace to a file."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console

from clora.config import Config, Job, acceleration_of
from clora.data.examples import Example
from clora.distill.batches import Batches
from clora.distill.memory import num_blocks_kept
from clora.distill.networks import Models, joined
from clora.distill.opened import OpenBase, Workspace
from clora.distill.preview import sample_grid
from clora.distill.roles import ACCELERATING, ACCELERATION, CRITIC, STUDENT, TARGET_BATCH
from clora.distill.step import JOINT_TOKENS, Distillation, networks_at, train_step
from clora.distill.targets import make_targets, targets_from_pairs
from clora.distill.teachers import teacher_files
from clora.distill.workspace import trainable_group
from clora.inference.sampling import few_step_sampling, teacher_sampling
from clora.io.digest import hash_files
from clora.lora.adapters import slot_to_cpu
from clora.lora.bank import TeacherBank
from clora.lora.catalogue import Catalogue, CatalogueEntry, CatalogueSchedule, write_collection
from clora.lora.files import read_lora, write_lora
from clora.lora.module import LoraModule, join_modules
from clora.lora.slots import Slot
from clora.method.losses import Figures
from clora.method.objective import AnchorLoss, ta_fm_loss, teacher_velocity_loss
from clora.method.prompts import EffectPrompt
from clora.training import distributed
from clora.training.loop import loop_config, run_loop
from clora.training.optimizer import averaged_weights
from clora.training.run_record import write_run
from clora.training.tracker import Tracker


def open_bank(base: OpenBase) -> TeacherBank | None:
    """The bank of the teachers of `base.config`; None without effects. A workspace is an open base too."""
    if not base.config.effects:
        return None
    cache_gb = base.config.train.teacher_cache_gb
    return TeacherBank(
        base.adapters,
        teacher_files(base.config),
        base.config.train.teacher_slots,
        dtype=base.backbone.dtype,
        cache_bytes=math.inf if cache_gb is None else cache_gb * 1e9,
    )


def targets_of(workspace: Workspace, bank: TeacherBank, console: Console) -> dict[str, list[Example]]:
    """The effects' examples with their y; a batch never needs more teachers than there are slots.

    `targets.acceleration` makes them by the stacked deployment of Eq. 3: each teacher with that LoRA on top, sampled as
    the student is.
    """
    config, adapters, schedule = workspace.config, workspace.adapters, workspace.config.schedule
    if config.targets.source == "pairs":
        return targets_from_pairs(workspace.effects)
    hashes, batch_size = hash_files(teacher_files(config)), min(TARGET_BATCH, bank.capacity)
    path = acceleration_of(config, "targets")
    if path is None:
        return make_targets(workspace, bank.slots_for, teacher_sampling(config), hashes, console, batch_size)

    def stacked(effects: Sequence[str | None]) -> list[Slot]:
        return [joined(slot, ACCELERATING) for slot in bank.slots_for(effects)]

    acceleration = hash_files({ACCELERATING: path})[ACCELERATING]
    hashes = {name: f"{sha256}+{acceleration}" for name, sha256 in hashes.items()}
    adapters.add_lora(ACCELERATING, read_lora(path, adapters.module_shapes).modules, dtype=workspace.backbone.dtype)
    sampling = few_step_sampling(schedule.num_steps, schedule.shift, schedule.sampler)
    made = make_targets(workspace, stacked, sampling, hashes, console, batch_size)
    adapters.remove_stack(ACCELERATING)
    return made


def distil(workspace: Workspace, bank: TeacherBank | None, resume: str | None, console: Console) -> Path:
    """Run the distillation on an open workspace whose targets are made; writes and returns the student's file."""
    distillation = make_distillation(workspace, bank)
    teachers = run_distillation(workspace, distillation, "train", resume, console)
    with averaged_weights(distillation.student):
        return write_student(workspace, teachers)  # of several processes each has it all, and the first writes


def run_distillation(
    workspace: Workspace, distillation: Distillation, job: Job, resume: str | None, console: Console
) -> dict[str, str]:
    """All steps of `config.train`; checkpoints and log lie under `output_dir/JOB`. Closes the bank. Returns the sha256
    of each effect's teacher as it was at the start."""
    config = workspace.config
    groups = {STUDENT: distillation.student}
    if distillation.critic is not None:
        groups[CRITIC] = distillation.critic

    def one_step(step: int) -> Figures:
        return train_step(distillation, step)

    def on_step(step: int, tracker: Tracker) -> None:
        if config.train.sample_steps and step % config.train.sample_steps == 0:
            networks = networks_at(distillation, step - 1)
            with averaged_weights(distillation.student):
                grid = sample_grid(networks.student, distillation.models.backbone, distillation.batches)
            if grid is not None:
                tracker.image("samples", grid, step)
        if job == "train" and step == distillation.batches.coarse_steps < config.train.max_train_steps:
            write_coarse(workspace, teachers)

    teachers = hash_files(teacher_files(config))  # as they are now: the catalogue must not depend on them at the end
    identity = workspace.hashes | {f"teacher of {name}": sha256 for name, sha256 in teachers.items()}
    sections: tuple[Literal["student", "targets"], ...] = ("student", "targets")
    fast = {f"{section}.acceleration": acceleration_of(config, section) for section in sections}
    identity |= hash_files({key: path for key, path in fast.items() if path is not None})
    train = config.train
    stages = (0, distillation.batches.coarse_steps)
    loop = loop_config(config, job, train.max_train_steps, identity, resume, train.max_train_seconds, stages)
    try:
        run_loop(loop, groups, one_step, on_step, console, partial(write_run, config, job, identity))
    finally:
        if distillation.models.bank is not None:
            distillation.models.bank.close()
    return teachers


def make_distillation(workspace: Workspace, bank: TeacherBank | None) -> Distillation:
    """Add the student's and the critic's slots and put together what a step needs."""
    config, adapters = workspace.config, workspace.adapters
    generator = add_student(workspace)
    if config.student.init_from is not None:
        modules = read_lora(config.student.init_from, adapters.module_shapes).modules
        for name in trained_slots(config):
            adapters.init_slot(name, modules, generator)
    joining: tuple[str, ...] = ()
    accelerating = None
    if (path := acceleration_of(config)) is not None:
        modules = read_lora(path, adapters.module_shapes).modules
        adapters.add_lora(ACCELERATION, modules, trainable=True)
        joining = (ACCELERATION,)
        if config.objective.imitation_weight and config.objective.imitation == "same_step":
            adapters.add_lora(ACCELERATING, modules, dtype=workspace.backbone.dtype)
            accelerating = ACCELERATING
    models = Models(workspace.backbone, bank, joining=joining, accelerating=accelerating)
    coarse_loss = teacher_velocity_loss if config.train.coarse_target == "velocity" else ta_fm_loss
    return assemble(workspace, models, batches_of(workspace), [STUDENT, *joining], coarse_loss=coarse_loss)


def add_student(workspace: Workspace, critic_rank: int = 0) -> torch.Generator:
    """Add the slots of the student and, where there is one, of the critic, which has so many ranks more; returns the
    generator that drew them."""
    student, adapters = workspace.config.student, workspace.adapters
    generator = torch.Generator().manual_seed(workspace.config.seed)
    for name in trained_slots(workspace.config):
        rank = student.rank + (critic_rank if name == CRITIC else 0)
        alpha = student.alpha * rank / student.rank
        adapters.add_stack(name, [name], rank, alpha, trainable=True, init="lora", generator=generator)
    return generator


def trained_slots(config: Config) -> tuple[str, ...]:
    """The student's slot and, where it has updates, the critic's."""
    return (STUDENT, CRITIC) if config.train.critic_updates else (STUDENT,)


def batches_of(workspace: Workspace, deal: Sequence[str] | None = None) -> Batches:
    """The batches of the workspace's examples; `deal` as there."""
    backbone = workspace.backbone
    return Batches(
        workspace.config, workspace.effects, workspace.general, backbone.device, backbone.token_channels, deal
    )


def assemble(
    workspace: Workspace,
    models: Models,
    batches: Batches,
    stacks: Sequence[str],
    anchor_loss: AnchorLoss = ta_fm_loss,
    coarse_loss: AnchorLoss = ta_fm_loss,
    collection_rank: int = 0,
) -> Distillation:
    """Decide what is recomputed, and give the student's `stacks` and the critic their optimizers. `collection_rank`: of
    the collection that the student lies on."""
    config, train, processes = workspace.config, workspace.config.train, distributed.world_size()
    if train.gradient_checkpointing:
        workspace.backbone.set_gradient_checkpointing(True, num_blocks_kept(config, processes, collection_rank))
    coarse = batches.coarse_steps
    student = trainable_group(workspace.adapters, stacks, config, train.learning_rate, ema=True, coarse_updates=coarse)
    critic = None
    if CRITIC in trained_slots(config):
        critic = trainable_group(workspace.adapters, [CRITIC], config, train.critic_learning_rate, gradients_of=student)
    joint_tokens = math.inf if train.shard_base and processes > 1 else JOINT_TOKENS
    return Distillation(config, batches, models, student, critic, anchor_loss, coarse_loss, joint_tokens)


def write_student(workspace: Workspace, teachers: dict[str, str]) -> Path:
    """Write the student's slots, summed, with the catalogue; without effects a plain LoRA, the acceleration LoRA.

    `teachers`: the sha256 of each effect's teacher.
    """
    config, adapters = workspace.config, workspace.adapters
    modules = slot_to_cpu(adapters, STUDENT)
    if ACCELERATION in adapters.slot_names:
        modules = join_modules(modules, slot_to_cpu(adapters, ACCELERATION))
    if not config.effects:
        path = config.output_dir / "acceleration.safetensors"
        if distributed.is_main():
            write_lora(path, modules, {"clora.role": "acceleration"})
        return path
    path = config.output_dir / "collection.safetensors"
    _write_effects(path, workspace, modules, teachers)
    return path


def write_coarse(workspace: Workspace, teachers: dict[str, str]) -> None:
    """Write what the coarse stage made, without the acceleration LoRA, to `coarse.safetensors`: the student before any
    distillation, to compare the collection with."""
    modules = slot_to_cpu(workspace.adapters, STUDENT)  # of several processes each has it all
    _write_effects(workspace.config.output_dir / "coarse.safetensors", workspace, modules, teachers)


def _write_effects(
    path: Path, workspace: Workspace, modules: Mapping[str, LoraModule], teachers: dict[str, str]
) -> None:
    """Write the modules with the catalogue of the run's effects; the first process does."""
    config = workspace.config
    schedule = CatalogueSchedule(num_steps=config.schedule.num_steps, shift=config.schedule.shift)
    entries = catalogue_entries(config, list(workspace.prompts.values()), teachers)
    catalogue = Catalogue(base=config.base.model, schedule=schedule, sampler=config.schedule.sampler, effects=entries)
    if distributed.is_main():
        write_collection(path, modules, catalogue)


def catalogue_entries(
    config: Config, prompts: Sequence[EffectPrompt], teachers: dict[str, str]
) -> list[CatalogueEntry]:
    """What a collection says of the effects of `config`, in the order of `prompts`, which are theirs; `teachers`: the
    sha256 of each effect's teacher."""
    return [
        CatalogueEntry(
            name=prompt.name,
            trigger=prompt.trigger if config.objective.aop else "",
            student_prompt=prompt.text if config.objective.aop else prompt.teacher_prompt,
            teacher_sha256=teachers[prompt.name],
        )
        for prompt in prompts
    ]

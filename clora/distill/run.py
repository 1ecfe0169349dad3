"""A distillation from an open workspace to a file."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from rich.console import Console

from clora.config import Config, Job, acceleration_of
from clora.data.examples import Example
from clora.distill.memory import num_blocks_kept
from clora.distill.preview import sample_grid
from clora.distill.roles import ACCELERATION, COLLECTION, CRITIC, STUDENT
from clora.distill.step import JOINT_TOKENS, Distiller
from clora.distill.targets import TARGET_BATCH, make_targets, targets_from_pairs
from clora.distill.workspace import Workspace, trainable_group
from clora.errors import raise_faults
from clora.io.digest import hash_files
from clora.lora.adapters import slot_to_cpu
from clora.lora.bank import TeacherBank
from clora.lora.catalogue import Catalogue, CatalogueEntry, CatalogueSchedule, write_collection
from clora.lora.files import read_lora, write_lora
from clora.lora.module import join_modules
from clora.method.prompts import EffectPrompt
from clora.training import distributed
from clora.training.loop import LoopConfig, run_loop
from clora.training.optimizer import averaged_weights
from clora.training.run_record import git_revision, write_run
from clora.training.tracker import Tracker


def teacher_files(config: Config) -> dict[str, Path]:
    """Each effect's teacher: its `lora`, or what `clora teach` wrote; all that are missing in one error."""
    files, faults = {}, []
    for effect in config.effects:
        path = config.teacher_path(effect)
        files[effect.name] = path
        if not path.is_file():
            mend = "check the path" if effect.lora else "run `clora teach` first, or give its LoRA file in 'lora'"
            faults.append(f"effect {effect.name}: no teacher at {path}; {mend}")
    raise_faults(faults)
    return files


def open_bank(workspace: Workspace) -> TeacherBank | None:
    """The bank of teachers; None without effects."""
    if not workspace.config.effects:
        return None
    cache_gb = workspace.config.train.teacher_cache_gb
    return TeacherBank(
        workspace.adapters,
        teacher_files(workspace.config),
        workspace.config.train.teacher_slots,
        dtype=workspace.backbone.dtype,
        cache_bytes=math.inf if cache_gb is None else cache_gb * 1e9,
    )


def targets_of(workspace: Workspace, bank: TeacherBank, console: Console) -> dict[str, list[Example]]:
    """The effects' examples with their y; a batch never needs more teachers than there are slots."""
    if workspace.config.targets.source == "pairs":
        return targets_from_pairs(workspace.effects)
    hashes = hash_files(teacher_files(workspace.config))
    batch = bank.capacity if workspace.config.effects else 1
    return make_targets(workspace, bank.slots_for, hashes, console, max(1, min(TARGET_BATCH, batch)))


def distil(workspace: Workspace, bank: TeacherBank | None, resume: str | None, console: Console) -> Path:
    """Run the distillation on an open workspace whose targets are made; writes and returns the student's file."""
    distiller = make_distiller(workspace, bank)
    teachers = run_distillation(workspace, distiller, "train", resume, console)
    with averaged_weights(distiller.student):
        return write_student(workspace, teachers)  # of several processes each has it all, and the first writes


def run_distillation(
    workspace: Workspace, distiller: Distiller, job: Job, resume: str | None, console: Console
) -> dict[str, str]:
    """All steps of `config.train`; checkpoints and log lie under `output_dir/JOB`. Closes the bank. Returns the sha256
    of each effect's teacher as it was at the start."""
    config = workspace.config
    groups = {STUDENT: distiller.student, CRITIC: distiller.critic}

    def on_step(step: int, tracker: Tracker) -> None:
        if config.train.sample_steps and step % config.train.sample_steps == 0:
            grid = sample_grid(workspace, distiller, step)
            if grid is not None:
                tracker.image("samples", grid, step)

    teachers = hash_files(teacher_files(config))  # as they are now: the catalogue must not depend on them at the end
    identity = workspace.hashes | {f"teacher of {name}": sha256 for name, sha256 in teachers.items()}
    write_run(config, job, identity)
    loop = LoopConfig(
        title=job,
        max_steps=config.train.max_train_steps,
        folder=config.output_dir / job,
        checkpointing_steps=config.train.checkpointing_steps,
        fingerprint=config.fingerprint(job, distributed.world_size()),
        checkpoints_total_limit=config.train.checkpoints_total_limit,
        max_seconds=config.train.max_train_seconds,
        log_every=config.train.log_every,
        stages=(0, distiller.coarse_steps),
        report_to=config.train.report_to,
        resume=resume,
        identity=identity,
        record={"config": config.model_dump(mode="json"), "git_revision": git_revision()},
        settings=config.deciding_values(job, distributed.world_size()),
    )
    try:
        run_loop(loop, groups, distiller.step, on_step, console)
    finally:
        if distiller.bank is not None:
            distiller.bank.close()
    return teachers


def make_distiller(
    workspace: Workspace,
    bank: TeacherBank | None,
    deal: Sequence[str] = (),
    rehearsed: Iterable[str] = (),
    collection: Path | None = None,
) -> Distiller:
    """Add the student's and the critic's slots and wire one step's parts together.

    `deal` and `rehearsed` as in `Distiller`. With `collection` the student is added to this file's LoRA, which stays as
    it is; the critic starts from it and can change all of it, because it must follow what the collection samples, which
    is not what it predicts. The acceleration LoRA, which a collection has in it, joins the new effects' teachers.
    """
    config = workspace.config
    adapters, student = workspace.adapters, config.student
    generator = torch.Generator().manual_seed(config.seed)
    below = {} if collection is None else read_lora(collection, adapters.module_shapes).modules
    for name, extra in ((STUDENT, 0), (CRITIC, max((module.rank for module in below.values()), default=0))):
        rank = student.rank + extra
        alpha = student.alpha * rank / student.rank
        adapters.add_stack(name, [name], rank, alpha, trainable=True, init="lora", generator=generator)
    if student.init_from is not None:
        modules = read_lora(student.init_from, adapters.module_shapes).modules
        for name in (STUDENT, CRITIC):
            adapters.init_slot(name, modules, generator)
    if below:
        adapters.add_lora(COLLECTION, below, dtype=workspace.backbone.dtype)
        adapters.init_slot(CRITIC, below, generator)
    stacks = [STUDENT]
    if (path := acceleration_of(config)) is not None:
        modules = read_lora(path, adapters.module_shapes).modules
        adapters.add_lora(ACCELERATION, modules, trainable=collection is None)
        stacks += [ACCELERATION] if collection is None else []
    train_config = config.train
    if train_config.gradient_checkpointing:
        workspace.backbone.set_gradient_checkpointing(True, num_blocks_kept(config, distributed.world_size()))
    student_group = trainable_group(adapters, stacks, config, train_config.learning_rate, ema=True)
    critic_group = trainable_group(
        adapters, [CRITIC], config, train_config.critic_learning_rate, gradients_of=student_group
    )
    return Distiller(
        config,
        workspace.backbone,
        bank,
        workspace.effects,
        workspace.general,
        student=student_group,
        critic=critic_group,
        accelerated=ACCELERATION in stacks,
        deal=deal,
        rehearsed=frozenset(rehearsed),
        extended=collection is not None,
        accelerated_teachers=collection is not None and path is not None,
        joint_tokens=math.inf if config.train.shard_base and distributed.world_size() > 1 else JOINT_TOKENS,
    )


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
    schedule = CatalogueSchedule(num_steps=config.schedule.num_steps, shift=config.schedule.shift)
    entries = catalogue_entries(config, list(workspace.prompts.values()), teachers)
    path = config.output_dir / "collection.safetensors"
    if distributed.is_main():
        write_collection(path, modules, Catalogue(base=config.base.model, schedule=schedule, effects=entries))
    return path


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

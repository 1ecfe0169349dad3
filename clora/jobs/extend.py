"""`clora extend`: new effects for an existing collection, by about a hundred updates from it (Table 5).

The collection stays as it is; a LoRA of rank `extend.rank` is trained on top of it, and the two are written as one.
The old effects' teachers and pairs are not needed: they are rehearsed from the collection itself
(`clora.distill.rehearsal`). Old and new share the effect stream by `extend.rehearsal_share`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from clora.config import Config, acceleration_of
from clora.data.examples import Example
from clora.distill.check import check_training
from clora.distill.networks import Models
from clora.distill.opened import Workspace
from clora.distill.rehearsal import FewStepTeachers, deal_names, rehearsal_examples, rehearsal_targets
from clora.distill.roles import ACCELERATION, COLLECTION, CRITIC, STUDENT
from clora.distill.run import (
    add_student,
    assemble,
    batches_of,
    catalogue_entries,
    open_bank,
    run_distillation,
    targets_of,
    trained_slots,
)
from clora.distill.step import Distillation
from clora.distill.workspace import open_workspace
from clora.errors import raise_faults
from clora.io.digest import hash_files
from clora.lora.adapters import slot_to_cpu
from clora.lora.bank import TeacherBank
from clora.lora.catalogue import Catalogue, CatalogueEntry, read_catalogue, write_collection
from clora.lora.files import read_lora
from clora.lora.module import LoraModule, join_modules
from clora.method.objective import ta_fm_loss
from clora.method.prompts import make_triggers
from clora.training import distributed
from clora.training.device import determinism, quiet_console
from clora.training.optimizer import averaged_weights


def extend(collection: Path, config: Config, resume: str | None = None, console: Console | None = None) -> Path:
    """Add the effects of `config` to a collection; returns `output_dir/collection.safetensors`, its version one up.

    Checkpoints and `log.jsonl` lie under `output_dir/extend`. Raises `InputErrors` with every reason why the two do
    not fit each other, otherwise as `train.train` does.
    """
    console = console or quiet_console()
    catalogue = read_catalogue(collection)
    raise_faults(extend_faults(collection, catalogue, config))
    run = check_training(extended_config(catalogue, config), "extend")
    with distributed.process_group(config.train.timeout_seconds), determinism(config.train.deterministic):
        workspace = open_workspace(run, console, keep_encoders=True)
        rehearses = config.extend.rehearsal_share > 0
        old = rehearsal_examples(workspace, catalogue, console) if rehearses else {}
        workspace.backbone.free_encoders()
        bank = open_bank(workspace)
        new = _new_targets(workspace, bank, console)
        below = read_lora(collection, workspace.adapters.module_shapes).modules
        workspace.adapters.add_lora(COLLECTION, below, dtype=workspace.backbone.dtype)
        sha256 = hash_files({"collection": collection})["collection"]
        old = rehearsal_targets(workspace, old, catalogue, sha256, console)
        workspace = replace(workspace, effects=new | old, hashes=workspace.hashes | {"collection": sha256})
        distillation = make_extension(workspace, bank, below, list(new), list(old))
        teachers = run_distillation(workspace, distillation, "extend", resume, console)
        path = config.output_dir / "collection.safetensors"
        with averaged_weights(distillation.student):
            added = slot_to_cpu(workspace.adapters, STUDENT)
        if distributed.is_main():
            entries = catalogue_entries(workspace.config, list(workspace.prompts.values()), teachers)
            modules = join_modules(read_lora(collection).modules, added)
            write_collection(path, modules, merge_catalogue(catalogue, entries))
    return path


def make_extension(
    workspace: Workspace,
    bank: TeacherBank | None,
    below: Mapping[str, LoraModule],
    new: Sequence[str],
    old: Sequence[str],
) -> Distillation:
    """Put together what a step needs where the student lies on top of a collection of the modules `below`, which is in
    its slot and stays as it is.

    The critic starts from the collection and can change all of it, because it must follow what the collection samples,
    which is not what it predicts. The acceleration LoRA, which a collection has in it, joins the new effects' teachers.
    """
    config, adapters = workspace.config, workspace.adapters
    rank = max(module.rank for module in below.values())
    generator = add_student(workspace, critic_rank=rank)
    if CRITIC in trained_slots(config):
        adapters.init_slot(CRITIC, below, generator)
    path = acceleration_of(config)
    if path is not None:
        adapters.add_lora(ACCELERATION, read_lora(path, adapters.module_shapes).modules)
    models = Models(
        workspace.backbone,
        bank,
        student=(COLLECTION, STUDENT),
        resident=dict.fromkeys(old, COLLECTION),
        accelerating=None if path is None else ACCELERATION,
    )
    followed = FewStepTeachers(models, weight=config.extend.rehearsal_weight)
    batches = batches_of(workspace, deal_names(new, old, config.extend.rehearsal_share))
    anchor_loss = followed.anchor_loss if old or path is not None else ta_fm_loss
    return assemble(workspace, models, batches, [STUDENT], anchor_loss, anchor_loss, rank)


def merge_catalogue(catalogue: Catalogue, new: Sequence[CatalogueEntry]) -> Catalogue:
    """The catalogue with the new effects behind the old ones, whose entries stay as they are; version one up."""
    values = catalogue.model_dump() | {
        "version": catalogue.version + 1,
        "effects": [entry.model_dump() for entry in (*catalogue.effects, *new)],
    }
    return Catalogue.model_validate(values)


def extend_faults(collection: Path, catalogue: Catalogue, config: Config) -> list[str]:
    """Why the effects of `config` cannot be added to this collection; every reason."""
    faults: list[str] = []
    if not config.effects:
        faults.append("effects: is empty; give the effects that are to be added")
    taken = {entry.name.casefold() for entry in catalogue.effects}
    triggers = {entry.trigger.casefold() for entry in catalogue.effects if entry.trigger}
    for effect in config.effects:
        if effect.name.casefold() in taken:
            faults.append(f"effect {effect.name}: the collection has one of this name; rename it or leave it out")
        if effect.trigger and effect.trigger.casefold() in triggers:
            faults.append(f"effect {effect.name}: the collection has its trigger {effect.trigger!r}; choose another")
    if config.base.model != catalogue.base:
        faults.append(f"base: is {config.base.model}, {collection} was distilled on {catalogue.base}; set it to that")
    given, needed = config.schedule, catalogue.schedule
    if (given.num_steps, given.shift, given.sampler) != (needed.num_steps, needed.shift, catalogue.sampler):
        wanted = f"schedule.num_steps={needed.num_steps} schedule.shift={needed.shift:g}"
        wanted += f" schedule.sampler={catalogue.sampler}"
        faults.append(f"schedule: differs from the collection's; set {wanted}")
    if config.objective.aop != any(entry.trigger for entry in catalogue.effects):
        has = "no triggers" if config.objective.aop else "triggers"
        faults.append(f"objective.aop: the collection has {has}; set it to {str(not config.objective.aop).lower()}")
    if config.student.init_from is not None:
        faults.append(f"student.init_from: the student starts from {collection}; leave the key out")
    if (config.output_dir / "collection.safetensors").resolve() == collection.resolve():
        faults.append(f"output_dir: {config.output_dir} holds the collection that is extended; choose another folder")
    return faults


def extended_config(catalogue: Catalogue, config: Config) -> Config:
    """The configuration of the run that adds its effects to the collection, as `extend` says.

    Triggers that are drawn differ from those of the collection.
    """
    settings = config.extend
    keys = ("max_train_steps", "coarse_steps", "learning_rate", "coarse_learning_rate", "coarse_optimizer",
            "lr_warmup_steps", "anchor_batch_size")  # fmt: skip
    triggers: dict[str, str] = {}
    if config.objective.aop:
        taken = [entry.trigger for entry in catalogue.effects]
        triggers = make_triggers(config.effects, config.seed, config.prompts.trigger_scheme, taken)
    return config.with_values(
        train={key: getattr(settings, key) for key in keys},
        student={"rank": settings.rank, "alpha": float(settings.rank), "acceleration": acceleration_of(config)},
        objective={"ta_fm_weight": settings.ta_fm_weight}
        | ({} if settings.p_switch is None else {"p_switch": settings.p_switch}),
        effects=[
            effect.model_dump() | {"trigger": triggers.get(effect.name, effect.trigger)} for effect in config.effects
        ],
    )


def _new_targets(workspace: Workspace, bank: TeacherBank | None, console: Console) -> dict[str, list[Example]]:
    """The new effects' y, as `run.targets_of` makes them; the first `targets.max_sources` pairs of each."""
    assert bank is not None
    most = workspace.config.targets.max_sources
    effects = {name: examples[:most] for name, examples in workspace.effects.items()}
    return targets_of(replace(workspace, effects=effects), bank, console)

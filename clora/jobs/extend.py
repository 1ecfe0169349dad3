"""`clora extend`: new effects for an existing collection, by about a hundred updates from it (Table 5).

The collection stays as it is; a LoRA of rank `extend.rank` is trained on top of it, and the two are written as one.
The old effects' teachers and pairs are not needed: each old effect is rehearsed as an ordinary effect whose teacher is
the collection itself, frozen, and whose targets y are its few-step samples with the old student prompt on the new
effects' sources. In TA-FM the student keeps to the collection's velocity at these samples, noised. Old and new share
the effect stream by `extend.rehearsal_share`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from clora.config import Config, EffectConfig, acceleration_of
from clora.data.dataset import effect_pairs
from clora.data.examples import Example
from clora.distill.check import check_training
from clora.distill.checked_run import CheckedRun
from clora.distill.roles import STUDENT
from clora.distill.run import catalogue_entries, make_distiller, open_bank, run_distillation, targets_of
from clora.distill.stages import extend_warnings
from clora.distill.targets import rehearsal_targets
from clora.distill.workspace import Workspace, open_workspace
from clora.errors import InputError, raise_faults
from clora.io.atomic import write_text
from clora.io.digest import hash_files
from clora.lora.adapters import slot_to_cpu
from clora.lora.bank import TeacherBank
from clora.lora.catalogue import Catalogue, CatalogueEntry, read_catalogue, write_collection
from clora.lora.files import read_lora
from clora.lora.module import join_modules
from clora.method.prompts import effect_prompts
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
    new_effects = check_training(run_settings(config))
    with distributed.process_group(config.train.timeout_seconds), determinism(config.train.deterministic):
        whole = extended_config(collection, catalogue, config)
        distributed.barrier()
        workspace = open_workspace(with_rehearsed(new_effects, whole), console)
        bank = open_bank(workspace)
        assert bank is not None
        collection_hash = hash_files({"collection": collection})["collection"]
        targets = _new_targets(workspace, bank, config, console) | rehearsal_targets(
            workspace, bank.slots_for, catalogue, collection_hash, console
        )
        hashes = workspace.hashes | {"collection": collection_hash}
        workspace = replace(workspace, effects=targets, hashes=hashes)
        old, new = [entry.name for entry in catalogue.effects], [effect.name for effect in config.effects]
        share = config.extend.rehearsal_share
        rehearsed = old if share > 0 else []
        distiller = make_distiller(workspace, bank, deal_names(new, old, share), rehearsed, collection)
        teachers = run_distillation(workspace, distiller, "extend", resume, console)
        path = config.output_dir / "collection.safetensors"
        with averaged_weights(distiller.student):
            added = slot_to_cpu(workspace.adapters, STUDENT)
        if distributed.is_main():
            entries = catalogue_entries(config, [workspace.prompts[name] for name in new], teachers)
            modules = join_modules(read_lora(collection).modules, added)
            write_collection(path, modules, merge_catalogue(catalogue, entries))
    return path


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
    if catalogue.sampler != "consistency":
        faults.append(f"{collection}: is sampled by {catalogue.sampler}; only consistency collections can be extended")
    given, needed = config.schedule, catalogue.schedule
    if (given.num_steps, given.shift) != (needed.num_steps, needed.shift):
        wanted = f"schedule.num_steps={needed.num_steps} schedule.shift={needed.shift:g}"
        faults.append(f"schedule: differs from the collection's; set {wanted}")
    if config.objective.aop != any(entry.trigger for entry in catalogue.effects):
        has = "no triggers" if config.objective.aop else "triggers"
        faults.append(f"objective.aop: the collection has {has}; set it to {str(not config.objective.aop).lower()}")
    if config.student.init_from is not None:
        faults.append(f"student.init_from: the student starts from {collection}; leave the key out")
    if (config.output_dir / "collection.safetensors").resolve() == collection.resolve():
        faults.append(f"output_dir: {config.output_dir} holds the collection that is extended; choose another folder")
    return faults


def run_settings(config: Config) -> Config:
    """The configuration with what `extend` says in place of the keys of these names elsewhere."""
    settings = config.extend
    keys = ("max_train_steps", "coarse_steps", "learning_rate", "coarse_learning_rate", "lr_warmup_steps")
    train = config.train.model_copy(update={key: getattr(settings, key) for key in (*keys, "anchor_batch_size")})
    student = config.student.model_copy(update={"rank": settings.rank, "alpha": float(settings.rank)})
    p_switch = config.objective.p_switch if settings.p_switch is None else settings.p_switch
    objective = config.objective.model_copy(update={"p_switch": p_switch})
    return config.model_copy(update={"train": train, "student": student, "objective": objective})


def with_rehearsed(run: CheckedRun, whole: Config) -> CheckedRun:
    """The checked run of the new effects with the old ones of `whole`, whose pairs are the new effects' sources."""
    old = [effect for effect in whole.effects if effect.name not in run.effects]
    pairs = {effect.name: effect_pairs(whole, effect, require_target=False) for effect in old}
    prompts = {prompt.name: prompt for prompt in effect_prompts(whole)}
    warnings = tuple(extend_warnings(whole))
    return replace(run, config=whole, effects=run.effects | pairs, prompts=prompts, warnings=warnings)


def extended_config(collection: Path, catalogue: Catalogue, config: Config) -> Config:
    """The configuration of the run: new effects and rehearsed old ones, from the collection on, as `extend` says.

    The main process writes the sources of each old effect to `output_dir/rehearsal/NAME.jsonl`.
    """
    settings, config = config.extend, run_settings(config)
    pool = _sources(config)
    rehearsed = []
    if settings.rehearsal_share > 0:
        for index, entry in enumerate(catalogue.effects):
            sources = [
                pool[(index * settings.rehearsal_sources + k) % len(pool)] for k in range(settings.rehearsal_sources)
            ]
            rehearsed.append(_rehearsed_effect(config.output_dir / "rehearsal", collection, entry, sources))
    roots = sorted({path.parent for sources in pool for path in sources})
    extended = config.model_copy(
        update={
            "student": config.student.model_copy(update={"acceleration": acceleration_of(config)}),
            "effects": [*config.effects, *rehearsed],
            "data_roots": [*config.data_roots, *roots],
        }
    )
    extended._folder = config.folder
    return extended


def _sources(config: Config) -> list[tuple[Path, ...]]:
    """The distinct source images of the new effects, dealt in turn, so that any few of them are of all effects."""
    faults: list[str] = []
    found: list[list[tuple[Path, ...]]] = []
    for effect in config.effects:
        try:
            found.append([pair.sources for pair in effect_pairs(config, effect, require_target=False)])
        except InputError as error:
            faults += error.faults
    raise_faults(faults)
    longest = max(len(sources) for sources in found)
    return list(dict.fromkeys(sources[k] for k in range(longest) for sources in found if k < len(sources)))


def _rehearsed_effect(
    folder: Path, collection: Path, entry: CatalogueEntry, sources: Sequence[tuple[Path, ...]]
) -> EffectConfig:
    """An old effect as an ordinary one, taught by the collection; its pairs are sources alone."""
    rows = [{"source_images": [str(path) for path in one], "prompt": entry.prompt} for one in sources]
    path = folder / f"{entry.name}.jsonl"
    if distributed.is_main():
        write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return EffectConfig(
        name=entry.name,
        lora=collection.absolute(),
        prompt=entry.prompt,
        # A prompt that starts with its trigger is left as it is (`prompts.student_prompt`).
        student_prompt=entry.student_prompt or entry.trigger,
        trigger=entry.trigger or None,
        pairs=path,
    )


def deal_names(new: Sequence[str], old: Sequence[str], share: float) -> list[str]:
    """Every name as often as it comes up in a round, so that about `share` of a round is old effects.

    The rarer kind is repeated, the other comes once: 3 new and 50 old at 0.5 are 17 times 3 and 50.
    """
    if not share or not old:
        return list(new)
    ratio = len(old) * (1 - share) / (share * len(new))  # how often a new name comes up for one of each old
    return [*new] * max(1, round(ratio)) + [*old] * max(1, round(1 / ratio))


def _new_targets(workspace: Workspace, bank: TeacherBank, config: Config, console: Console) -> dict[str, list[Example]]:
    """The new effects' y, as `train.targets_of` makes them; the first `targets.max_sources` pairs of each."""
    most = config.targets.max_sources
    effects = {effect.name: workspace.effects[effect.name][:most] for effect in config.effects}
    return targets_of(replace(workspace, config=config, effects=effects), bank, console)

"""Target images y (Sec. 4.3): made by the teachers with their own prompt, many steps and guidance, cached by content;
or the pairs' own. For effects that a collection holds already, the collection's own few-step samples.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from rich.console import Console
from rich.progress import Progress, track
from torch import Tensor

from clora.backbones.cond import Cond
from clora.data.cache import cache_key
from clora.data.dataset import in_batches
from clora.data.examples import Example, collate
from clora.distill.workspace import Workspace
from clora.errors import raise_faults
from clora.inference.sampling import SlotsFor, sample, teacher_sampling
from clora.lora.catalogue import Catalogue
from clora.method.flow import few_step_sigmas
from clora.method.routing import step_generator
from clora.method.samplers import few_step_sample
from clora.training import distributed

TARGETS_VERSION = "targets/2"
REHEARSAL_VERSION = "rehearsal/1"


def targets_from_pairs(effects: dict[str, list[Example]]) -> dict[str, list[Example]]:
    """The examples with their pairs' targets as y. Raises `InputErrors` naming every effect that lacks some."""
    lacking = {name: sum(e.x0 is None for e in examples) for name, examples in effects.items()}
    raise_faults(
        [
            f"effect {name}: {count} of its pairs have no target; add them, or set targets.source=teachers"
            for name, count in lacking.items()
            if count
        ]
    )
    return {name: [replace(e, y=(e.x0,)) for e in examples if e.x0 is not None] for name, examples in effects.items()}


@torch.no_grad()
def make_targets(
    workspace: Workspace, slots_for: SlotsFor, teacher_hashes: dict[str, str], console: Console, batch_size: int
) -> dict[str, list[Example]]:
    """The effects' examples with `y` filled in: `targets.per_source` images each, one noise per image.

    Interrupted, it goes on where it was: every image is an entry of the cache, under a hash of the teacher's file, its
    prompt, the source and the settings. Several processes share the work.
    """
    config, settings, backbone = workspace.config, workspace.config.targets, workspace.backbone
    todo = [e for examples in workspace.effects.values() for e in examples]
    keys = {e.key: _keys(workspace, e, teacher_hashes) for e in todo}
    missing = [e for e in todo if any(workspace.cache.read(key) is None for key in keys[e.key])]
    distributed.barrier()  # before any process writes, so that all see the same missing
    sampling = teacher_sampling(config)
    with Progress(console=console, transient=True) as progress:
        batches = _own_batches(list(in_batches(missing, batch_size)), equally_many=config.train.shard_base)
        task = progress.add_task("targets", total=sum(map(len, batches)) * settings.per_source)
        for batch in batches:
            cond = collate(batch, "teacher", backbone.device)
            uncond = collate(batch, "negative", backbone.device) if sampling.is_guided else None
            for draw in range(settings.per_source):
                seeds = [_seed(keys[e.key][draw]) for e in batch]
                y = sample(backbone, cond, slots_for(cond.effects), sampling, seeds, uncond)
                for example, latents in zip(batch, y.cpu(), strict=True):
                    workspace.cache.write(keys[example.key][draw], {"latents": latents.contiguous()})
                progress.advance(task, len(batch))
    distributed.barrier()
    filled = {}
    for name, examples in workspace.effects.items():
        filled[name] = [replace(e, y=tuple(_read(workspace, key) for key in keys[e.key])) for e in examples]
    return filled


@torch.no_grad()
def rehearsal_targets(
    workspace: Workspace, slots_for: SlotsFor, catalogue: Catalogue, collection_hash: str, console: Console
) -> dict[str, list[Example]]:
    """The old effects' y for `clora extend`: what their collection makes of each source in its own few steps.

    Cached as in `make_targets`, under a hash of the collection. As a teacher it reads the student prompt in both
    branches of the guidance, so that none is added to what its samples have of it already.
    """
    backbone, schedule = workspace.backbone, catalogue.schedule
    sigmas = few_step_sigmas(schedule.num_steps, schedule.shift)
    how = f"{REHEARSAL_VERSION}/{collection_hash}/{schedule.num_steps}/{schedule.shift}{_quantized(workspace)}"
    prompts = {entry.name: entry.prompt for entry in catalogue.effects}
    todo = [e for name in prompts for e in workspace.effects.get(name, [])]
    keys = {
        id(e): cache_key(list(e.sources), prompts[e.effect or ""], workspace.identity, f"{how}/{e.grid}") for e in todo
    }

    def velocity(x_BTC: Tensor, sigma_B: Tensor, cond: Cond) -> Tensor:
        return backbone.velocity(x_BTC, sigma_B, cond, slots_for(cond.effects))

    missing = [e for e in todo if workspace.cache.read(keys[id(e)]) is None]
    distributed.barrier()
    batches = list(in_batches(missing, workspace.config.eval.batch_size))
    own = _own_batches(batches, equally_many=workspace.config.train.shard_base)
    for batch in track(own, "rehearsal", console=console, transient=True):
        shape = (batch[0].num_tokens, backbone.token_channels)
        cond, seeds = collate(batch, "teacher", backbone.device), [_seed(keys[id(e)]) for e in batch]
        y = few_step_sample(velocity, cond, shape, sigmas, seeds, backbone.device)
        for example, latents in zip(batch, y.cpu(), strict=True):
            workspace.cache.write(keys[id(example)], {"latents": latents.contiguous()})
    distributed.barrier()
    filled: dict[str, list[Example]] = {name: [] for name in prompts if name in workspace.effects}
    for example in todo:
        texts = example.texts | {"negative": example.texts["teacher"]}
        rehearsed = replace(example, texts=texts, y=(_read(workspace, keys[id(example)]),))
        filled[example.effect or ""].append(rehearsed)
    return filled


def _own_batches(batches: list[list[Example]], equally_many: bool) -> list[list[Example]]:
    """This process's batches. Where the base is sharded all need equally many, and what lacks at the end is made
    twice."""
    rank, world = distributed.rank(), distributed.world_size()
    end = -(-len(batches) // world) * world if equally_many else len(batches)
    return [batches[index % len(batches)] for index in range(rank, end, world)]


def _read(workspace: Workspace, key: str) -> Tensor:
    found = workspace.cache.read(key)
    if found is None:
        raise OSError(f"{workspace.cache.path(key)} vanished while it was needed; run the command again")
    return found["latents"]


def _keys(workspace: Workspace, example: Example, teacher_hashes: dict[str, str]) -> list[str]:
    settings = workspace.config.targets
    effect = example.effect or ""
    sampling = teacher_sampling(workspace.config)
    how = (
        f"{TARGETS_VERSION}/{teacher_hashes[effect]}/{sampling.num_steps}/{sampling.shift}/{sampling.guidance}/"
        f"{sampling.rescale}/{sampling.negative_prompt!r}/{example.grid}{_quantized(workspace)}"
    )
    prompt = next(e.prompt for e in workspace.config.effects if e.name == effect)
    return [
        cache_key(list(example.sources), prompt, workspace.identity, f"{how}/{draw}")
        for draw in range(settings.per_source)
    ]


def _quantized(workspace: Workspace) -> str:
    """What a quantized base adds to a key."""
    quantize = workspace.config.base.quantize
    return "" if quantize == "none" else f"/{quantize}"


def _seed(key: str) -> int:
    """The noise of a target depends on what it is made from, not on the order in which targets are made."""
    return int(step_generator(int(key[:12], 16), 0, "target", "cpu").initial_seed())

"""Target images y (Sec. 4.3): made by the teachers with their own prompt, cached by content; or the pairs' own."""

from __future__ import annotations

from dataclasses import replace

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from clora.data.cache import cache_key
from clora.data.dataset import in_batches
from clora.data.examples import Example, collate
from clora.distill.opened import Workspace
from clora.errors import raise_faults
from clora.inference.sampling import Sampling, SlotsFor, sample
from clora.method.routing import step_generator
from clora.training import distributed

TARGETS_VERSION = "targets/3"


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
    workspace: Workspace,
    slots_for: SlotsFor,
    sampling: Sampling,
    teacher_hashes: dict[str, str],
    console: Console,
    batch_size: int,
) -> dict[str, list[Example]]:
    """The effects' examples with `y` filled in: `targets.per_source` images each, one noise per image.

    slots_for, sampling: the teachers, and how they are sampled. teacher_hashes: of each effect's files. Interrupted, it
    goes on where it was: every image is an entry of the cache, under a hash of those, the prompt, the source and the
    settings. Several processes share the work.
    """
    config, settings, backbone = workspace.config, workspace.config.targets, workspace.backbone
    todo = [e for examples in workspace.effects.values() for e in examples]
    keys = {e.key: _keys(workspace, e, sampling, teacher_hashes) for e in todo}
    missing = [e for e in todo if any(workspace.cache.read(key) is None for key in keys[e.key])]
    distributed.barrier()  # before any process writes, so that all see the same missing
    with Progress(console=console, transient=True) as progress:
        batches = own_batches(list(in_batches(missing, batch_size)), equally_many=config.train.shard_base)
        task = progress.add_task("targets", total=sum(map(len, batches)) * settings.per_source)
        for batch in batches:
            cond = collate(batch, "teacher", backbone.device)
            uncond = collate(batch, "negative", backbone.device) if sampling.is_guided else None
            for draw in range(settings.per_source):
                seeds = [noise_seed(keys[e.key][draw]) for e in batch]
                y = sample(backbone, cond, slots_for(cond.effects), sampling, seeds, uncond)
                for example, latents in zip(batch, y.cpu(), strict=True):
                    workspace.cache.write(keys[example.key][draw], {"latents": latents.contiguous()})
                progress.advance(task, len(batch))
    distributed.barrier()
    filled = {}
    for name, examples in workspace.effects.items():
        filled[name] = [replace(e, y=tuple(read_latents(workspace, key) for key in keys[e.key])) for e in examples]
    return filled


def own_batches(batches: list[list[Example]], equally_many: bool) -> list[list[Example]]:
    """This process's batches. Where the base is sharded all need equally many, and what lacks at the end is made
    twice."""
    rank, world = distributed.rank(), distributed.world_size()
    end = -(-len(batches) // world) * world if equally_many else len(batches)
    return [batches[index % len(batches)] for index in range(rank, end, world)]


def read_latents(workspace: Workspace, key: str) -> Tensor:
    """What the cache holds under a key that was written before; OSError where it is gone."""
    found = workspace.cache.read(key)
    if found is None:
        raise OSError(f"{workspace.cache.path(key)} vanished while it was needed; run the command again")
    return found["latents"]


def _keys(workspace: Workspace, example: Example, sampling: Sampling, teacher_hashes: dict[str, str]) -> list[str]:
    settings = workspace.config.targets
    effect = example.effect or ""
    how = (
        f"{TARGETS_VERSION}/{teacher_hashes[effect]}/{sampling.num_steps}/{sampling.shift}/{sampling.sampler}/{sampling.guidance}/"
        f"{sampling.rescale}/{sampling.negative_prompt!r}/{example.grid}{base_suffix(workspace)}"
    )
    prompt = next(e.prompt for e in workspace.config.effects if e.name == effect)
    return [
        cache_key(list(example.sources), prompt, workspace.identity, f"{how}/{draw}")
        for draw in range(settings.per_source)
    ]


def base_suffix(workspace: Workspace) -> str:
    """What a key says of the base's arithmetic."""
    quantize = workspace.config.base.quantize
    return f"/{workspace.backbone.dtype}{'' if quantize == 'none' else f'/{quantize}'}"


def noise_seed(key: str) -> int:
    """The noise of a target depends on what it is made from, not on the order in which targets are made."""
    return int(step_generator(int(key[:12], 16), 0, "target", "cpu").initial_seed())

"""Target images y (Sec. 4.3): made by the teachers with their own prompt, cached by content; or the pairs' own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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


def make_targets(
    workspace: Workspace,
    slots_for: SlotsFor,
    sampling: Sampling,
    teacher_hashes: dict[str, str],
    console: Console,
    batch_size: int,
) -> dict[str, list[Example]]:
    """The effects' examples with `y` filled in: `targets.per_source` images each, one noise per image.

    slots_for, sampling: the teachers, and how they are sampled. teacher_hashes: of each effect's files. Every image is
    cached under a hash of those, the prompt, the source and the settings.
    """
    backbone = workspace.backbone

    def make(batch: list[Example], keys: Sequence[str]) -> Tensor:
        cond = collate(batch, "teacher", backbone.device)
        uncond = collate(batch, "negative", backbone.device) if sampling.is_guided else None
        return sample(backbone, cond, slots_for(cond.effects), sampling, [noise_seed(key) for key in keys], uncond)

    todo = (e for examples in workspace.effects.values() for e in examples)
    keys = {e: _keys(workspace, e, sampling, teacher_hashes) for e in todo}
    return filled(workspace, workspace.effects, keys, make, batch_size, "targets", console)


@torch.no_grad()
def filled(
    workspace: Workspace,
    effects: Mapping[str, Sequence[Example]],
    keys: Mapping[Example, Sequence[str]],
    make: Callable[[list[Example], Sequence[str]], Tensor],
    batch_size: int,
    title: str,
    console: Console,
) -> dict[str, list[Example]]:
    """The effects' examples with `y`: what the cache holds under each one's `keys`, of which every example has equally
    many. What is missing is sampled: `make(batch, keys)` gives an image of each example, for a key of each.

    Interrupted, it goes on where it was. Several processes share the work.
    """
    missing = [e for e in keys if any(workspace.cache.read(key) is None for key in keys[e])]
    distributed.barrier()  # before any process writes, so that all see the same missing
    batches = own_batches(list(in_batches(missing, batch_size)), equally_many=workspace.config.train.shard_base)
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task(title, total=sum(len(keys[e]) for batch in batches for e in batch))
        for batch in batches:
            for drawn in zip(*(keys[e] for e in batch), strict=True):
                for key, latents in zip(drawn, make(batch, drawn).cpu(), strict=True):
                    workspace.cache.write(key, {"latents": latents.contiguous()})
                progress.advance(task, len(batch))
    distributed.barrier()
    return {
        name: [replace(e, y=tuple(_read_latents(workspace, key) for key in keys[e])) for e in examples]
        for name, examples in effects.items()
    }


def own_batches(batches: list[list[Example]], equally_many: bool) -> list[list[Example]]:
    """This process's batches. Where the base is sharded all need equally many, and what lacks at the end is made
    twice."""
    rank, world = distributed.rank(), distributed.world_size()
    end = -(-len(batches) // world) * world if equally_many else len(batches)
    return [batches[index % len(batches)] for index in range(rank, end, world)]


def _read_latents(workspace: Workspace, key: str) -> Tensor:
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

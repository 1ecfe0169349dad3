"""What `clora extend` needs of the effects that a collection holds already: they are rehearsed, and nothing but the
collection itself is needed for it.

Each old effect is dealt beside the new ones. Its examples are sources of the new effects under its own student prompt,
its targets y the collection's few-step samples of them, its teacher the frozen collection, whose samples have their
guidance in them. In TA-FM the student keeps to the velocity of teachers that sample in few steps (`FewStepTeachers`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from clora.data.cache import cache_key
from clora.data.examples import Example, collate
from clora.data.pairs import Pair
from clora.distill.networks import Models
from clora.distill.opened import Workspace
from clora.distill.roles import COLLECTION
from clora.distill.targets import base_suffix, filled, noise_seed
from clora.errors import InputError, raise_faults
from clora.inference.sampling import few_step_sampling, sample
from clora.lora.catalogue import Catalogue
from clora.method.flow import velocity_target
from clora.method.given import DistillBatch, Networks, Query, anchor_of
from clora.method.losses import velocity_loss
from clora.method.noise import DistillConfig, Draws, own_share
from clora.method.objective import Loss, noise_anchor
from clora.training import distributed

REHEARSAL_VERSION = "rehearsal/1"


def deal_names(new: Sequence[str], old: Sequence[str], share: float) -> list[str]:
    """Every name as often as it comes up in a round, so that about `share` of a round is old effects.

    The rarer kind is repeated, the other comes once: 3 new and 50 old at 0.5 are 17 times 3 and 50.
    """
    if not share or not old:
        return list(new)
    ratio = len(old) * (1 - share) / (share * len(new))  # how often a new name comes up for one of each old
    return [*new] * max(1, round(ratio)) + [*old] * max(1, round(1 / ratio))


def rehearsal_examples(workspace: Workspace, catalogue: Catalogue, console: Console) -> dict[str, list[Example]]:
    """`extend.rehearsal_sources` examples of each old effect, on the new effects' sources, dealt in turn.

    Teacher and student read the effect's student prompt, and there is no negative one. The first process encodes (its
    workspace must have kept the encoders), the others read the cache. Raises `InputErrors` for prompts that cannot be
    used.
    """
    count, pool = workspace.config.extend.rehearsal_sources, _sources(list(workspace.effects.values()))
    wanted = [
        (entry, pool[(index * count + k) % len(pool)])
        for index, entry in enumerate(catalogue.effects)
        for k in range(count)
    ]

    def encode() -> dict[str, list[Example]]:
        faults: dict[str, None] = {}  # of a prompt, once for all its sources
        found: dict[str, list[Example]] = {entry.name: [] for entry in catalogue.effects}
        for entry, sources in track(wanted, "encoding", console=console, transient=True):
            pair = Pair(sources, None, entry.prompt, entry.name, f"rehearsal of {entry.name}")
            texts = {"student": entry.prompt, "teacher": entry.prompt}
            try:
                found[entry.name].append(workspace.encoder.encode(pair, entry.name, texts))
            except InputError as error:
                faults |= dict.fromkeys(f"{pair.place}: {fault}" for fault in error.faults)
        raise_faults([*faults])
        return found

    examples = encode() if distributed.is_main() else {}
    distributed.barrier()
    return examples if distributed.is_main() else encode()


def _sources(effects: Sequence[Sequence[Example]]) -> list[tuple[Path, ...]]:
    """The distinct sources of the new effects, in turn, so that any few of them are of all effects."""
    longest = max(len(examples) for examples in effects)
    dealt = (examples[k].sources for k in range(longest) for examples in effects if k < len(examples))
    return list(dict.fromkeys(dealt))


def rehearsal_targets(
    workspace: Workspace,
    examples: Mapping[str, Sequence[Example]],
    catalogue: Catalogue,
    collection_hash: str,
    console: Console,
) -> dict[str, list[Example]]:
    """The old effects' examples with their y: what the collection, in its slot, makes of each source in its few steps;
    cached under a hash of it."""
    backbone, schedule = workspace.backbone, catalogue.schedule
    sampling = few_step_sampling(schedule.num_steps, schedule.shift, catalogue.sampler)
    how = f"{REHEARSAL_VERSION}/{collection_hash}/{schedule.num_steps}/{schedule.shift}{base_suffix(workspace)}"
    prompts = {entry.name: entry.prompt for entry in catalogue.effects}
    keys = {
        e: [cache_key(list(e.sources), prompts[name], workspace.identity, f"{how}/{e.grid}")]
        for name, pool in examples.items()
        for e in pool
    }

    def make(batch: list[Example], keys: Sequence[str]) -> Tensor:
        cond = collate(batch, "teacher", backbone.device)
        return sample(backbone, cond, [COLLECTION], sampling, [noise_seed(key) for key in keys])

    return filled(workspace, examples, keys, make, workspace.config.eval.batch_size, "rehearsal", console)


@dataclass(frozen=True)
class FewStepTeachers:
    """The velocities that stand in TA-FM's place: the collection's for an old effect, and where the models have an
    acceleration LoRA that of its teacher with it for a new one.

    Flow matching on images, be they its own samples, makes of a few-step student one of many steps: distribution
    matching has taken it elsewhere. The velocity of one that samples in few steps leaves it there, and without noise
    in the gradient, so that old effects can weigh `weight` times as much.
    """

    models: Models
    weight: float

    def anchor_loss(
        self,
        nets: Networks,
        batch: DistillBatch,
        cfg: DistillConfig,
        draws: Draws,
        sigma_dmd: Tensor | None = None,
    ) -> Loss:
        """In place of `objective.ta_fm_loss`, at the same points. A new effect without a few-step teacher keeps y."""
        anchor, draws = anchor_of(batch), draws.anchors()
        assert anchor.y is not None
        eps, query = noise_anchor(anchor.y, anchor.student_cond, cfg, draws, sigma_dmd)
        target = self.follow(query._replace(cond=anchor.teacher_cond), velocity_target(anchor.y, eps))
        effects = anchor.teacher_cond.effects
        weight = torch.tensor([self.weight if effect in self.models.resident else 1.0 for effect in effects])
        loss, _ = velocity_loss(nets.student(*query), target, weight.to(target.device))
        return own_share(loss, {"ta_fm_loss": loss.detach()}, draws)

    @torch.no_grad()
    def follow(self, query: Query, v_image: Tensor) -> Tensor:
        """The velocity (B, T, C) of each sample's few-step teacher at a query, `v_image`'s where it has none."""
        effects = query.cond.effects
        accelerated = self.models.accelerating is not None
        rows = [i for i, effect in enumerate(effects) if accelerated or effect in self.models.resident]
        slots = self.models.few_step_slots([effects[i] for i in rows])
        # One forward also where there is none to follow: processes that share the base must run equally many.
        asked = rows or [0]
        x_sigma, sigma, cond = query.x_sigma[asked], query.sigma[asked], query.cond.select(asked)
        v_teacher = self.models.backbone.velocity(x_sigma, sigma, cond, slots or [None])
        target = v_image.clone()
        target[rows] = v_teacher[: len(rows)].to(target.dtype)
        return target

"""Ways to serve an effect: what a user would do without a collection, and the collection itself (the paper's Table 1).

| method | adapters on the base | sampler |
|---|---|---|
| teacher-40 | the effect's LoRA | 40 Euler steps; `x2` where they are guided |
| teacher-8 | the effect's LoRA | 8 Euler steps |
| teacher+accel | the effect's LoRA + the acceleration LoRA (Eq. 3) | 8 consistency steps |
| joint-fm+accel | one flow-matching LoRA on all pairs + the acceleration LoRA | 8 consistency steps |
| joint-fm (student prompts)+accel | one flow-matching LoRA on the teachers' images | 8 consistency steps |
| coarse+accel | the collection's own coarse stage + the acceleration LoRA: no full stage | 8 consistency steps |
| collection | ONE distilled LoRA (Eq. 4) | 8 steps of its own sampler |

Teachers are sampled as targets are (`targets` of the configuration): by default at the base's own noise levels.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from clora.backbones.base import Backbone
from clora.config import Config, Sampler
from clora.data.examples import Example, collate
from clora.inference.sampling import Sampling, SlotsFor, few_step_sampling, sample, teacher_sampling
from clora.lora.bank import TeacherBank
from clora.lora.slots import Slot

ACCELERATION, JOINT, COLLECTION = "acceleration", "joint", "collection"
JOINT_STUDENT, COARSE = "joint_student", "coarse"


@dataclass(frozen=True)
class Method:
    """One way to serve effects. `num_loras`: what must be kept ready to serve all of them."""

    name: str
    num_loras: int
    sampling: Sampling
    role: str  # which prompt it reads
    slots_for: SlotsFor

    @property
    def nfe(self) -> int:
        """Forwards of the transformer per image."""
        return self.sampling.num_forwards


def collection_method(num_steps: int, shift: float, sampler: Sampler, role: str = "student") -> Method:
    """A collection in the slot `COLLECTION`, sampled in its own few steps."""
    return Method(COLLECTION, 1, few_step_sampling(num_steps, shift, sampler), role, lambda effects: [COLLECTION])


STACKED = {  # one LoRA on all effects, with the acceleration LoRA on top: its slot, and which prompt it reads
    "joint-fm+accel": (JOINT, "teacher"),
    "joint-fm (student prompts)+accel": (JOINT_STUDENT, "student"),
    "coarse+accel": (COARSE, "student"),
}


def methods(config: Config, bank: TeacherBank, loaded: Collection[str]) -> list[Method]:
    """The methods that can run, in the table's order. `loaded`: which of this module's slots hold their LoRA."""
    count, steps, shift = len(config.effects), config.schedule.num_steps, config.schedule.shift
    many, few = teacher_sampling(config), few_step_sampling(steps, shift)

    def stacked(effects: Sequence[str | None]) -> list[Slot]:
        return [ACCELERATION if slot is None else (slot, ACCELERATION) for slot in bank.slots_for(effects)]

    unguided = replace(many, num_steps=steps, guidance=1.0)
    found = [
        Method(f"teacher-{many.num_steps}{'x2' if many.is_guided else ''}", count, many, "teacher", bank.slots_for),
        Method(f"teacher-{steps}", count, unguided, "teacher", bank.slots_for),
    ]
    if ACCELERATION in loaded:
        found.append(Method("teacher+accel", count + 1, few, "teacher", stacked))
        for name, (slot, role) in STACKED.items():
            if slot in loaded:
                found.append(Method(name, 2, few, role, partial(_always, (slot, ACCELERATION))))
    role = "student" if config.objective.aop else "teacher"
    found.append(collection_method(steps, shift, config.schedule.sampler, role))
    return found


def _always(slot: Slot, effects: Sequence[str | None]) -> list[Slot]:
    return [slot]


def sample_examples(
    backbone: Backbone,
    method: Method,
    examples: Sequence[Example],
    seeds: Sequence[int],
    batch_size: int,
) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """Each example's place and the method's image of it, float32 (H, W, 3) in [0, 1], as soon as its batch is made.

    seeds: one per example. Batches share their sizes, so that the order may be another than the one given.
    """
    by_size: dict[object, list[int]] = {}
    for place, example in enumerate(examples):
        by_size.setdefault(example.sizes, []).append(place)
    for places in by_size.values():
        for start in range(0, len(places), batch_size):
            chosen = places[start : start + batch_size]
            batch = [examples[place] for place in chosen]
            cond = collate(batch, method.role, backbone.device)
            uncond = collate(batch, "negative", backbone.device) if method.sampling.is_guided else None
            slots, batch_seeds = method.slots_for(cond.effects), [seeds[place] for place in chosen]
            x0 = sample(backbone, cond, slots, method.sampling, batch_seeds, uncond)
            images = backbone.decode(x0, cond.grid).permute(0, 2, 3, 1).cpu().numpy()
            yield from zip(chosen, images, strict=True)

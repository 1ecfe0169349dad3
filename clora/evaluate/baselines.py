"""Ways to serve an effect: what a user would do without a collection, and the collection itself (the paper's Table 1).

| method | adapters on the base | sampler |
|---|---|---|
| teacher-40x2 | the effect's LoRA | 40 Euler steps, guided |
| teacher-8 | the effect's LoRA | 8 Euler steps |
| teacher+accel | the effect's LoRA + the acceleration LoRA (Eq. 3) | 8 consistency steps |
| joint-fm+accel | one flow-matching LoRA on all pairs + the acceleration LoRA | 8 consistency steps |
| collection | ONE distilled LoRA (Eq. 4) | 8 consistency steps |
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from clora.config import Config
from clora.inference.sampling import Method
from clora.lora.bank import TeacherBank

ACCELERATION, JOINT, COLLECTION = "acceleration", "joint", "collection"


def methods(config: Config, bank: TeacherBank, joint: bool, acceleration: bool) -> list[Method]:
    """The methods that can run, in the table's order; slots named as this module's constants must be loaded."""
    count = len(config.effects)
    few = config.schedule.num_steps

    def stacked(effects: Sequence[str | None]) -> list[Any]:
        return [ACCELERATION if slot is None else (slot, ACCELERATION) for slot in bank.slots_for(effects)]

    found = [
        Method(
            f"teacher-{config.targets.num_steps}x2",
            count,
            config.targets.num_steps,
            config.targets.guidance,
            False,
            "teacher",
            bank.slots_for,
        ),
        Method(f"teacher-{few}", count, few, 1.0, False, "teacher", bank.slots_for),
    ]
    if acceleration:
        found.append(Method("teacher+accel", count + 1, few, 1.0, True, "teacher", stacked))
    if joint and acceleration:
        found.append(Method("joint-fm+accel", 2, few, 1.0, True, "teacher", lambda effects: [(JOINT, ACCELERATION)]))
    role = "student" if config.objective.aop else "teacher"
    found.append(Method("collection", 1, few, 1.0, True, role, lambda effects: [COLLECTION]))
    return found

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

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from clora.backbones.cond import Cond
from clora.backbones.qwen_image.backbone import QwenImageBackbone
from clora.config import Config
from clora.data.examples import Example, collate
from clora.distill.targets import guided_teacher_velocity
from clora.lora.bank import TeacherBank
from clora.method.flow import few_step_sigmas
from clora.method.samplers import few_step_sample, ode_sample

ACCELERATION, JOINT, COLLECTION = "acceleration", "joint", "collection"
SlotsFor = Callable[[Sequence[str | None]], Sequence[Any]]


@dataclass(frozen=True)
class Method:
    """How one method samples. `num_loras` is what must be kept ready to serve all effects."""

    name: str
    num_loras: int
    num_steps: int
    guidance: float  # 1: one forward a step
    consistency: bool
    role: str  # which prompt it reads
    slots_for: SlotsFor

    @property
    def nfe(self) -> int:
        """Forwards of the transformer per image."""
        return self.num_steps * (1 if self.guidance == 1.0 else 2)


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


@torch.no_grad()
def sample_method(
    backbone: QwenImageBackbone,
    config: Config,
    method: Method,
    batch: Sequence[Example],
    seeds: Sequence[int],
) -> Tensor:
    """Images (B, 3, H, W) in [0, 1] of one batch of examples (equal sizes), one seed per sample."""
    shape = (batch[0].num_tokens, backbone.token_channels)
    cond = collate(batch, method.role, backbone.device)
    if method.consistency:
        sigmas = few_step_sigmas(method.num_steps, config.schedule.shift)
        slots = method.slots_for(cond.effects)

        def velocity(x_BTC: Tensor, sigma_B: Tensor, given: Cond) -> Tensor:
            return backbone.velocity(x_BTC, sigma_B, given, slots)

        x0 = few_step_sample(velocity, cond, shape, sigmas, seeds, backbone.device)
    else:
        guided = guided_teacher_velocity(backbone, method.slots_for, method.guidance, config.objective.guidance_rescale)
        both = (cond, collate(batch, "negative", backbone.device))
        shift = config.schedule.shift
        x0 = ode_sample(guided, both, shape, method.num_steps, shift, seeds, backbone.device)
    return backbone.decode(x0, batch[0].grid)

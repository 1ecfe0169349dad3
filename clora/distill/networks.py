"""Student, critic and teachers of a step as velocities: adapters of one frozen base."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from clora.backbones.base import Backbone
from clora.backbones.cond import Cond, cat_conds
from clora.distill.roles import CRITIC, STUDENT
from clora.lora.bank import TeacherBank
from clora.lora.slots import Slot
from clora.method.flow import Velocity
from clora.method.given import Networks, Query


@dataclass(frozen=True)
class Models:
    """The base with its adapters. `bank` holds the effects' teachers; None without effects.

    student: the slots that add up to it. joining: those that join it after the coarse stage. resident: effects whose
    teacher is not in the bank but in a slot that is always there. accelerating: a frozen slot that makes few-step
    teachers of the teachers, and of the base.
    """

    backbone: Backbone
    bank: TeacherBank | None
    student: tuple[str, ...] = (STUDENT,)
    joining: tuple[str, ...] = ()
    resident: Mapping[str, str] = field(default_factory=dict)
    accelerating: str | None = None

    def networks(self, joined: bool, joint: bool) -> Networks:
        """The velocities of a step, with what joins the student if `joined`. The teacher reads a sample's effect from
        its cond. `joint`: critic and teacher answer in one forward."""
        return Networks(
            student=self._velocity((*self.student, *self.joining) if joined else self.student),
            critic=self._velocity(CRITIC),
            teacher=self._teach,
            cat_conds=cat_conds,
            scores=self._score if joint else None,
            few_step_teacher=None if self.accelerating is None else self._teach_few_steps,
        )

    def teacher_slots(self, effects: Sequence[str | None]) -> list[Slot]:
        """The slot of each sample's teacher, None (the base) for None; the bank loads what is missing."""
        banked = [effect for effect in effects if effect not in self.resident]
        slots: Iterable[Slot] = [None] * len(banked) if self.bank is None else self.bank.slots_for(banked)
        found = iter(slots)
        return [
            next(found) if effect is None or effect not in self.resident else self.resident[effect]
            for effect in effects
        ]

    def few_step_slots(self, effects: Sequence[str | None]) -> list[Slot]:
        """The same with the accelerating slot on top, if any; a resident teacher samples in few steps already."""
        return [
            slot if self.accelerating is None or effect in self.resident else joined(slot, self.accelerating)
            for effect, slot in zip(effects, self.teacher_slots(effects), strict=True)
        ]

    def prefetch(self, effects: Sequence[str | None]) -> None:
        """Fetch the teachers of the batches to come, in their order, while other work goes on."""
        if self.bank is not None:
            self.bank.prefetch([effect for effect in effects if effect not in self.resident])

    def _velocity(self, slot: Slot) -> Velocity:
        def velocity(x_sigma: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
            return self.backbone.velocity(x_sigma, sigma, cond, [slot])

        return velocity

    def _teach(self, x_sigma: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
        return self.backbone.velocity(x_sigma, sigma, cond, self.teacher_slots(cond.effects))

    def _teach_few_steps(self, x_sigma: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
        return self.backbone.velocity(x_sigma, sigma, cond, self.few_step_slots(cond.effects))

    def _score(self, critic: Query, teacher: Query) -> tuple[Tensor, Tensor]:
        sizes = [len(critic.x_sigma), len(teacher.x_sigma)]
        v_critic, v_teacher = self.backbone.velocity(
            torch.cat([critic.x_sigma, teacher.x_sigma]),
            torch.cat([critic.sigma, teacher.sigma]),
            cat_conds([critic.cond, teacher.cond]),
            [CRITIC] * sizes[0] + self.teacher_slots(teacher.cond.effects),
        ).split(sizes)
        return v_critic, v_teacher


def joined(slot: Slot, other: str) -> Slot:
    """A teacher's slot with another on top; None is the base."""
    if slot is None:
        return other
    assert isinstance(slot, str)
    return (slot, other)

"""One distillation step on a real backbone: student, critic and teachers as adapters of one base (Sec. 4).

`Distiller` turns a step number into a batch (stream, effects and samples are functions of seed and step), the three
velocities into `objective.Networks`, and the losses into updates. The order of a step is the paper's: the critic
follows the student for `critic_updates` updates, then the student moves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from clora.backbones.cond import Cond, cat_conds
from clora.backbones.qwen_image import QwenImageBackbone
from clora.config import Config
from clora.data.examples import Example, collate
from clora.errors import InputError
from clora.loop import Group, apply_gradients, check_finite, lr_factor
from clora.objective import DistillBatch, Networks, critic_loss, ta_fm_loss, total_loss
from clora.routing import Stream, draw_effects, draw_stream, step_generator
from clora.teachers import TeacherBank

STUDENT, CRITIC = "student", "critic"


@dataclass
class Distiller:
    """Everything one step needs. `effects` maps each name to its examples; `general` may be empty at p_switch 1."""

    config: Config
    backbone: QwenImageBackbone
    bank: TeacherBank | None
    effects: dict[str, list[Example]]
    general: list[Example]
    student: Group
    critic: Group
    _names: list[str] = field(init=False)

    def __post_init__(self) -> None:
        self._names = list(self.effects)
        if not self._names and not self.general:
            raise InputError("nothing to distil: give effects, general data, or both")

    def networks(self) -> Networks:
        """Student, critic and teachers as velocities; the teacher reads each sample's effect from its cond."""

        def student(x_sigma: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
            return self.backbone.velocity(x_sigma, sigma, cond, [STUDENT])

        def critic(x_sigma: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
            return self.backbone.velocity(x_sigma, sigma, cond, [CRITIC])

        def teacher(x_sigma: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
            slots: Sequence[Any] = [None] if self.bank is None else self.bank.slots_for(cond.effects)
            return self.backbone.velocity(x_sigma, sigma, cond, slots)

        return Networks(student, critic, teacher, cat_conds)

    def stream(self, step: int) -> Stream:
        """The stream of `step` (Eq. 9); the only one there is when effects or general data are missing."""
        if not self._names:
            return "general"
        if not self.general:
            return "effect"
        return draw_stream(self.config.seed, step, self.config.objective.p_switch)

    def batch(self, step: int, stream: Stream) -> DistillBatch:
        """The samples of `step`, collated on the device."""
        train = self.config.train
        if stream == "general":
            examples = self._draw_examples(step, "general", [None] * train.batch_size)
            anchors: list[Example] = []
        else:
            size = max(train.batch_size, train.anchor_batch_size or 0)
            p_switch = self.config.objective.p_switch if self.general else 1.0
            drawn = draw_effects(self.config.seed, step, len(self._names), size, p_switch)
            names = [self._names[i] for i in drawn]
            picked = self._draw_examples(step, "effect", names)
            examples, anchors = picked[: train.batch_size], picked if train.anchor_batch_size else []
        return self._collate(step, stream, examples, anchors)

    def _draw_examples(self, step: int, purpose: str, names: Sequence[str | None]) -> list[Example]:
        """One example for each name, all of one grid (a batch has one size): the first draw decides the grid."""
        rng = step_generator(self.config.seed, step, f"examples/{purpose}", "cpu")
        picked: list[Example] = []
        for name in names:
            pool = self.general if name is None else self.effects[name]
            same = pool if not picked else [e for e in pool if e.sizes == picked[0].sizes]
            if not same:  # this effect has nothing in that size: it waits for another step
                continue
            picked.append(same[int(torch.randint(len(same), (), generator=rng))])
        return picked

    def _collate(
        self, step: int, stream: Stream, examples: list[Example], anchors: list[Example]
    ) -> DistillBatch:
        device, aop = self.backbone.device, self.config.objective.aop
        student_text = "student" if aop else "teacher"
        y = _targets(examples, step, self.config.seed, device) if stream == "effect" else None
        guided = self.config.objective.guidance != 1.0
        return DistillBatch(
            stream=stream,
            student_cond=collate(examples, student_text, device),
            teacher_cond=collate(examples, "teacher", device),
            uncond=collate(examples, "negative", device) if guided else None,
            latent_shape=(examples[0].grid[0] * examples[0].grid[1], self.backbone.token_channels),
            batch_size=len(examples),
            effects=[example.effect for example in examples],
            step=step,
            y=y,
            anchor_y=_targets(anchors, step, self.config.seed, device) if anchors else None,
            anchor_cond=collate(anchors, student_text, device) if anchors else None,
        )

    def coarse_step(self, step: int) -> dict[str, Tensor]:
        """The coarse stage: TA-FM alone (Eq. 6), on effect batches; no critic, no teacher."""
        batch = self.batch(step, "effect")
        rng = step_generator(self.config.seed, step, "student", self.backbone.device)
        loss, figures = ta_fm_loss(self.networks(), batch, self.config, rng)
        self._update(self.student, loss, step, batch)
        return figures

    def full_step(self, step: int) -> dict[str, Tensor]:
        """`critic_updates` updates of the critic, then one of the student on the total loss (Eq. 9)."""
        stream = self.stream(step)
        nets, figures = self.networks(), {}
        updates = self.config.train.critic_updates
        for k in range(updates):
            # Each critic update sees samples of its own; none of them is a step of the student.
            batch = self.batch(self.config.train.max_train_steps + step * updates + k, stream)
            rng = step_generator(self.config.seed, step, f"critic/{k}", self.backbone.device)
            loss, critic_figures = critic_loss(nets, batch, self.config, rng)
            self._update(self.critic, loss, step, batch)
            figures.update(critic_figures)
        batch = self.batch(step, stream)
        rng = step_generator(self.config.seed, step, "student", self.backbone.device)
        loss, student_figures = total_loss(nets, batch, self.config, rng)
        figures["grad_norm"] = torch.tensor(self._update(self.student, loss, step, batch))
        return figures | {f"{stream}/{name}": value for name, value in student_figures.items()}

    def step(self, step: int) -> dict[str, Tensor]:
        """One step of training, coarse or full."""
        coarse = step < self.config.train.coarse_steps and self._names
        return self.coarse_step(step) if coarse else self.full_step(step)

    def start_critic(self) -> None:
        """Start the critic from the student: called when the coarse stage ends, so that it does not lag."""
        with torch.no_grad():
            for key, value in self.critic.parameters.items():
                value.copy_(self.student.parameters[key])

    def _update(self, group: Group, loss: Tensor, step: int, batch: DistillBatch) -> float:
        name = STUDENT if group is self.student else CRITIC
        where = f"step {step} ({name}, {batch.stream} stream, effects {_named(batch.effects)})"
        check_finite(loss, where).backward()
        train = self.config.train
        total = train.max_train_steps * (1 if name == STUDENT else train.critic_updates)
        factor = lr_factor(group.updates, total, train.lr_warmup_steps, train.lr_scheduler)
        return apply_gradients(group, factor, where)


def _named(effects: Sequence[str | None]) -> str:
    return ", ".join(sorted({effect or "base" for effect in effects}))


def _targets(examples: list[Example], step: int, seed: int, device: torch.device) -> Tensor:
    """One of each example's target images (several noises per source), stacked (B, T, C)."""
    rng = step_generator(seed, step, "targets", "cpu")
    chosen = []
    for example in examples:
        if example.y is None:
            raise InputError(
                f"effect {example.effect}: no target images; run `clora cache` or let `clora train` make them"
            )
        chosen.append(example.y[int(torch.randint(len(example.y), (), generator=rng))])
    return torch.stack(chosen).to(device, torch.float32)

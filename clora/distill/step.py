"""One distillation step on a real backbone: student, critic and teachers as adapters of one base (Sec. 4).

`Distiller` turns a step number into a batch (stream, effects and samples are functions of seed and step), the three
velocities into `objective.Networks`, and the losses into updates. The order of a step is the paper's: the critic
follows the student for `critic_updates` updates, then the student moves.

A batch is shared by the processes that train together: each draws the whole of it and takes its rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby, islice
from typing import Any

import torch
from torch import Tensor

from clora.backbones.base import Backbone
from clora.backbones.cond import Cond, cat_conds
from clora.config import Config
from clora.data.examples import Example, collate
from clora.distill.roles import ACCELERATION, COLLECTION, CRITIC, STUDENT, Role
from clora.errors import InputError
from clora.lora.bank import TeacherBank
from clora.lora.slots import Slot
from clora.method.noise import Draws, Rows, split_rows
from clora.method.objective import (
    Backward,
    CriticSample,
    DistillBatch,
    Networks,
    critic_loss,
    critic_samples,
    student_sample,
    ta_fm_loss,
    total_loss,
)
from clora.method.routing import Stream, draw_effects, draw_stream, step_generator
from clora.training import distributed
from clora.training.lr_schedule import lr_multiplier, student_lr_multiplier
from clora.training.optimizer import AdamW, apply_gradients, check_finite

# Up to so many tokens what needs not wait for each other shares a forward, which is faster there
# (`bench.training.joint`): a forward of few tokens mostly reads the weights.
JOINT_TOKENS = 1024
BackwardOf = Callable[[DistillBatch], Backward]
# From the number of a batch and of all batches of an update to the figures; the third argument takes the gradients.
LossOf = Callable[[int, int, BackwardOf], dict[str, Tensor]]
BatchRows = tuple[Rows, Rows | None]  # of the batch, of the anchors where there are any


@dataclass
class Distiller:
    """Everything one step needs. `effects` maps each name to its examples; `general` may be empty at p_switch 1.

    `accelerated`: the backbone has an `ACCELERATION` slot, trained with the student from the first full step on.
    `deal`: the effects' names as often as each is to come up in a round; left out, once each. `rehearsed`: those whose
    one teacher the student was before, and is to stay. `extended`: the student is an adapter on top of the frozen
    `COLLECTION`, of which the critic has a copy. `accelerated_teachers`: TA-FM follows the velocity of teachers with
    the frozen `ACCELERATION`. `joint_tokens`: most tokens of a forward that is shared, `math.inf` where every forward
    has to fetch the weights from other processes.
    """

    config: Config
    backbone: Backbone
    bank: TeacherBank | None
    effects: dict[str, list[Example]]
    general: list[Example]
    student: AdamW
    critic: AdamW
    accelerated: bool = False
    deal: Sequence[str] = ()
    rehearsed: frozenset[str] = frozenset()
    extended: bool = False
    accelerated_teachers: bool = False
    joint_tokens: float = JOINT_TOKENS
    _names: list[str] = field(init=False)
    _tokens: int = field(init=False)  # of the largest sample: result, references and text

    def __post_init__(self) -> None:
        self._names = list(self.deal or self.effects)
        if not self._names and not self.general:
            raise InputError("nothing to distil: give effects, general data, or both")
        examples = [*self.general, *(example for pool in self.effects.values() for example in pool)]
        images = max(e.num_tokens + sum(height * width for height, width in e.ref_grids) for e in examples)
        self._tokens = images + max(len(text) for e in examples for text in e.texts.values())

    @property
    def coarse_steps(self) -> int:
        """Steps of TA-FM alone; none without effects."""
        return self.config.train.coarse_steps if self._names else 0

    def networks(self, step: int) -> Networks:
        """Student, critic and teachers of `step` as velocities; the teacher reads a sample's effect from its cond."""
        below = (COLLECTION,) if self.extended else ()
        joined = (ACCELERATION,) if self.accelerated and step >= self.coarse_steps else ()
        student_slot = (*below, STUDENT, *joined)

        def student(x_sigma: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
            return self.backbone.velocity(x_sigma, sigma, cond, [student_slot])

        def critic(x_sigma: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
            return self.backbone.velocity(x_sigma, sigma, cond, [CRITIC])

        def teacher(x_sigma: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
            slots: Sequence[Any] = [None] if self.bank is None else self.bank.slots_for(cond.effects)
            return self.backbone.velocity(x_sigma, sigma, cond, slots)

        def scores(x_sigma: Tensor, sigma: Tensor, student_cond: Cond, teacher_conds: list[Cond]) -> list[Tensor]:
            conds, count = cat_conds([student_cond, *teacher_conds]), 1 + len(teacher_conds)
            taught = [None] * len(x_sigma) if self.bank is None else self.bank.slots_for(teacher_conds[0].effects)
            slots: list[Slot] = [CRITIC] * len(x_sigma) + [*taught] * len(teacher_conds)
            v = self.backbone.velocity(x_sigma.repeat(count, 1, 1), sigma.repeat(count), conds, slots)
            return list(v.chunk(count))

        return Networks(
            student,
            critic,
            teacher,
            cat_conds,
            scores=scores if self._at_once(3) == 3 else None,
            anchor=self._anchor if self.rehearsed or self.accelerated_teachers else None,
        )

    def _at_once(self, batches: int) -> int:
        """How many of so many batches may share a forward."""
        return int(min(batches, self.joint_tokens / (self.config.train.batch_size * self._tokens)))

    @torch.no_grad()
    def _anchor(
        self, y: Tensor, eps: Tensor, x_sigma: Tensor, sigma: Tensor, teacher_cond: Cond
    ) -> tuple[Tensor, Tensor]:
        """The x0 whose flow-matching target is the velocity of a few-step teacher, and each sample's weight.

        Flow matching on images, be they its own samples, makes of a few-step student one of many steps: distribution
        matching has taken it elsewhere. The velocity of one that samples in few steps leaves it there, and without
        noise in the gradient, so that rehearsed effects can weigh `extend.rehearsal_weight` times as much. For those it
        is the collection; for new effects their teacher with the acceleration LoRA, and y stays where there is none.
        """
        assert self.bank is not None
        known = [effect in self.rehearsed for effect in teacher_cond.effects]
        if self.accelerated_teachers:
            taught = zip(known, self.bank.slots_for(teacher_cond.effects), strict=True)
            slots: Sequence[Slot] = [slot if old or slot is None else (slot, ACCELERATION) for old, slot in taught]
        else:
            slots = self.bank.slots_for([min(self.rehearsed)])
        # All samples go through it, because processes that share the base must run equally many forwards.
        v_teacher = self.backbone.velocity(x_sigma, sigma, teacher_cond, slots)
        old = torch.tensor(known, device=y.device).view(-1, 1, 1)
        weight = torch.where(old, self.config.extend.rehearsal_weight, 1.0)
        return torch.where(old | self.accelerated_teachers, eps - v_teacher, y), weight

    def stream(self, step: int) -> Stream:
        """The stream of `step` (Eq. 9); the only one there is when effects or general data are missing."""
        if not self._names:
            return "general"
        if not self.general:
            return "effect"
        return draw_stream(self.config.seed, step, self.config.objective.p_switch)

    def batch(
        self, step: int, stream: Stream, role: Role, part: int = 0, parts: int = 1
    ) -> tuple[DistillBatch, BatchRows]:
        """This process's samples of `step` on the device, and which rows of the whole batch they are.

        It is batch number `part` of the `parts` that `role` needs there. Every role deals its effects from a sequence
        of its own, so that each of them sees the effects evenly.
        """
        examples, anchors = self._samples(step, stream, role, part, parts)
        rows = split_rows(len(examples), distributed.rank(), distributed.world_size())
        anchor_rows = split_rows(len(anchors), distributed.rank(), distributed.world_size()) if anchors else None
        return self._collate(step, stream, examples, anchors, (rows, anchor_rows)), (rows, anchor_rows)

    def teachers(self, step: int) -> list[str | None]:
        """The effects whose teachers this process asks at `step`, in the order of its batches; none where the base is
        the teacher, or there is no step."""
        train, objective, stream = self.config.train, self.config.objective, self.stream(step)
        no_teacher = stream == "general" or objective.dmd_ts_weight == objective.dmd_bs_weight == 0
        if no_teacher or not self.coarse_steps <= step < train.max_train_steps:
            return []
        found: list[str | None] = []
        for part in range(train.gradient_accumulation_steps):
            examples, _ = self._samples(step, stream, "student", part, train.gradient_accumulation_steps)
            rows = split_rows(len(examples), distributed.rank(), distributed.world_size())
            found += [example.effect for example in examples[rows.start : rows.stop]]
        return found

    def _samples(
        self, step: int, stream: Stream, role: Role, part: int, parts: int
    ) -> tuple[list[Example], list[Example]]:
        """The examples of a whole batch, and of TA-FM's own where it has one."""
        train, world = self.config.train, distributed.world_size()
        size, anchor_size = world * train.batch_size, world * (train.anchor_batch_size or 0)
        if stream == "general":
            return self._draw_examples(step, f"{role}/{part}", [None] * size), []
        if role == "coarse":
            return self._draw_effects(step, role, part, parts, anchor_size or size, p_switch=1.0), []
        p_switch = self.config.objective.p_switch if self.general else 1.0
        anchors: list[Example] = []
        if role == "student" and anchor_size:
            anchors = self._draw_effects(step, "anchor", part, parts, anchor_size, p_switch)
        return self._draw_effects(step, role, part, parts, size, p_switch), anchors

    def _draw_effects(self, step: int, role: Role, part: int, parts: int, size: int, p_switch: float) -> list[Example]:
        drawn = draw_effects(
            self.config.seed, step, len(self._names), size, p_switch, purpose=role, part=part, parts=parts
        )
        return self._draw_examples(step, f"{role}/{part}", [self._names[i] for i in drawn])

    def _draw_examples(self, step: int, purpose: str, names: Sequence[str | None]) -> list[Example]:
        """One example for each name, all of one size (a batch has one): the first draw decides."""
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
        self, step: int, stream: Stream, examples: list[Example], anchors: list[Example], batch_rows: BatchRows
    ) -> DistillBatch:
        device, aop = self.backbone.device, self.config.objective.aop
        student_text = "student" if aop else "teacher"
        seed = self.config.seed
        rows, anchor_rows = batch_rows
        y = _targets(examples, rows, step, seed, device) if stream == "effect" else None
        anchor_y = None if anchor_rows is None else _targets(anchors, anchor_rows, step, seed, device)
        examples = examples[rows.start : rows.stop]
        anchors = [] if anchor_rows is None else anchors[anchor_rows.start : anchor_rows.stop]
        guided = self.config.objective.guidance != 1.0
        return DistillBatch(
            stream=stream,
            student_cond=collate(examples, student_text, device),
            teacher_cond=collate(examples, "teacher", device),
            uncond=collate(examples, "negative", device) if guided else None,
            latent_shape=(examples[0].num_tokens, self.backbone.token_channels),
            batch_size=len(examples),
            samples=[f"{example.effect or 'base'} on {example.sources[-1].name}" for example in examples + anchors],
            step=step,
            y=y,
            anchor_y=anchor_y,
            anchor_cond=collate(anchors, student_text, device) if anchors else None,
            anchor_teacher_cond=collate(anchors, "teacher", device) if anchors else None,
        )

    def coarse_step(self, step: int) -> dict[str, Tensor]:
        """The coarse stage: TA-FM alone (Eq. 6), on effect batches; no critic, no teacher."""

        def loss_of(part: int, parts: int, backward_of: BackwardOf) -> dict[str, Tensor]:
            batch, rng = self._drawn(step, "effect", "coarse", part, parts)
            loss, figures = ta_fm_loss(self.networks(step), batch, self.config, rng)
            backward_of(batch)(loss)
            return figures

        return self._update(self.student, loss_of, step)

    def full_step(self, step: int) -> dict[str, Tensor]:
        """`critic_updates` updates of the critic, then one of the student on the total loss (Eq. 9).

        Each critic update sees samples of its own; with `critic_reuse` the last one takes the student's, which stays
        what it was until its own update: a rollout less. Meanwhile the next step's teachers are fetched.
        """
        if self.bank is not None:
            self.bank.prefetch([*self.teachers(step), *self.teachers(step + 1)])
        stream, nets, updates = self.stream(step), self.networks(step), self.config.train.critic_updates
        # By number of the student's batch: what was made of it for the critic already.
        shared: dict[int, tuple[DistillBatch, Draws, Tensor]] = {}

        reuse = self.config.train.critic_reuse
        critics = self._critic_batches(step, stream, nets, updates - reuse)

        def critic_loss_of(part: int, parts: int, backward_of: BackwardOf, k: int) -> dict[str, Tensor]:
            if reuse and k == updates - 1:
                batch, student_rng = self._drawn(step, stream, "student", part, parts)
                x0 = student_sample(nets, batch, self.config, student_rng)
                shared[part] = batch, student_rng, x0
                generator = step_generator(self.config.seed, step, f"critic/{k}/{part}", self.backbone.device)
                rng, sample = replace(student_rng, generator=generator), CriticSample(x0, False)
            else:
                batch, rng, sample = next(critics)
            loss, figures = critic_loss(nets, batch, self.config, rng, sample)
            backward_of(batch)(loss)
            return figures

        def student_loss_of(part: int, parts: int, backward_of: BackwardOf) -> dict[str, Tensor]:
            x0 = None
            if part in shared:
                batch, rng, x0 = shared.pop(part)
            else:
                batch, rng = self._drawn(step, stream, "student", part, parts)
            return total_loss(nets, batch, self.config, rng, backward_of(batch), x0)[1]

        figures: dict[str, Tensor] = {}
        for k in range(updates):
            figures |= self._update(self.critic, partial(critic_loss_of, k=k), step)
        student_figures = self._update(self.student, student_loss_of, step)
        return figures | {f"{stream}/{name}": value for name, value in student_figures.items()}

    def _critic_batches(
        self, step: int, stream: Stream, nets: Networks, updates: int
    ) -> Iterator[tuple[DistillBatch, Draws, CriticSample]]:
        """The batches of the critic's first `updates` updates in order, with the student's samples for them.

        The student stays what it is meanwhile, so that batches of one size can roll out together.
        """
        parts = self.config.train.gradient_accumulation_steps
        total = self.config.train.critic_updates * parts
        drawn = (
            self._drawn(step, stream, "critic", k * parts + part, total, f"critic/{k}/{part}")
            for k in range(updates)
            for part in range(parts)
        )
        for _, group in groupby(drawn, key=lambda one: (one[0].student_cond.grid, one[0].student_cond.ref_grids)):
            while some := list(islice(group, max(1, self._at_once(total)))):
                batches, rngs = zip(*some, strict=True)
                yield from zip(batches, rngs, critic_samples(nets, batches, self.config, rngs), strict=True)

    def _drawn(
        self, step: int, stream: Stream, role: Role, part: int, parts: int, purpose: str | None = None
    ) -> tuple[DistillBatch, Draws]:
        """A batch with the random numbers of `purpose` (else ROLE/PART) for it."""
        batch, rows = self.batch(step, stream, role, part, parts)
        generator = step_generator(self.config.seed, step, purpose or f"{role}/{part}", self.backbone.device)
        return batch, Draws(generator, *rows)

    def step(self, step: int) -> dict[str, Tensor]:
        """One step of training, coarse or full. The critic starts where the coarse stage left the student."""
        if step < self.coarse_steps:
            return self.coarse_step(step)
        if step == self.coarse_steps > 0:
            self._start_critic()
        return self.full_step(step)

    def _start_critic(self) -> None:
        """The student's ranks are the critic's last ones; below them it has the collection, where there is one."""
        start, values = self.student.fp32_parameters(), self.critic.fp32_parameters()
        for key, value in values.items():
            own, dim = start[key.replace(CRITIC, STUDENT, 1)], 1 if key.endswith(".A") else 2
            value.narrow(dim, value.shape[dim] - own.shape[dim], own.shape[dim]).copy_(own)
        self.critic.assign(values)

    def _update(self, group: AdamW, loss_of: LossOf, step: int) -> dict[str, Tensor]:
        """One update of `group` over `gradient_accumulation_steps` batches; the figures are those of the last."""
        name = STUDENT if group is self.student else CRITIC
        parts = self.config.train.gradient_accumulation_steps
        where = ""
        figures: dict[str, Tensor] = {}

        def backward_of(batch: DistillBatch) -> Backward:
            nonlocal where
            where = f"step {step} ({name}, {batch.stream} stream: {', '.join(sorted(batch.samples))})"
            return lambda loss: (check_finite(loss, where) / parts).backward()

        for part in range(parts):
            figures = loss_of(part, parts, backward_of)
        train, coarse = self.config.train, self.coarse_steps
        if group is self.student:
            factor = student_lr_multiplier(train, coarse, step)
        else:
            updates = (train.max_train_steps - coarse) * train.critic_updates
            factor = lr_multiplier(group.updates, updates, train.lr_warmup_steps, train.lr_scheduler)
        norm = apply_gradients(group, factor, where)
        return distributed.sum_figures(figures) | {f"{name}_grad_norm": torch.tensor(norm)}


def _targets(examples: list[Example], rows: Rows, step: int, seed: int, device: torch.device) -> Tensor:
    """One of the target images (several noises per source) of each example of `rows`, stacked (B, T, C)."""
    rng = step_generator(seed, step, "targets", "cpu")
    chosen = []
    for example in examples:
        if not example.y:
            raise InputError(
                f"effect {example.effect}: no target images; run `clora cache` or let `clora train` make them"
            )
        chosen.append(example.y[int(torch.randint(len(example.y), (), generator=rng))])
    return torch.stack(chosen[rows.start : rows.stop]).to(device, torch.float32)

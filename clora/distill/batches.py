"""Which samples a step sees: streams, effects, examples and their random numbers, as functions of seed and step.

A batch is shared by the processes that train together: each draws the whole of it and takes its rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from clora.config import Config
from clora.data.examples import Example, collate
from clora.distill.roles import Role
from clora.errors import InputError
from clora.method.given import Anchor, DistillBatch
from clora.method.noise import Draws, Rows, split_rows
from clora.method.routing import Stream, draw_effects, draw_stream, step_generator
from clora.training import distributed

Drawn = tuple[DistillBatch, Draws]


@dataclass(frozen=True)
class Batches:
    """The samples of a run. `effects` maps each name to its examples; `general` may be empty at p_switch 1.

    An example without a "negative" text is not guided. `channels` are a token's. `deal`: the effects' names as often
    as each is to come up in a round; None, once each.
    """

    config: Config
    effects: Mapping[str, Sequence[Example]]
    general: Sequence[Example]
    device: torch.device
    channels: int
    deal: Sequence[str] | None = None

    def __post_init__(self) -> None:
        if not self.effects and not self.general:
            raise InputError("nothing to distil: give effects, general data, or both")

    @cached_property
    def names(self) -> list[str]:
        """The effects of a round."""
        return list(self.effects if self.deal is None else self.deal)

    @cached_property
    def tokens(self) -> int:
        """Of the largest sample: result, references and text."""
        examples = [*self.general, *(example for pool in self.effects.values() for example in pool)]
        images = max(e.num_tokens + sum(height * width for height, width in e.ref_grids) for e in examples)
        return images + max(len(text) for e in examples for text in e.texts.values())

    @property
    def coarse_steps(self) -> int:
        """Steps without a critic; none without effects."""
        return self.config.train.coarse_steps if self.names else 0

    def stream(self, step: int) -> Stream:
        """The stream of `step` (Eq. 9); the only one there is when effects or general data are missing."""
        if not self.names:
            return "general"
        if not self.general:
            return "effect"
        return draw_stream(self.config.seed, step, self.config.objective.p_switch)

    def of_student(self, step: int, stream: Stream, role: Role = "student") -> Iterator[Drawn]:
        """The batches of the student's update, in the coarse stage those of role "coarse"."""
        parts = self.config.train.gradient_accumulation_steps
        return (self.draw(step, stream, role, part, parts) for part in range(parts))

    def of_critic(self, step: int, stream: Stream, updates: int) -> Iterator[Drawn]:
        """The batches of the critic's first `updates` updates, in order."""
        parts = self.config.train.gradient_accumulation_steps
        total = self.config.train.critic_updates * parts
        for k in range(updates):
            for part in range(parts):
                yield self.draw(step, stream, "critic", k * parts + part, total, critic_purpose(k, part))

    def draw(
        self, step: int, stream: Stream, role: Role, part: int = 0, parts: int = 1, purpose: str | None = None
    ) -> Drawn:
        """This process's samples of `step` on the device, with the random numbers of `purpose` (else ROLE/PART).

        They are batch number `part` of the `parts` that `role` needs there. Every role deals its effects from a
        sequence of its own, so that each of them sees the effects evenly.
        """
        examples, anchors = self._examples(step, stream, role, part, parts)
        rows, anchor_rows = _own_rows(examples), _own_rows(anchors) if anchors else None
        draws = Draws(self.generator(step, purpose or f"{role}/{part}"), rows, anchor_rows)
        return self._collate(step, stream, f"{role}/{part}", examples, anchors, draws), draws

    def generator(self, step: int, purpose: str) -> torch.Generator:
        """The random numbers of a purpose at `step`, on the device."""
        return step_generator(self.config.seed, step, purpose, self.device)

    def teachers(self, step: int) -> list[str | None]:
        """The effects whose teachers this process asks at `step`, in the order of its batches; none where the base is
        the teacher, nobody asks one, or there is no step."""
        train, objective, stream = self.config.train, self.config.objective, self.stream(step)
        found = list[Example]()
        if step < min(self.coarse_steps, train.max_train_steps):
            for part in range(train.gradient_accumulation_steps if train.coarse_target == "velocity" else 0):
                examples, _ = self._examples(step, "effect", "coarse", part, train.gradient_accumulation_steps)
                found += _of_rows(examples, _own_rows(examples))
            return [example.effect for example in found]
        if stream == "general" or step >= train.max_train_steps:
            return []
        matched = bool(objective.dmd_ts_weight or objective.dmd_bs_weight)
        for part in range(train.gradient_accumulation_steps):
            examples, anchors = self._examples(step, stream, "student", part, train.gradient_accumulation_steps)
            if objective.imitation_weight:
                found += _of_rows(anchors or examples, _own_rows(anchors or examples))
            if matched:
                found += _of_rows(examples, _own_rows(examples))
        return [example.effect for example in found]

    def _examples(
        self, step: int, stream: Stream, role: Role, part: int, parts: int
    ) -> tuple[list[Example], list[Example]]:
        """The examples of a whole batch, and of TA-FM's own where it has one."""
        train, world = self.config.train, distributed.world_size()
        size, anchor_size = world * train.batch_size, world * (train.anchor_batch_size or 0)
        if stream == "general":
            return self._pick(step, f"{role}/{part}", [None] * size), []
        if role == "coarse":
            return self._deal(step, role, part, parts, anchor_size or size, p_switch=1.0), []
        p_switch = self.config.objective.p_switch if self.general else 1.0
        anchors: list[Example] = []
        if role == "student" and anchor_size:
            anchors = self._deal(step, "anchor", part, parts, anchor_size, p_switch)
        return self._deal(step, role, part, parts, size, p_switch), anchors

    def _deal(self, step: int, role: Role, part: int, parts: int, size: int, p_switch: float) -> list[Example]:
        """The examples of the next `size` effects of the role's decks."""
        dealt = draw_effects(
            self.config.seed, step, len(self.names), size, p_switch, purpose=role, part=part, parts=parts
        )
        return self._pick(step, f"{role}/{part}", [self.names[i] for i in dealt])

    def _pick(self, step: int, purpose: str, names: Sequence[str | None]) -> list[Example]:
        """One example for each name, all of one size (a batch has one): the first draw decides."""
        rng = step_generator(self.config.seed, step, f"examples/{purpose}", "cpu")
        picked: list[Example] = []
        for name in names:
            pool = self.general if name is None else self.effects[name]
            same = pool if not picked else [e for e in pool if e.sizes == picked[0].sizes]
            if not same:  # it loses its turn: effects that share no size with others are seen less often
                continue
            picked.append(same[int(torch.randint(len(same), (), generator=rng))])
        return picked

    def _collate(
        self, step: int, stream: Stream, part: str, examples: list[Example], anchors: list[Example], draws: Draws
    ) -> DistillBatch:
        """This process's rows on the device. `part`: whose part of the step they are, ROLE/PART."""
        student_role = "student" if self.config.objective.aop else "teacher"
        own, y = _of_rows(examples, draws.rows), None
        if stream == "effect":
            y = self._draw_targets(step, part, examples, draws.rows)
        own_anchors, anchor = [], None
        if draws.anchor_rows is not None:
            own_anchors = _of_rows(anchors, draws.anchor_rows)
            y_anchors = self._draw_targets(step, f"anchor/{part}", anchors, draws.anchor_rows)
            anchor = Anchor(y_anchors, **self._conds(own_anchors, student_role))
        return DistillBatch(
            stream=stream,
            **self._conds(own, student_role),
            latent_shape=(own[0].num_tokens, self.channels),
            batch_size=len(own),
            samples=[f"{example.effect or 'base'} on {example.sources[-1].name}" for example in own + own_anchors],
            step=step,
            y=y,
            anchor=anchor,
        )

    def _conds(self, own: list[Example], student_role: str) -> dict[str, Any]:
        """What student and teacher read, and those of the samples that are guided without their condition."""
        guided = [i for i, e in enumerate(own) if "negative" in e.texts] if self.config.objective.guidance != 1 else []
        return {
            "student_cond": collate(own, student_role, self.device),
            "teacher_cond": collate(own, "teacher", self.device),
            "uncond": collate([own[i] for i in guided], "negative", self.device) if guided else None,
            "guided": guided,
        }

    def _draw_targets(self, step: int, part: str, examples: list[Example], rows: Rows) -> Tensor:
        """One of the target images (several noises per source) of each example of `rows`, stacked (B, T, C). Each part
        of a step draws its own."""
        rng = step_generator(self.config.seed, step, f"targets/{part}", "cpu")
        chosen = []
        for example in examples:
            if not example.y:
                raise InputError(
                    f"effect {example.effect}: no target images; run `clora cache` or let `clora train` make them"
                )
            chosen.append(example.y[int(torch.randint(len(example.y), (), generator=rng))])
        return torch.stack(chosen[rows.start : rows.stop]).to(self.device, torch.float32)


def critic_purpose(update: int, part: int) -> str:
    """What the random numbers of one of the critic's batches are drawn for."""
    return f"critic/{update}/{part}"


def _own_rows(examples: Sequence[Example]) -> Rows:
    return split_rows(len(examples), distributed.rank(), distributed.world_size())


def _of_rows(examples: Sequence[Example], rows: Rows) -> list[Example]:
    return list(examples[rows.start : rows.stop])

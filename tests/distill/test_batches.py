"""Which samples a step sees: texts by role, targets and effects of the right sample, one size, rows of a process."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from clora.config import build_config
from clora.data.examples import Example
from clora.distill.batches import Batches
from clora.distill.roles import Role
from clora.errors import InputError
from clora.training import distributed

NAMES = ("red", "green", "blue")
ROLES = ("student", "teacher", "negative")
CPU = torch.device("cpu")


def text_of(effect: str | None, role: str) -> float:
    """The constant that an effect's text of a role is made of."""
    return 10.0 * (NAMES.index(effect) + 1 if effect else 0) + ROLES.index(role)


def example(effect: str | None, number: int, height: int = 2) -> Example:
    """Texts are constants by effect and role, references and y by effect and number."""
    place = 10.0 * (NAMES.index(effect) + 1 if effect else 0) + number
    return Example(
        effect,
        (Path(f"{number}.png"),),
        (height, 2),
        (torch.full((height * 2, 4), place),),
        ((height, 2),),
        {role: torch.full((3, 5), text_of(effect, role)) for role in ROLES},
        y=() if effect is None else (torch.full((height * 2, 4), place),),
        key=(effect, str(number)),
    )


def make_batches(*overrides: str, general: bool = True, **fields: Any) -> Batches:
    values = {
        "preset": "clora",
        "base": "tiny",
        "output_dir": "unused",
        "train": {"batch_size": 4, "anchor_batch_size": 6, "coarse_steps": 5, "max_train_steps": 60},
    }
    config = build_config(values, overrides=overrides)
    pool = {name: [example(name, number) for number in range(4)] for name in NAMES}
    return Batches(
        **{
            "config": config,
            "effects": pool,
            "general": [example(None, number) for number in range(4)] if general else [],
            "device": CPU,
            "channels": 4,
            **fields,
        }
    )


def steps_of(batches: Batches, stream: str, count: int) -> list[int]:
    return list(islice((step for step in range(1000) if batches.stream(step) == stream), count))


def constants(text_BLD: Tensor) -> list[float]:
    assert all(bool((row == row[0, 0]).all()) for row in text_BLD)
    return text_BLD[:, 0, 0].tolist()


@pytest.mark.parametrize("aop", [True, False])
@pytest.mark.parametrize(
    ("role", "stream"),
    [("coarse", "effect"), ("student", "effect"), ("critic", "effect"), ("student", "general"), ("critic", "general")],
)
def test_draw_gives_every_network_its_own_prompt(role: Role, stream: Any, aop: bool) -> None:
    """Eq. 5: student and critic read the student's prompt (the teacher's without AOP), the teacher its own."""
    batches = make_batches(f"objective.aop={aop}")
    for step in steps_of(batches, stream, 3):
        batch, _ = batches.draw(step, stream, role)
        effects = batch.student_cond.effects
        student_role = "student" if aop else "teacher"
        assert constants(batch.student_cond.text_BLD) == [text_of(effect, student_role) for effect in effects]
        assert constants(batch.teacher_cond.text_BLD) == [text_of(effect, "teacher") for effect in effects]
        assert batch.uncond is not None
        assert constants(batch.uncond.text_BLD) == [text_of(effect, "negative") for effect in effects]
        assert batch.teacher_cond.effects == batch.uncond.effects == effects
        assert (None in effects) == (stream == "general")
        if (role, stream) == ("student", "effect"):
            assert batch.anchor is not None
            of_anchor = batch.anchor.student_cond.effects
            assert constants(batch.anchor.student_cond.text_BLD) == [text_of(e, student_role) for e in of_anchor]
            assert constants(batch.anchor.teacher_cond.text_BLD) == [text_of(e, "teacher") for e in of_anchor]
        else:
            assert batch.anchor is None


def test_draw_keeps_each_samples_target_reference_and_effect_together() -> None:
    batches = make_batches()
    for step in steps_of(batches, "effect", 10):
        batch, draws = batches.draw(step, "effect", "student")
        assert batch.anchor is not None and draws.anchor_rows is not None
        assert (batch.batch_size, draws.rows.total, draws.anchor_rows.total) == (4, 4, 6)
        for y, cond in ((batch.y, batch.teacher_cond), (batch.anchor.y, batch.anchor.teacher_cond)):
            assert y is not None and y.shape[1:] == batch.latent_shape == (4, 4)
            assert torch.equal(y, cond.refs[0])
            assert [NAMES[int(row[0, 0] // 10) - 1] for row in y] == list(cond.effects)
        assert batch.y is not None
        effects = batch.teacher_cond.effects
        names = [f"{e} on {int(row[0, 0] % 10)}.png" for row, e in zip(batch.y, effects, strict=True)]
        assert list(batch.samples[:4]) == names and len(batch.samples) == 10


def test_draw_without_guidance_has_no_negative_prompt() -> None:
    batches = make_batches("objective.guidance=1")
    batch, _ = batches.draw(steps_of(batches, "effect", 1)[0], "effect", "student")
    assert batch.uncond is None and batch.guided == []


def test_draw_guides_only_samples_with_a_negative_prompt() -> None:
    batches = make_batches()
    without = [
        replace(e, texts={role: text for role, text in e.texts.items() if role != "negative"})
        for e in batches.effects["green"]
    ]
    batches = replace(batches, effects={**batches.effects, "green": without})
    seen = set()
    for step in steps_of(batches, "effect", 20):
        batch, _ = batches.draw(step, "effect", "critic")
        guided = [i for i, effect in enumerate(batch.teacher_cond.effects) if effect != "green"]
        assert batch.guided == guided and batch.uncond is not None
        assert batch.uncond.effects == tuple(batch.teacher_cond.effects[i] for i in guided)
        assert constants(batch.uncond.text_BLD) == [text_of(e, "negative") for e in batch.uncond.effects]
        seen.add(len(guided))
    assert {2, 3} <= seen
    alone = replace(batches, effects={"green": without})
    batch, _ = alone.draw(0, "effect", "critic")
    assert batch.guided == [] and batch.uncond is None


def test_draw_of_all_processes_is_the_whole_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes with half the batch each see what one sees, in order, and draw from equal generators."""
    one = make_batches()
    two = make_batches("train.batch_size=2", "train.anchor_batch_size=3")
    for step in steps_of(one, "effect", 4):
        whole, whole_draws = one.draw(step, "effect", "student")
        parts = []
        for rank in range(2):
            monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
            monkeypatch.setattr(distributed, "world_size", lambda: 2)
            parts.append(two.draw(step, "effect", "student"))
        monkeypatch.undo()
        for read in (
            lambda batch: batch.y,
            lambda batch: batch.anchor.y,
            lambda batch: batch.student_cond.text_BLD,
            lambda batch: batch.anchor.teacher_cond.text_BLD,
        ):
            assert torch.equal(torch.cat([read(batch) for batch, _ in parts]), read(whole))
        for _, draws in parts:
            assert draws.rows.total == 4 and draws.rows.share == 0.5
            assert torch.equal(draws.generator.get_state(), whole_draws.generator.get_state())


def test_teachers_are_those_of_the_students_batches() -> None:
    batches = make_batches("train.gradient_accumulation_steps=2", "train.coarse_target=images")
    for step in range(5, 60):
        stream = batches.stream(step)
        asked = [e for batch, _ in batches.of_student(step, stream) for e in batch.teacher_cond.effects]
        assert batches.teachers(step) == ([] if stream == "general" else asked)
    assert batches.teachers(steps_of(batches, "effect", 1)[0]) == []  # of the coarse stage
    assert all(batches.teachers(step) == [] for step in range(60, 70))
    following = make_batches("train.gradient_accumulation_steps=2", "train.coarse_target=velocity")
    for step in range(5):
        asked = [e for batch, _ in following.of_student(step, "effect", "coarse") for e in batch.teacher_cond.effects]
        assert following.teachers(step) == asked and len(asked) == 2 * 6
    assert following.teachers(6) == batches.teachers(6)
    assert make_batches("objective.dmd_ts_weight=0", "objective.dmd_bs_weight=0", general=False).teachers(6) == []


def test_teachers_include_those_that_are_imitated() -> None:
    imitating = ("objective.imitation_weight=1", "objective.dmd_ts_weight=0", "objective.dmd_bs_weight=0")
    batches = make_batches(*imitating)
    step = next(step for step in range(5, 60) if batches.stream(step) == "effect")
    batch, _ = batches.draw(step, "effect", "student")
    assert batch.anchor is not None
    assert batches.teachers(step) == list(batch.anchor.teacher_cond.effects)
    both = make_batches("objective.imitation_weight=1")
    wanted = [*batch.anchor.teacher_cond.effects, *batch.teacher_cond.effects]
    assert both.teachers(step) == wanted
    assert make_batches(*imitating[1:], "objective.imitation_weight=0").teachers(step) == []


def test_batches_of_an_update_have_samples_and_numbers_of_their_own() -> None:
    batches = make_batches("train.gradient_accumulation_steps=2", "train.critic_updates=3")
    step = steps_of(batches, "effect", 1)[0]
    drawn = [*batches.of_critic(step, "effect", 3), *batches.of_student(step, "effect")]
    assert len(drawn) == 8
    first = {float(torch.rand((), generator=draws.generator)) for _, draws in drawn}
    assert len(first) == 8
    # The critic's six batches of four deal each of three effects eight times.
    dealt = Counter(effect for batch, _ in drawn[:6] for effect in batch.teacher_cond.effects)
    assert dealt == dict.fromkeys(NAMES, 8)
    again = [*batches.of_critic(step, "effect", 3)]
    for (one, _), (other, _) in zip(drawn[:6], again, strict=True):
        assert one.samples == other.samples


def test_draw_gives_every_part_of_a_step_targets_of_its_own() -> None:
    """`targets.per_source` > 1: which of an image's noises is drawn differs between roles, parts and TA-FM's batch."""
    batches = make_batches("train.gradient_accumulation_steps=2", "train.critic_updates=1", general=False)
    noises = tuple(torch.full((4, 4), float(k)) for k in range(100))
    batches = replace(batches, effects={n: [replace(e, y=noises) for e in p] for n, p in batches.effects.items()})
    drawn = [*batches.of_critic(0, "effect", 1), *batches.of_student(0, "effect")]
    ys = [batch.y for batch, _ in drawn] + [batch.anchor.y[:4] for batch, _ in drawn if batch.anchor is not None]
    assert len(ys) == 6 == len({tuple(y[:, 0, 0].tolist()) for y in ys if y is not None})


def test_deal_says_how_often_an_effect_comes_up() -> None:
    batches = make_batches(general=False, deal=["red", "red", "red", "blue"])
    counts = Counter(
        effect for step in range(10) for effect in batches.draw(step, "effect", "critic")[0].teacher_cond.effects
    )
    assert counts == {"red": 30, "blue": 10}
    assert make_batches().names == list(NAMES)


def test_draw_has_one_size_only() -> None:
    batches = make_batches(general=False)
    tall = {name: [*pool, example(name, 8, height=3)] for name, pool in batches.effects.items() if name != "blue"}
    batches = replace(batches, effects={**tall, "blue": batches.effects["blue"]})
    grids = set()
    for step in range(40):
        batch, draws = batches.draw(step, "effect", "critic")
        assert batch.y is not None and batch.y.shape[1] == batch.latent_shape[0]
        assert draws.rows.total == batch.batch_size == len(batch.samples)
        if batch.student_cond.grid == (3, 2):
            assert "blue" not in batch.student_cond.effects
        grids.add(batch.student_cond.grid)
    assert grids == {(2, 2), (3, 2)}
    assert batches.tokens == 6 + 6 + 3  # of the tall ones: result, reference, text


def test_streams_without_the_other_kind_of_data() -> None:
    effects, general = make_batches(general=False), make_batches(effects={})
    assert {effects.stream(step) for step in range(20)} == {"effect"}
    assert {general.stream(step) for step in range(20)} == {"general"}
    assert (effects.coarse_steps, general.coarse_steps) == (5, 0)
    with pytest.raises(InputError, match="nothing to distil"):
        make_batches(general=False, effects={})


def test_draw_says_which_effect_has_no_targets() -> None:
    batches = make_batches(general=False)
    lacking = {name: [replace(e, y=()) for e in pool] for name, pool in batches.effects.items()}
    with pytest.raises(InputError, match=r"effect (red|green|blue): no target images; run `clora cache`"):
        replace(batches, effects=lacking).draw(0, "effect", "student")

"""Asymmetric orthogonal prompting: triggers, student prompts, composition, and writing them to a file."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import clora.method.prompts as prompts
from clora.config import EffectConfig, build_config
from clora.errors import InputError
from clora.method.prompts import (
    RARE_WORDS,
    compose_prompts,
    effect_prompts,
    make_trigger,
    make_triggers,
    student_prompt,
    template_prompt,
)


def effect(name: str, **values: str) -> EffectConfig:
    return EffectConfig.model_validate({"name": name, "prompt": "change the style", **values})


def test_make_trigger_has_the_form_of_table_6() -> None:
    trigger = make_trigger("1117_chongwushouzhi", 0)
    assert re.fullmatch(r"<1117_chongwushouzhi_[A-Za-z0-9]{6}>", trigger)
    assert trigger == make_trigger("1117_chongwushouzhi", 0)
    others = {make_trigger(name, seed, draw=draw) for name in "ab" for seed in (0, 1) for draw in (0, 1)}
    assert len(others) == 8


def test_make_trigger_rare_is_two_different_words() -> None:
    drawn = [make_trigger(f"e{index}", 3, "rare").split("-") for index in range(300)]
    assert all(len(words) == 2 and words[0] != words[1] and set(words) <= set(RARE_WORDS) for words in drawn)
    assert len({words[0] for words in drawn}) > len(RARE_WORDS) // 2
    assert len(set(RARE_WORDS)) == len(RARE_WORDS)


@settings(max_examples=30)
@given(
    st.lists(st.from_regex(r"[a-z][a-z0-9]{0,3}", fullmatch=True), min_size=1, max_size=60, unique=True),
    st.integers(0, 2**40),
    st.sampled_from(["random", "rare"]),
)
def test_make_triggers_are_unique_and_in_order(names: list[str], seed: int, scheme: prompts.Scheme) -> None:
    effects = [effect(name) for name in names]
    triggers = make_triggers(effects, seed, scheme)
    assert list(triggers) == names
    assert len({trigger.casefold() for trigger in triggers.values()}) == len(names)


def test_make_triggers_redraws_after_a_collision() -> None:
    taken = make_trigger("b", 5, "rare")
    triggers = make_triggers([effect("a", trigger=taken.upper()), effect("b")], 5, "rare")
    assert triggers == {"a": taken.upper(), "b": make_trigger("b", 5, "rare", draw=1)}


def test_make_triggers_leaves_alone_what_others_have() -> None:
    alone = make_triggers([effect("b")], 5, "rare")["b"]
    assert make_triggers([effect("b")], 5, "rare", others=[alone.upper()])["b"] == prompts.make_trigger(
        "b", 5, "rare", 1
    )
    assert make_triggers([effect("b", trigger=alone)], 5, "rare", others=[alone]) == {"b": alone}


def test_make_triggers_says_when_no_words_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts, "RARE_WORDS", ("a", "b"))
    assert set(make_triggers([effect("x"), effect("y")], 0, "rare").values()) == {"a-b", "b-a"}
    with pytest.raises(InputError, match="trigger_scheme=random"):
        make_triggers([effect("x"), effect("y"), effect("z")], 0, "rare")


def test_student_prompt_joins_trigger_and_text() -> None:
    assert student_prompt("<a_Xy5995>", "Transform it.") == "<a_Xy5995>Transform it."  # as in Table 6
    assert student_prompt("idem-thence", "Transform it.") == "idem-thence Transform it."
    assert student_prompt("<a_Xy5995>", "<a_Xy5995>Transform it.") == "<a_Xy5995>Transform it."
    assert student_prompt("", "Transform it.") == "Transform it."


def test_compose_prompts_is_the_papers_sentence() -> None:
    expected = "Please apply <a_1>Turn it red to the input image, and then apply <b_2>Add a hat."
    assert compose_prompts("<a_1>Turn it red.", " <b_2>Add a hat. ") == expected


def test_template_prompt_uses_what_the_effect_has() -> None:
    assert template_prompt(effect("a")) == "change the style."
    assert template_prompt(effect("a", criteria="It is red!")) == "change the style. It is red!"
    assert template_prompt(effect("a", prompt="two\n  lines\n")) == "two lines."
    assert template_prompt(effect("a", criteria="x", student_prompt="As written")) == "As written"


def test_effect_prompts_follow_from_the_configuration() -> None:
    effects = [{"name": "a", "prompt": "p"}, {"name": "b", "prompt": "q", "trigger": "TT", "student_prompt": "own"}]
    config = build_config({"output_dir": "o", "seed": 4, "effects": effects})
    first, second = effect_prompts(config)
    assert (first.teacher_prompt, first.student_prompt) == ("p", make_trigger("a", 4) + "p.")
    assert (second.student_prompt, second.origin) == ("TT own", "config")
    off = effect_prompts(build_config({"output_dir": "o", "effects": effects}, ".", ["objective.aop=false"]))
    assert [(prompt.trigger, prompt.student_prompt) for prompt in off] == [("", "p"), ("", "q")]

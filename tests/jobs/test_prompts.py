"""`clora prompts`: triggers and student prompts written to a file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

import clora.jobs.prompts as prompts
from clora.config import Config, EffectConfig, build_config, load_config
from clora.errors import InputErrors
from clora.jobs.prompts import ImagePairs, write_prompts
from clora.method.prompts import effect_prompts, make_trigger


def no_pairs(config: Config, effect: EffectConfig) -> ImagePairs:
    raise AssertionError("images are not needed without an endpoint")


def test_write_prompts_offline_writes_effects_that_load_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (
        "output_dir: out\nseed: 9\neffects:\n"
        "- {name: a, prompt: p, lora: loras/a.safetensors, pairs: ../pairs/a, criteria: c}\n"
        "- {name: b, prompt: q, student_prompt: own words}\n"
    )
    (tmp_path / "conf").mkdir()
    path = tmp_path / "conf" / "config.yaml"
    path.write_text(text)
    config = load_config(path)
    monkeypatch.setattr(prompts, "example_pairs", no_pairs)
    written = write_prompts(config)
    assert [prompt.origin for prompt in written] == ["template", "config"]
    output = tmp_path / "conf" / "out" / "effects.jsonl"
    again = load_config(path, ["effects=out/effects.jsonl"])
    assert effect_prompts(again) != effect_prompts(config)  # the origin is now the file ...
    assert [p.student_prompt for p in effect_prompts(again)] == [p.student_prompt for p in effect_prompts(config)]
    assert [e.trigger for e in again.effects] == [make_trigger("a", 9), make_trigger("b", 9)]
    assert [(e.lora, e.pairs, e.criteria) for e in again.effects] == [
        (tmp_path / "conf/loras/a.safetensors", tmp_path / "pairs/a", "c"),
        (None, None, None),
    ]
    assert len(output.read_text().splitlines()) == 2


def test_write_prompts_asks_the_model_only_where_it_can_and_must(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked: list[tuple[str, list[object]]] = []

    def rewrite(prompt: str, images: list[Image.Image], *_: object, **__: object) -> str:
        asked.append((prompt, [image.getpixel((0, 0)) for image in images]))
        return f"rewritten {prompt}"

    def pairs(config: Config, effect: EffectConfig) -> ImagePairs:
        made = [(Image.new("RGB", (2, 2), (i, 0, 0)), Image.new("RGB", (2, 2), (i, 9, 0))) for i in range(3)]
        return made[:1] if effect.name == "lonely" else made

    monkeypatch.setattr(prompts, "rewrite_prompt", rewrite)
    monkeypatch.setattr(prompts, "example_pairs", pairs)
    effects = [
        {"name": "given", "prompt": "p", "student_prompt": "own"},
        {"name": "shown", "prompt": "q"},
        {"name": "lonely", "prompt": "r"},
    ]
    values = {"output_dir": "o", "effects": effects, "prompts": {"endpoint": "http://127.0.0.1:9/v1"}}
    written = write_prompts(build_config(values, tmp_path), tmp_path / "e.jsonl")
    assert asked == [("q", [(0, 0, 0), (0, 9, 0), (1, 0, 0), (1, 9, 0)])]
    assert [(p.text, p.origin) for p in written] == [
        ("own", "config"), ("rewritten q", "vision model"), ("r.", "template")
    ]  # fmt: skip
    rows = [json.loads(line) for line in (tmp_path / "e.jsonl").read_text().splitlines()]
    assert rows[1]["student_prompt"] == "rewritten q" and rows[1]["trigger"] == written[1].trigger
    assert "'lonely' has no two pairs" in caplog.text


def test_write_prompts_lists_every_failure_and_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(config: Config, effect: EffectConfig) -> ImagePairs:
        raise InputErrors([f"{effect.name}.png is gone", "and more"])

    effects = [{"name": name, "prompt": "p"} for name in ("a", "b")]
    values = {"output_dir": "o", "effects": effects, "prompts": {"endpoint": "http://127.0.0.1:9/v1"}}
    monkeypatch.setattr(prompts, "example_pairs", broken)
    with pytest.raises(InputErrors) as caught:
        write_prompts(build_config(values, tmp_path))
    assert caught.value.faults == [
        "effect 'a': a.png is gone", "effect 'a': and more", "effect 'b': b.png is gone", "effect 'b': and more"
    ]  # fmt: skip
    assert not (tmp_path / "o" / "effects.jsonl").exists()

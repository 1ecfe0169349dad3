"""groups: similarities against their definitions, groups balanced and without improving swaps, files that load."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from clora.cli import commands as cli
from clora.config import Config, build_config, load_config
from clora.errors import InputError
from clora.evaluate.router import text_similarity
from clora.inference.edit_plan import EditRequest, with_collection
from clora.jobs.plan_groups import NUM_LAYERS, plan_groups, spread, teacher_similarity, write_groups
from clora.lora.catalogue import Catalogue, CatalogueEntry, CatalogueSchedule, write_collection
from clora.lora.files import write_lora
from clora.lora.groups import find_collection
from clora.lora.module import LoraModule
from clora.method.prompts import effect_prompts
from clora.tiny.effects import EFFECTS


def random_teacher(seed: int, rank: int, names: list[str], alpha: float = 1.0) -> dict[str, LoraModule]:
    rng = torch.Generator().manual_seed(seed)
    return {
        name: LoraModule(torch.randn(rank, 12, generator=rng), torch.randn(10, rank, generator=rng), alpha)
        for name in names
    }


def test_teacher_similarity_is_the_cosine_of_the_updates(tmp_path: Path) -> None:
    names = [f"transformer_blocks.{i}.attn.to_q" for i in range(7)]
    first, other = random_teacher(0, 3, names), random_teacher(1, 5, names[1:])
    # A near twin of another scale and layout.
    twin = {name: LoraModule(m.A + 0.3 * torch.randn(3, 12), m.B, 9.0) for name, m in first.items()}
    paths: list[Path | None] = []
    for index, modules in enumerate((first, other, twin)):
        paths.append(tmp_path / f"{index}.safetensors")
        write_lora(paths[-1], modules, layout="kohya" if index == 2 else "comfyui", dtype=torch.float32)  # type: ignore[arg-type]
    found = teacher_similarity([*paths, None])
    common = names[1:]
    chosen = [common[round(k * 5 / (NUM_LAYERS - 1))] for k in range(NUM_LAYERS)]
    updates = [torch.cat([m[name].B.double() @ m[name].A.double() for name in chosen]) for m in (first, other, twin)]
    for i, j in combinations(range(3), 2):
        cosine = float(torch.nn.functional.cosine_similarity(updates[i].flatten(), updates[j].flatten(), dim=0))
        assert found[i, j] == found[j, i] == pytest.approx(max(cosine, 0), abs=1e-6)
    assert found[0, 2] > 0.8 and not found[3].any() and not found.diagonal().any()
    assert not teacher_similarity([None, None]).any()


@given(st.integers(1, 14), st.integers(1, 4), st.integers(0, 100))
def test_spread_is_balanced_and_no_swap_helps(n: int, num_groups: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    similarity = np.round(rng.random((n, n)), 1)
    similarity = np.maximum(similarity, similarity.T)
    groups = spread(similarity, min(n, num_groups))
    assert groups == spread(similarity, min(n, num_groups))
    assert sorted(i for group in groups for i in group) == list(range(n))
    assert max(map(len, groups)) - min(map(len, groups)) <= 1

    def total(parts: list[list[int]]) -> float:
        return sum(float(similarity[i, j]) ** 2 for part in parts for i, j in combinations(part, 2))

    best = total(groups)
    for a, b in combinations(range(len(groups)), 2):
        for i in groups[a]:
            for j in groups[b]:
                parts = [list(group) for group in groups]
                parts[a][parts[a].index(i)], parts[b][parts[b].index(j)] = j, i
                assert total(parts) >= best - 1e-6


def test_spread_parts_the_tiny_worlds_twins_as_far_as_possible() -> None:
    """Effects of one teacher prompt are dealt evenly: no group has two more of them than another."""
    names = list(EFFECTS)
    prompts = [EFFECTS[name].prompt for name in names]
    similarity = text_similarity(prompts)
    groups = spread(similarity, 3)
    for prompt in set(prompts):
        counts = [sum(prompts[i] == prompt for i in group) for group in groups]
        assert max(counts) - min(counts) <= 1, prompt


def config_of(folder: Path, *overrides: str) -> Config:
    prompts = {"oil": "paint it in oil", "ink": "draw it in ink", "oil2": "paint it in oils", "snow": "let it snow"}
    values: dict[str, Any] = {
        "base": "tiny",
        "output_dir": "out",
        "effects": [{"name": name, "prompt": prompt, "pairs": name} for name, prompt in prompts.items()],
    }
    return build_config(values, folder, overrides)


def test_write_groups_configs_load_with_their_triggers(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    taught = config.teacher_path(config.effects[0])
    taught.parent.mkdir(parents=True)
    write_lora(taught, random_teacher(0, 2, ["transformer_blocks.0.attn.to_q"]))
    plan = plan_groups(config, 2)
    assert len(plan.groups) == 2
    assert not any({"oil", "oil2"} <= {plan.names[i] for i in group} for group in plan.groups)
    path = write_groups(config, plan, tmp_path / "groups")
    groups = json.loads(path.read_text())["groups"]
    whole = {prompt.name: prompt for prompt in effect_prompts(config)}
    for number, group in enumerate(groups, 1):
        loaded = load_config(path.parent / group["config"])
        assert [effect.name for effect in loaded.effects] == group["effects"]
        assert loaded.output_dir / "collection.safetensors" == path.parent / group["collection"]
        assert {p.name: p for p in effect_prompts(loaded)} == {name: whole[name] for name in group["effects"]}
        assert loaded.train == config.train and loaded.preset == config.preset and number <= 2
        for effect in loaded.effects:
            assert effect.pairs == tmp_path / effect.name
            assert effect.lora == (taught if effect.name == "oil" else None)


def test_write_groups_keeps_the_nulls_that_presets_have_values_for(tmp_path: Path) -> None:
    nulls = ("student.acceleration", "targets.acceleration", "targets.max_sources", "schedule.step_counts",
             "train.anchor_batch_size", "train.coarse_learning_rate", "general")  # fmt: skip
    config = config_of(tmp_path, *(f"{key}=null" for key in nulls))
    path = write_groups(config, plan_groups(config, 2), tmp_path / "groups")
    loaded = load_config(path.parent / "group_1.yaml")
    for section in ("student", "targets", "schedule", "train", "general", "objective", "extend"):
        assert getattr(loaded, section) == getattr(config, section), section


def test_plan_groups_needs_effects_and_may_find_one_group(tmp_path: Path) -> None:
    assert plan_groups(config_of(tmp_path), 100).groups == [[0, 1, 2, 3]]
    single = plan_groups(config_of(tmp_path), 1)
    assert single.groups == [[0], [1], [2], [3]] and single.to_json()[0]["closest"] == []
    with pytest.raises(InputError, match="effects: is empty"):
        plan_groups(build_config({"base": "tiny", "output_dir": "out"}, tmp_path), 100)


def test_edit_picks_the_collection_by_effect(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    path = write_groups(config, plan_groups(config, 2), tmp_path / "groups")
    for group in json.loads(path.read_text())["groups"]:
        file = path.parent / group["collection"]
        file.parent.mkdir()
        entries = [CatalogueEntry(name=name, trigger=f"<{name}>", student_prompt="x") for name in group["effects"]]
        schedule = CatalogueSchedule(num_steps=2, shift=3.0)
        modules = random_teacher(0, 2, ["transformer_blocks.0.attn.to_q"])
        write_collection(file, modules, Catalogue(base="tiny", schedule=schedule, effects=entries))
        for name in group["effects"]:
            request = EditRequest(images=(), output=tmp_path, lora=path, effects=(name,))
            assert with_collection(request).lora == file == find_collection(path, [name])
        assert find_collection(path, group["effects"]) == file
    with pytest.raises(
        InputError, match=r"oil, oil2 are in different collections of .*groups.json; apply them in turn"
    ):
        find_collection(path, ["oil", "oil2"])
    with pytest.raises(InputError, match="effect 'sno' is in no group of .*; did you mean 'snow'"):
        find_collection(path, ["sno"])
    with pytest.raises(InputError, match="holds several collections; name an effect, or give one of group_1/"):
        find_collection(path, [])


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("[", "is no JSON"),
        ('{"base": "tiny", "groups": []}', "groups: List should have at least 1 item"),
        (
            '{"base": "t", "groups": [{"config": "a", "collection": "b", "effects": ["x", "x"]}]}',
            "more than one group: x",
        ),
    ],
)
def test_find_collection_refuses_other_files(tmp_path: Path, text: str, fault: str) -> None:
    (tmp_path / "groups.json").write_text(text)
    with pytest.raises(InputError, match=fault):
        find_collection(tmp_path / "groups.json", ["x"])


def test_command_writes_and_prints(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(json.dumps(config_of(tmp_path).model_dump(mode="json")))
    result = CliRunner().invoke(cli.app, ["plan-groups", str(file), "--max-effects", "2", "--json"])
    answer = json.loads(result.stdout)
    assert result.exit_code == 0 and answer["output"] == str(tmp_path / "out" / "groups" / "groups.json")
    assert sorted(name for group in answer["groups"] for name in group["effects"]) == ["ink", "oil", "oil2", "snow"]
    table = CliRunner().invoke(cli.app, ["plan-groups", str(file), "--output", str(tmp_path / "one")])
    assert table.exit_code == 0 and (tmp_path / "one" / "group_1.yaml").is_file()

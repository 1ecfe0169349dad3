"""Teaching with pairs of several sizes, several references, and captions of their own."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from rich.console import Console

import clora.jobs.teach as teaching
from clora.config import Config, build_config
from clora.data.examples import Example, collate, group_by_size
from clora.distill.check import check_teaching
from clora.distill.opened import Workspace
from clora.distill.workspace import open_workspace
from clora.errors import InputError
from clora.jobs.teach import Batch, draw_batch, teach
from clora.lora.adapters import Adapters
from clora.lora.files import read_lora
from clora.method.routing import step_generator
from clora.training.tracker import read_log
from tests.support import processes
from tests.support.small_job import job_values

# (width, height) of an effect's pictures, and its references: the second and the third are of other shapes.
EFFECTS = {"square": ((64, 64), 1), "wide": ((96, 48), 2), "tall": ((48, 96), 3)}
RATIOS = [[1, 1], [2, 1], [1, 2]]
QUIET = Console(quiet=True)
STEPS = 3


def write_effect(folder: Path, sizes: Sequence[tuple[int, int]], references: int = 1, captions: bool = False) -> None:
    """A pair of each size, and its references as DiffSynth lists them: the picture to edit is the last."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(len(folder.name) + references)
    rows = []
    for i, (width, height) in enumerate(sizes):
        pixels = rng.integers(0, 255, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"s{i}.png")
        Image.fromarray(255 - pixels).save(folder / f"t{i}.png")
        styles = [f"style{k}.png" for k in range(references - 1)]
        rows.append({"edit_image": [*styles, f"s{i}.png"], "image": f"t{i}.png"})
        if captions and i:
            rows[-1]["prompt"] = f"make picture {i} negative"
    for k in range(references - 1):
        side = rng.integers(0, 255, (48, 64 + 32 * k, 3), dtype=np.uint8)
        Image.fromarray(side).save(folder / f"style{k}.png")
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def configure(base: Path, data: Path, out: Path, names: Sequence[str], *overrides: str) -> Config:
    values = job_values(base, data, out, effects=False) | {
        "effects": [{"name": n, "prompt": f"turn it {n}", "pairs": str(data / n)} for n in names]
    }
    del values["general"]
    values["objective"] = {"p_switch": 1.0}
    values["train"] |= {"buckets": {"max_area": 4096, "multiple": 8, "aspect_ratios": RATIOS}}
    values["teach"] |= {"max_train_steps": STEPS}
    return build_config(values, out.parent, overrides)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for name, (size, references) in EFFECTS.items():
        write_effect(folder / name, [size] * 3, references)
    write_effect(folder / "mixed", [(64, 64), (96, 48), (48, 96), (64, 64)])
    write_effect(folder / "told", [(64, 64)] * 4, captions=True)
    return folder


class Recorder:
    """Keeps what a run drew, and replays one effect's part of it in a run of that effect alone."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.batches: list[Batch] = []
        self.start: dict[str, torch.Tensor] = {}
        self._patch = monkeypatch
        self._group = teaching.trainable_group

    def record(self) -> None:
        def drawn(workspace: Workspace, examples: list[Example], step: int) -> Batch:
            self.batches.append(draw_batch(workspace, examples, step))
            return self.batches[-1]

        def group(adapters: Adapters, *more: Any, **options: Any) -> Any:
            self.start = {name: value.detach().clone() for name, value in adapters.named_parameters("teach").items()}
            return self._group(adapters, *more, **options)

        self._patch.setattr(teaching, "draw_batch", drawn)
        self._patch.setattr(teaching, "trainable_group", group)

    def replay(self, effect: str, index: int) -> None:
        def drawn(workspace: Workspace, examples: list[Example], step: int) -> Batch:
            whole = self.batches[step]
            own = [i for i, example in enumerate(whole.examples) if example.effect == effect]
            known = {(e.sources, e.grid): e for e in workspace.effects[effect]}
            same = [known[whole.examples[i].sources, whole.examples[i].grid] for i in own]
            assert len(same) == len(examples)
            return Batch(same, [whole.dropped[i] for i in own], whole.sigma[own], [whole.eps[i] for i in own])

        def group(adapters: Adapters, *more: Any, **options: Any) -> Any:
            for name, value in adapters.named_parameters("teach").items():
                value.data.copy_(self.start[name][index : index + 1])
            return self._group(adapters, *more, **options)

        self._patch.setattr(teaching, "draw_batch", drawn)
        self._patch.setattr(teaching, "trainable_group", group)


@pytest.mark.slow
def test_teach_of_three_sizes_and_one_to_three_references_equals_each_alone(
    random_base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forwards: list[list[Example]] = []

    def seen(examples: Sequence[Example], *more: Any) -> Any:
        forwards.append(list(examples))
        return collate(examples, *more)

    recorder = Recorder(monkeypatch)
    recorder.record()
    monkeypatch.setattr(teaching, "collate", seen)
    together = teach(configure(random_base, data, tmp_path / "all", list(EFFECTS)))
    assert [[e.effect for e in some] for some in forwards] == [[name] * 2 for name in EFFECTS] * STEPS
    shapes = {some[0].effect: (some[0].grid, len(some[0].refs)) for some in forwards}
    assert shapes == {"square": ((8, 8), 1), "wide": ((5, 11), 2), "tall": ((11, 5), 3)}
    rows = read_log(tmp_path / "all" / "teach")
    for index, name in enumerate(EFFECTS):
        recorder.replay(name, index)
        alone = teach(configure(random_base, data, tmp_path / name, [name]))
        losses = [row["loss"] for row in read_log(tmp_path / name / "teach")]
        assert [row[f"loss/{name}"] for row in rows] == pytest.approx(losses, rel=0, abs=1e-5)
        assert len(set(losses)) == STEPS
        first, second = read_lora(together[name]).modules, read_lora(alone[name]).modules
        for module in first:
            torch.testing.assert_close(first[module].delta(), second[module].delta(), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("joint", [False, True])
def test_teach_weighs_every_sample_alike_whatever_its_size(
    random_base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, joint: bool
) -> None:
    """A group of each size is a forward of each sample: three, one and one of a batch of five weigh 3 : 1 : 1."""
    names = ["mixed", "square"]
    sizes = ("teach.batch_size=5", "train.anchor_batch_size=10", "train.max_grad_norm=1e9", "train.adam_epsilon=1e-3")
    found = []
    for out in ("grouped", "single"):
        files = teach(configure(random_base, data, tmp_path / out, names, *sizes), joint)
        found.append(
            (
                [row["loss"] for row in read_log(tmp_path / out / ("joint" if joint else "teach"))],
                {name: read_lora(path).modules for name, path in files.items()},
            )
        )
        # A sample a forward: then there is no weight to be wrong.
        monkeypatch.setattr(teaching, "group_by_size", lambda examples: [[i] for i in range(len(examples))])
        same_eps(monkeypatch)
    assert found[0][0] == pytest.approx(found[1][0], rel=0, abs=1e-5)
    for name, modules in found[0][1].items():
        for module, update in modules.items():
            torch.testing.assert_close(update.delta(), found[1][1][name][module].delta(), rtol=1e-3, atol=1e-6)


def same_eps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw as with whole groups, whatever `group_by_size` became."""

    def drawn(workspace: Workspace, examples: list[Example], step: int) -> Batch:
        with pytest.MonkeyPatch.context() as undone:
            undone.setattr(teaching, "group_by_size", group_by_size)
            return draw_batch(workspace, examples, step)

    monkeypatch.setattr(teaching, "draw_batch", drawn)


def test_draw_batch_of_one_size_draws_in_one_stroke(random_base: Path, data: Path, tmp_path: Path) -> None:
    """Shares without a caption, noise levels, noise: in this order, as runs of one size always had them."""
    config = configure(random_base, data, tmp_path / "run", ["square"])
    workspace = open_workspace(check_teaching(config, config.effects), QUIET)
    examples = workspace.effects["square"] * 2
    batch = draw_batch(workspace, examples, 7)
    rng = step_generator(config.seed, 7, "teach/noise", "cpu")
    u = torch.rand(6, generator=rng)
    assert batch.dropped == (u < config.teach.caption_dropout).tolist()
    u = torch.rand(6, generator=rng)
    torch.testing.assert_close(batch.sigma, 3 * u / (1 + 2 * u))
    assert torch.equal(torch.stack(batch.eps), torch.randn(6, 64, 64, generator=rng))


def test_teach_joint_drops_no_sample(
    random_base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: Counter[str | None] = Counter()

    def seen(examples: Sequence[Example], *more: Any) -> Any:
        counts.update(example.effect for example in examples)
        return collate(examples, *more)

    monkeypatch.setattr(teaching, "collate", seen)
    teach(configure(random_base, data, tmp_path / "run", list(EFFECTS), "train.anchor_batch_size=4"), joint=True)
    assert counts == dict.fromkeys(EFFECTS, 4)  # 3 steps of 4 samples, dealt evenly


def test_collate_refuses_examples_of_different_sizes(random_base: Path, data: Path, tmp_path: Path) -> None:
    config = configure(random_base, data, tmp_path / "run", list(EFFECTS))
    workspace = open_workspace(check_teaching(config, config.effects), QUIET)
    first, second = workspace.effects["square"][0], workspace.effects["wide"][0]
    for pair in ((first, second), (second, first)):
        with pytest.raises(ValueError, match=r"different sizes cannot share a batch: (square|wide) on s0\.png .*group"):
            collate(pair, "teacher", torch.device("cpu"))
    assert group_by_size([first, second, first]) == [[0, 2], [1]]
    fewer = [e for e in workspace.effects["tall"]]
    shortened = Example(**{**vars(fewer[0]), "refs": fewer[0].refs[1:], "ref_grids": fewer[0].ref_grids[1:]})
    with pytest.raises(ValueError, match="different sizes"):
        collate([shortened, fewer[1]], "teacher", torch.device("cpu"))


def test_resume_with_another_setting_names_key_old_and_new_value(random_base: Path, data: Path, tmp_path: Path) -> None:
    one = "teach.max_train_steps=1"
    teach(configure(random_base, data, tmp_path / "run", ["square"], one))
    other = configure(random_base, data, tmp_path / "run", ["square"], one, "teach.learning_rate=0.5")
    with pytest.raises(InputError, match=r"teach\.learning_rate was 0\.008, is 0\.5; put back what it was, or take"):
        teach(other, resume="latest")


# ---- captions ----


def test_teach_learns_from_a_pairs_caption_where_it_has_one(
    random_base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: set[tuple[str, str]] = set()

    def seen(examples: Sequence[Example], roles: Sequence[str], device: torch.device) -> Any:
        read.update((e.sources[-1].name, role) for e, role in zip(examples, roles, strict=True))
        return collate(examples, roles, device)

    monkeypatch.setattr(teaching, "collate", seen)
    more = ("teach.max_train_steps=12", "teach.batch_size=4", "teach.caption_dropout=0.2")
    teach(configure(random_base, data, tmp_path / "run", ["told"], *more))
    assert {role for name, role in read if name == "s0.png"} == {"teacher", "negative"}
    assert {role for name, role in read if name != "s0.png"} == {"caption", "negative"}


@pytest.mark.slow
def test_a_caption_counts_where_it_is_learned_from_alone(random_base: Path, tmp_path: Path) -> None:
    """It changes the teacher and the data that `teach` belongs to; distillation neither encodes nor hashes it."""
    write_effect(tmp_path / "data" / "told", [(64, 64)] * 2, captions=True)
    config = configure(random_base, tmp_path / "data", tmp_path / "run", ["told"], "train.checkpointing_steps=1")

    def opened() -> tuple[Workspace, Workspace]:
        """What distillation opens, and what teaching does."""
        run = check_teaching(config, config.effects)
        return open_workspace(replace(run, captions=False), QUIET), open_workspace(run, QUIET)

    before = opened()
    assert [set(e.texts) - {"student", "teacher", "negative"} for e in before[0].effects["told"]] == [set(), set()]
    assert [set(e.texts) - {"student", "teacher", "negative"} for e in before[1].effects["told"]] == [
        set(),
        {"caption"},
    ]
    caption = before[1].effects["told"][1].texts["caption"]
    assert caption.shape != before[1].effects["told"][1].texts["teacher"].shape
    first = teach(config)["told"].read_bytes()
    rows = tmp_path / "data" / "told" / "metadata.jsonl"
    rows.write_text(rows.read_text().replace("make picture 1 negative", "turn it told"))  # the effect's own prompt
    after = opened()
    assert after[0].hashes == before[0].hashes != before[1].hashes and after[1].hashes == after[0].hashes
    assert "caption" not in after[1].effects["told"][1].texts
    with pytest.raises(InputError, match="pairs of told changed since"):
        teach(config, resume="latest")
    assert teach(config)["told"].read_bytes() != first


@pytest.mark.slow
def test_teach_of_several_sizes_on_two_processes_equals_one(random_base: Path, data: Path, tmp_path: Path) -> None:
    """Where the processes' samples are of different sizes, who has fewer waits for the other."""
    names, clipped = ["mixed", "tall"], "train.max_grad_norm=0.01"
    config = configure(random_base, data, tmp_path / "two", names, "teach.batch_size=1", clipped)
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json", exclude={"preset"})))
    processes.run(2, ["teach", str(tmp_path / "two.yaml")], tmp_path / "output")
    files = teach(configure(random_base, data, tmp_path / "one", names, "teach.batch_size=2", clipped))
    for name, path in files.items():
        ours = read_lora(tmp_path / "two" / "teachers" / f"{name}.safetensors").modules
        for module, theirs in read_lora(path).modules.items():
            torch.testing.assert_close(ours[module].delta(), theirs.delta(), rtol=0.02, atol=2e-5)
    logs = [read_log(tmp_path / out / "teach") for out in ("one", "two")]
    assert [row["loss"] for row in logs[0]] == pytest.approx([row["loss"] for row in logs[1]], rel=1e-5)

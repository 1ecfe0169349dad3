"""A study on the tiny world: teachers taught once, students trained by named arms, all sampled alike and judged.

An *arm* is a training run: a configuration's overrides, from scratch or from another arm's file. A *row* of the table
is an arm, or teachers, sampled in so many steps, with or without the base's acceleration LoRA on top. Everything is
kept below one folder: what was taught, trained or sampled before is not done again, and an interrupted run goes on.
What is there of other settings is refused.

Settings are chosen on the scenes `tune` and reported on the scenes `judge`, which nothing was chosen on.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import yaml
from rich.console import Console

from bench.lab.extend import SCENES, Examples, Images, encode, sample
from clora.config import Config, Sampler, acceleration_lora, load_config
from clora.config.fingerprint import felt_values
from clora.data.image_grid import Pixels
from clora.distill.forwards import distillation_forwards
from clora.distill.opened import OpenBase
from clora.distill.run import open_bank
from clora.distill.workspace import open_base
from clora.errors import InputError
from clora.evaluate.baselines import ACCELERATION, Method
from clora.evaluate.exact import evaluate_methods
from clora.inference.sampling import few_step_sampling, teacher_sampling
from clora.io.digest import file_digest
from clora.jobs.teach import teach
from clora.jobs.train import train
from clora.lora.catalogue import read_catalogue
from clora.lora.files import read_lora
from clora.lora.slots import Slot
from clora.tiny.dataset import effect_config, write_effect_pairs, write_eval_sources

SLOT = "arm"  # of the file that is sampled


@dataclass(frozen=True)
class Arm:
    """A training run: `overrides` of the study's configuration; `start`: the arm whose file it starts from."""

    name: str
    overrides: tuple[str, ...]
    start: str | None = None


@dataclass(frozen=True)
class Row:
    """A way to make images. `who`: an arm or "teacher". `num_steps` None: as the teachers' targets are made."""

    who: str
    num_steps: int | None
    sampler: Sampler = "euler"
    accelerated: bool = False

    @property
    def name(self) -> str:
        steps = "targets" if self.num_steps is None else f"{self.num_steps} {self.sampler}"
        return f"{self.who}{'+accel' if self.accelerated else ''}, {steps}"


@dataclass
class Study:
    """A folder with data, teachers, arms and samples. `settings`: of every configuration, as `section.key=value`."""

    folder: Path
    effects: Sequence[str]
    settings: Sequence[str] = ()
    num_pairs: int = 40
    scenes: Literal["tune", "judge"] = "tune"
    num_scenes: int = 4
    console: Console = field(default_factory=lambda: Console(stderr=True))

    def config(self, *overrides: str, out: str = ".") -> Config:
        """The study's configuration with these overrides, its results in the folder `out`."""
        path = self.folder / "config.yaml"
        if not path.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            values = {"base": "tiny", "output_dir": ".", "effects": effect_config(self.effects, Path("data"))}
            path.write_text(yaml.safe_dump(values, sort_keys=False))
        return load_config(path, [*self.settings, *overrides, f"output_dir={self.folder / out}"])

    def teach(self) -> None:
        """Pairs and a teacher for each effect."""
        for name in self.effects:
            if not (self.folder / "data" / name).exists():
                write_effect_pairs(self.folder / "data" / name, name, self.num_pairs)
        config = self.config()
        self._same("teachers", {"teach": felt_values(config.teach), "pairs": self.num_pairs})
        missing = [effect for effect in config.effects if not config.teacher_path(effect).exists()]
        if missing:
            self.console.rule(f"teach {len(missing)} effects")
            teach(config.model_copy(update={"effects": missing}), resume="latest", console=self.console)

    def train(self, arm: Arm) -> Path:
        """The arm's file; trained unless it is there."""
        config = self.arm_config(arm)
        path = config.output_dir / "collection.safetensors"
        self._same(f"arms/{arm.name}", {"fingerprint": config.fingerprint(), "steps": config.train.max_train_steps})
        if not path.exists():
            self.console.rule(arm.name)
            config.output_dir.mkdir(parents=True, exist_ok=True)
            (self.folder / "cache").mkdir(exist_ok=True)
            if not (cache := config.output_dir / "cache").exists():
                cache.symlink_to(self.folder / "cache")  # entries go by content: images are encoded once
            train(config, resume="latest", console=self.console)
        return path

    def _same(self, name: str, settings: Mapping[str, Any]) -> None:
        """Raise `InputError` where the folder has `name` by other settings."""
        path = self.folder / f"{name}.settings.json"
        text = json.dumps(settings, indent=1, sort_keys=True)
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        elif path.read_text() != text:
            raise InputError(f"{self.folder / name}: was made by other settings; give another --run, or delete it")

    def arm_config(self, arm: Arm) -> Config:
        teachers = [f"effects.{i}.lora={self.teacher(name)}" for i, name in enumerate(self.effects)]
        start = [] if arm.start is None else [f"student.init_from={self.arm_file(arm.start)}"]
        return self.config(*teachers, *start, *arm.overrides, out=f"arms/{arm.name}")

    def arm_file(self, name: str) -> Path:
        """Of an arm, or, as `ARM:coarse`, of what its coarse stage made."""
        arm, _, stage = name.partition(":")
        return self.folder / "arms" / arm / f"{stage or 'collection'}.safetensors"

    def teacher(self, name: str) -> Path:
        return self.folder / "teachers" / f"{name}.safetensors"

    def forwards(self, arm: Arm) -> float:
        """Forwards of one sample that the arm's training takes, a backward counted as two, without its start's."""
        return distillation_forwards(self.arm_config(arm))

    def sample(self, rows: Sequence[Row]) -> dict[str, Images]:
        """Every row's images of every effect on the scenes, one noise a scene, the same in every row."""
        found, todo = {}, []
        for row in rows:
            path = self._sample_path(row)
            if path.exists():
                with np.load(path) as stored:
                    found[row.name] = {_key(key): [stored[key]] for key in stored.files}
            else:
                todo.append(row)
        if todo:
            found |= self._sample_now(todo)
        return {row.name: found[row.name] for row in rows}

    def _sample_path(self, row: Row) -> Path:
        """Named by what is sampled: an arm's file by its content."""
        made = "" if row.who == "teacher" else f", {file_digest(self.arm_file(row.who)).hex()[:12]}"
        return self.folder / "samples" / f"{self.scenes}-{self.num_scenes}" / f"{row.name}{made}.npz"

    def _sample_now(self, rows: Sequence[Row]) -> dict[str, Images]:
        first = SCENES[self.scenes]
        scenes = write_eval_sources(self.folder / "data" / f"held_out_{self.scenes}", self.num_scenes, first=first)
        config = self.arm_config(Arm("sampling", ()))
        workspace = open_base(config, self.console)
        fast = acceleration_lora(config.base.model)
        if fast is not None and any(row.accelerated for row in rows):
            workspace.adapters.add_lora(ACCELERATION, read_lora(fast, workspace.adapters.module_shapes).modules)
        bank = open_bank(workspace)
        assert bank is not None
        encoded: dict[str, Examples] = {}
        for row in rows:
            if row.who not in encoded:
                encoded[row.who] = self._encode(workspace, row.who, scenes)
        workspace.backbone.free_encoders()
        found = {}
        for row in rows:
            self.console.print(f"sampling {row.name}")
            if row.who != "teacher":
                modules = read_lora(self.arm_file(row.who), workspace.adapters.module_shapes).modules
                workspace.adapters.add_lora(SLOT, modules)
            method = self._method(row, config, bank.slots_for)
            found[row.name] = sample(workspace, method, encoded[row.who])
            if row.who != "teacher":
                workspace.adapters.remove_stack(SLOT)
            path = self._sample_path(row)
            path.parent.mkdir(parents=True, exist_ok=True)
            np.savez(path.with_suffix(".tmp.npz"), **{f"{e}|{s}": one[0] for (e, s), one in found[row.name].items()})
            path.with_suffix(".tmp.npz").rename(path)
        return found

    def _encode(self, workspace: OpenBase, who: str, scenes: dict[int, Path]) -> Examples:
        """Every effect on every scene; a student is asked in the words of its file's catalogue."""
        negative = workspace.config.objective.negative_prompt
        if who == "teacher":
            texts = {e.name: {"teacher": e.prompt, "negative": negative} for e in workspace.config.effects}
        else:
            texts = {e.name: {"student": e.prompt} for e in read_catalogue(self.arm_file(who)).effects}
        return encode(workspace, texts, scenes)

    def _method(self, row: Row, config: Config, teachers: Any) -> Method:
        if row.num_steps is None:
            sampling = teacher_sampling(config)
        else:
            sampling = few_step_sampling(row.num_steps, config.schedule.shift, row.sampler)

        def slots_for(effects: Sequence[str | None]) -> Sequence[Slot]:
            slots = teachers(effects) if row.who == "teacher" else [SLOT]
            return [(slot, ACCELERATION) for slot in slots] if row.accelerated else slots

        return Method(row.name, 1, sampling, "teacher" if row.who == "teacher" else "student", slots_for)


def _key(text: str) -> tuple[str, int]:
    effect, scene = text.split("|")
    return effect, int(scene)


def judge(
    images: Mapping[str, Mapping[tuple[str, int], Sequence[Pixels]]], control: str | Mapping[str, str]
) -> list[dict[str, Any]]:
    """A row of figures for every method, with its paired differences to `control`, or to the one it names for it."""
    rows = []
    for name, scores in evaluate_methods(images, reference=control).items():
        row: dict[str, Any] = {"row": name, "bcr": round(scores.bcr, 3), "interval": _rounded(scores.bcr_interval)}
        row |= {"vsa": round(scores.vsa, 2), "detail_error_db": round(scores.detail_error, 2)}
        row["psnr"] = None if scores.psnr is None else round(scores.psnr, 2)
        row |= {"outputs": scores.num_outputs, "reasons": scores.reasons}
        row["bcr_by_effect"] = {effect: round(one.bcr, 3) for effect, one in scores.per_effect.items()}
        row["to_control"] = {
            key: {"mean": round(gap.mean, 3), "interval": gap.interval and _rounded(gap.interval)}
            for key, gap in scores.differences.items()
        }
        rows.append(row)
    return rows


def _rounded(interval: tuple[float, float]) -> list[float]:
    return [round(x, 3) for x in interval]


def machine() -> str:
    """The processor and how many threads torch uses on it."""
    return f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def write_figures(path: Path | None, figures: Mapping[str, Any]) -> None:
    text = json.dumps(figures, indent=1)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    print(text)

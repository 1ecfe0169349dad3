"""`clora demo`: the main job on the embedded tiny world, from pairs on disk to a report, in minutes on a CPU.

Every phase is the job a user runs on real data (`validate`, `teach`, `train`, `eval`); the demo only writes the tiny
world's images as a user's dataset first, and knows the truth when it scores. Interrupted anywhere, the same command
goes on where it was; another one is refused in its folder.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import yaml
from rich.console import Console

from clora import __version__
from clora.config import Config, load_config
from clora.data.image_grid import Grid, Pixels, grid_image
from clora.distill.check import check_teaching
from clora.distill.forwards import distillation_forwards, joint_step_forwards
from clora.distill.workspace import open_workspace
from clora.errors import InputError, InputErrors
from clora.evaluate.baselines import COLLECTION, JOINT_STUDENT
from clora.evaluate.exact import evaluate_methods
from clora.evaluate.report import Curve, MethodRow, PhaseRow, Report, write_report
from clora.io.atomic import write_text
from clora.jobs.demo_samples import held_out, read_samples, sample_all, table_order
from clora.jobs.teach import JOINT as JOINT_FOLDER
from clora.jobs.teach import teach, teach_joint
from clora.jobs.train import train
from clora.jobs.validate import validate_config
from clora.tiny.dataset import (
    effect_config,
    effect_names,
    write_effect_pairs,
    write_eval_sources,
)
from clora.tiny.effects import EFFECTS, apply_effect
from clora.tiny.world.scenes import render, sample_scene
from clora.training.tracker import read_log

Size = Literal["full", "long", "smoke"]
BESIDES_SIZE = {"base", "output_dir", "seed", "effects"}  # sections of a demo's configuration that every size has
PICTURED = ("coarse+accel", COLLECTION)  # in the fewest steps; in the schedule's all methods are


@dataclass(frozen=True)
class Scale:
    """How much of everything one size of the demo does."""

    pairs: int
    eval_sources: int
    overrides: tuple[str, ...]


SCALES: dict[Size, Scale] = {
    "full": Scale(pairs=40, eval_sources=6, overrides=()),
    # For collections that are kept; the one shipped with the base is `bench.lab.table1`'s of fifty.
    "long": Scale(
        pairs=60,
        eval_sources=4,
        overrides=(
            "teach.max_train_steps=1000",
            "teach.batch_size=4",
            "teach.learning_rate=4.0e-3",
            "teach.rank=16",
            "teach.alpha=16",
            "student.rank=72",
            "student.alpha=72",
            "targets.max_sources=60",
            "train.max_train_steps=4600",
            "train.coarse_steps=4000",
            "train.coarse_optimizer=muon",
            "train.coarse_learning_rate=2.0e-2",
            "train.ema_start=4000",
            "train.ema_decay=0.98",
            "train.anchor_batch_size=16",
            "objective.imitation=same_step",
            "objective.imitation_weight=1",
            "objective.imitation_below=0.6",
        ),
    ),
    "smoke": Scale(
        pairs=4,
        eval_sources=2,
        overrides=(
            "teach.max_train_steps=6",
            "teach.lr_warmup_steps=2",
            "targets.num_steps=4",
            "train.max_train_steps=6",
            "train.coarse_steps=3",
            "train.ema_start=3",
            "train.log_every=1",
            "train.lr_warmup_steps=2",
            "train.batch_size=2",
            "train.anchor_batch_size=4",
        ),
    ),
}


class Phases:
    """Runs each phase once per folder: a finished phase's result and cost are read back from `phases.json`."""

    def __init__(self, out: Path, console: Console) -> None:
        self._path = out / "phases.json"
        self._console = console
        self.rows: dict[str, dict[str, Any]] = json.loads(self._path.read_text()) if self._path.exists() else {}

    def run(self, name: str, work: Callable[[], Any]) -> None:
        """Do `work` unless it was done before; record seconds (over all attempts) and peak memory in MB."""
        begun = name in self.rows
        row = self.rows.setdefault(name, {"seconds": 0.0, "peak_memory_mb": 0.0, "done": False})
        if row["done"]:
            self._console.print(f"[dim]{name}: done before[/dim]")
            return
        self._console.rule(name)
        if begun:
            self._console.print(f"{name}: was interrupted after {row['seconds']:.0f} s, and goes on")
        self._write()  # that it has begun, should it be killed
        started = time.perf_counter()
        try:
            work()
            row["done"] = True
        finally:
            row["seconds"] += time.perf_counter() - started
            row["peak_memory_mb"] = max(row["peak_memory_mb"], peak_memory_mb())
            self._write()

    def _write(self) -> None:
        write_text(self._path, json.dumps(self.rows, indent=1))


def peak_memory_mb() -> float:
    """The process's (or the GPU's) peak memory so far, MB."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e6
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def run_demo(
    out: Path, num_effects: int = 12, size: Size = "full", seed: int = 0, console: Console | None = None
) -> Path:
    """Run all phases below `out` and return `out/report.html`; `out/report.json` holds the figures.

    Raises `InputError` where the folder holds a demo of other effects, another size or another seed.
    """
    console = console or Console(stderr=True)
    scale = SCALES[size]
    names = effect_names(3 if size == "smoke" else num_effects)
    out.mkdir(parents=True, exist_ok=True)
    refuse_another(out, {"effects": names, "size": size, "seed": seed})
    phases = Phases(out, console)
    phases.run("dataset", lambda: write_dataset(out, names, scale, seed))
    config = load_config(out / "config.yaml")
    phases.run("validate", lambda: check(config))
    phases.run("teach", lambda: teach(config, resume="latest", console=console))
    phases.run("distil", lambda: train(config, resume="latest", console=console))
    phases.run("joint-fm", lambda: train_joint(config, console))
    phases.run("joint-fm (student prompts)", lambda: train_control(config, console))
    phases.run("sample", lambda: sample_all(config, held_out(out, scale.eval_sources), out, console))
    phases.run("score", lambda: score(out))
    return report(config, out, phases)


def refuse_another(out: Path, settings: dict[str, Any]) -> None:
    """Keep a demo's settings in `out/demo.json`; raise `InputError` where the folder has one of other settings.

    A folder of a version that kept none is known by its configuration: effects, seed, and whether there are settings of
    a size.
    """
    path = out / "demo.json"
    if path.exists():
        kept: dict[str, Any] = json.loads(path.read_text())
    elif (out / "config.yaml").exists():
        config = yaml.safe_load((out / "config.yaml").read_text())
        kept = {"effects": [effect["name"] for effect in config["effects"]], "seed": config.get("seed", 0)}
        if (settings["size"] == "full") == bool(own := set(config) - BESIDES_SIZE):
            kept["size"] = "other than full" if own else "full"
    else:
        kept = {}
    if other := [_gap(name, kept[name], now) for name, now in settings.items() if kept.get(name, now) != now]:
        raise InputError(f"{out}: holds a demo with {' and '.join(other)}; give another --out, or delete it")
    write_text(path, json.dumps(settings, indent=1))


def _gap(name: str, kept: Any, now: Any) -> str:
    if isinstance(kept, list) and len(kept) != len(now):
        return f"{len(kept)} {name}, not {len(now)}"
    if isinstance(kept, list):
        return f"the {name} {', '.join(sorted(set(kept) - set(now)))}"
    return f"{name} {kept}, not {now}"


def write_dataset(out: Path, names: list[str], scale: Scale, seed: int) -> None:
    """The tiny world as a user would hold it: folders of PNG pairs and one configuration file."""
    for name in names:
        write_effect_pairs(out / "data" / name, name, scale.pairs)
    write_eval_sources(out / "data" / "held_out", scale.eval_sources)
    values: dict[str, Any] = {
        "base": "tiny",
        "output_dir": ".",
        "seed": seed,
        "effects": effect_config(names, Path("data")),
    }
    for override in scale.overrides:
        section, key = override.split("=")[0].split(".")
        values.setdefault(section, {})[key] = yaml.safe_load(override.split("=")[1])
    (out / "config.yaml").write_text(yaml.safe_dump(values, sort_keys=False))


def check(config: Config) -> None:
    """`clora validate`, as a user would before the long job."""
    if faults := validate_config(config):
        raise InputErrors(faults)


def steps_of_equal_cost(config: Config) -> int:
    """Of flow matching, as many as the forwards of the distillation allow. They are counted from the configuration, so
    that a baseline does not depend on how busy the machine was."""
    return max(1, round(distillation_forwards(config) / joint_step_forwards(config)))


def train_joint(config: Config, console: Console) -> None:
    """The "N-in-1 FM" baseline: as many steps as the distillation's cost allows, at the rate of a teacher, which learns
    by AdamW as it does (a coarse stage's may be Muon's)."""
    config = config.with_values(teach={"max_train_steps": steps_of_equal_cost(config)})
    teach_joint(open_workspace(check_teaching(config, config.effects), console), "latest", console)


def train_control(config: Config, console: Console) -> None:
    """Flow matching on the teachers' images (Eq. 6), under the student's prompts, until it has cost as many forwards as
    the collection: what is left of it when distillation is taken away."""
    steps = steps_of_equal_cost(config)
    out = config.output_dir / JOINT_STUDENT
    out.mkdir(exist_ok=True)
    if not (cache := out / "cache").exists():
        cache.symlink_to("../cache", target_is_directory=True)  # images are encoded once
    effects = [effect.model_dump() | {"lora": config.teacher_path(effect)} for effect in config.effects]
    config = config.with_values(
        output_dir=out,
        effects=effects,
        student={"acceleration": None},
        objective={"imitation_weight": 0.0, "imitation_below": None},
        train={"max_train_steps": steps, "coarse_steps": steps, "coarse_target": "images", "ema_start": 0},
    )
    train(config, resume="latest", console=console)


def score(out: Path) -> None:
    """Score every method against the known truth, among all effects of the world: `scores.json`.

    Differences are to the collection in as many steps, for the teachers of many to the collection as it is.
    """
    sampled = {name: (figures, outputs) for name, figures, outputs in read_samples(out / "samples")}
    nfe = {name: int(figures["nfe"]) for name, (figures, _) in sampled.items()}
    collections = {nfe[name]: name for name in nfe if name.split(", ")[0] == COLLECTION}
    references = {name: collections.get(count, COLLECTION) for name, count in nfe.items()}
    scores = evaluate_methods({name: outputs for name, (_, outputs) in sampled.items()}, reference=references)
    rows = {
        name: MethodRow.from_scores(
            name,
            scores[name],
            nfe=nfe[name],
            num_loras=int(figures["num_loras"]),
            seconds_per_image=float(figures["seconds"]),
        ).model_dump()
        for name, (figures, _) in sampled.items()
    }
    (out / "scores.json").write_text(json.dumps(rows, indent=1))


def report(config: Config, out: Path, phases: Phases) -> Path:
    """Write report.json, report.html and its grid of pictures, grid.png, from what the phases left behind."""
    names = [effect.name for effect in config.effects]
    sampled = {name: (figures, outputs) for name, figures, outputs in read_samples(out / "samples")}
    nfe = {name: int(figures["nfe"]) for name, (figures, _) in sampled.items()}
    order = table_order(nfe)
    scored = json.loads((out / "scores.json").read_text())
    rows = [MethodRow.model_validate(scored[name]) for name in order]
    whole = Report(
        title=f"clora demo: {len(names)} effects in one LoRA",
        methods=rows,
        phases=[
            PhaseRow(name=name, seconds=row["seconds"], peak_memory_mb=row["peak_memory_mb"])
            for name, row in phases.rows.items()
        ],
        curves=[curve for title in ("teach", "train", JOINT_FOLDER) for curve in curves_of(out / title, title)],
        facts={
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
            "threads": str(torch.get_num_threads()),
            "seed": str(config.seed),
            "version": __version__,
        },
    )
    fewest = min(nfe.values())
    shown = [n for n in order if nfe[n] >= nfe[COLLECTION] or (nfe[n] == fewest and n.split(", ")[0] in PICTURED)]
    grid = grid_of(names, shown, sampled)
    grid_image(grid.rows, grid.columns, grid.row_labels).save(out / "grid.png")
    return write_report(out, whole, [grid])


def curves_of(folder: Path, title: str) -> list[Curve]:
    """The losses in a job's log, one panel per loss."""
    rows = read_log(folder)
    names = sorted({name for row in rows for name in row if "loss" in name and not name.startswith("loss/")})
    curves = []
    for name in names:
        having = [row for row in rows if name in row]
        steps, values = [int(row["step"]) for row in having], [row[name] for row in having]
        curves.append(Curve(panel=f"{title}: {name.split('/')[-1]}", name=name, steps=steps, values=values))
    return curves


def grid_of(names: list[str], order: list[str], sampled: dict[str, Any]) -> Grid:
    """For each effect one held-out scene: source, truth and every method's image."""
    rows: list[list[Pixels | None]] = []
    for index, name in enumerate(names):
        scenes = sorted(scene for effect, scene in sampled[order[0]][1] if effect == name)
        scene = scenes[index % len(scenes)]
        rendered = render(sample_scene(scene))
        truth = apply_effect(EFFECTS[name], rendered, np.random.default_rng(0))
        outputs = [sampled[method][1][name, scene][0] for method in order]
        rows.append([rendered.image_HW3, truth, *outputs])
    labels = [f"{name} *" if EFFECTS[name].random else name for name in names]
    caption = "Held-out scenes. * random effects: the truth shown is one of many valid outcomes."
    return Grid("Every effect, every method", ["source", "truth", *order], labels, rows, caption)

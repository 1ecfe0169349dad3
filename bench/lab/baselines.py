"""What would a user do without a collection? `python -m bench.lab.baselines --run runs/demo [--out DIR] [--figures F]`.

Every method that is at hand for the effects of a finished demo, in one table of `clora eval` with exact verdicts:
teachers in many and few steps, with the acceleration LoRA (stock `set_adapters`), picked by a router, joint LoRAs,
teachers merged into one by PEFT, and the collection. Then two effects at once. Merges are set up (weight, density) by
their alignment on scenes `tune`, among equals by PSNR, both ways of asking together; the figures say where the best is
at the end of what was tried. The table is of scenes `judge`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from rich.console import Console

from bench.lab.extend import SCENES
from bench.lab.merges import (
    COMBINATIONS,
    DENSITIES,
    Merge,
    candidates,
    edges,
    load_with_peft,
    merge,
    weights_for,
)
from bench.lab.study import machine, write_figures
from bench.lab.two_effects import FORWARDS, compose
from clora.config import acceleration_lora, load_config
from clora.evaluate.baselines import JOINT_STUDENT
from clora.evaluate.bench_report import COSTS
from clora.evaluate.benchmark import Benchmark, lora_files
from clora.inference.sampling import few_step_sampling
from clora.io.digest import file_digest
from clora.jobs.eval_bench import evaluate_benchmark
from clora.lora.files import read_lora
from clora.method.prompts import compose_prompts
from clora.tiny.dataset import write_eval_sources
from clora.tiny.effects import EFFECTS, find_effect
from clora.tiny.world.scenes import sample_scene

# The second leaves what it looks for where it was, and each asks for something that the other keeps.
PAIRS = ("beach + sepia", "gold_statue + rain", "grayscale + flower_wreath", "pencil_sketch + polaroid",
         "beach + snow", "mirror_half + sepia", "gold_statue + polaroid", "oil_paint + flower_wreath")  # fmt: skip
TUNE_SCENES = 2
ASKS = {"": "instruction", " (full prompts)": "student_prompt"}


def write_scenes(out: Path, use: str, count: int) -> dict[str, list[Path]]:
    """Held-out scenes as pictures called by their number, by category."""
    found: dict[str, list[Path]] = {}
    for scene, path in write_eval_sources(out / "written", count, first=SCENES[use]).items():
        category = sample_scene(scene).kind
        place = out / category / f"{scene}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(path.read_bytes())
        found.setdefault(category, []).append(place)
    return found


def bench_effects(names: Sequence[str]) -> list[dict[str, Any]]:
    """Effects of a benchmark: instructions are the teachers' prompts, which several share."""
    rows = []
    for name in names:
        effect, row = find_effect(name), {"name": name}
        row |= {"instruction": effect.prompt, "criteria": effect.criteria, "student_prompt": effect.student_prompt}
        if name not in EFFECTS:
            pair = name.split(" + ")
            row["of"] = pair
            row["student_prompt"] = compose_prompts(*(EFFECTS[one].student_prompt for one in pair))
        rows.append(row)
    return rows


def digest_of_all(files: Iterable[Path]) -> str:
    """SHA-256 (hex) of several files' contents, in order."""
    return hashlib.sha256(b"".join(map(file_digest, files))).hexdigest()


def run_bench(
    out: Path,
    effects: Sequence[str],
    sources: Mapping[str, Sequence[Path]],
    methods: Sequence[Mapping[str, Any]],
    reference: str,
    console: Console,
) -> dict[str, Any]:
    """Write `out/benchmark.yaml` and run it, unless it was run before as it is, of the same LoRA files; returns its
    report."""
    out.mkdir(parents=True, exist_ok=True)
    bench = {
        "output_dir": ".",
        "base": "tiny",
        "exact": True,
        "batch_size": 8,
        "reference": reference,
        "effects": bench_effects(effects),
        "images": {category: [str(path) for path in found] for category, found in sources.items()},
        "methods": list(methods),
    }
    read = Benchmark.model_validate(bench)
    made_of = digest_of_all([file for method in read.methods for file in lora_files(read, method)])
    path, text = out / "benchmark.yaml", f"# LoRA files {made_of}\n{yaml.safe_dump(bench, sort_keys=False)}"
    if (out / "report.json").exists() and path.read_text() == text:
        found: dict[str, Any] = json.loads((out / "report.json").read_text())
        return found
    path.write_text(text)
    return evaluate_benchmark(path, console)


def merged(out: Path, run: Path, teachers: Mapping[str, Path], fast: Path, console: Console) -> dict[Merge, Path]:
    """The best merge of every combination, by verdicts on scenes `tune`, with its file."""
    rank = next(iter(read_lora(run / "collection.safetensors").modules.values())).rank
    folder = out / "merges" / digest_of_all(teachers.values())[:12]
    files = {how: folder / f"{how.name}.safetensors" for how in candidates(len(teachers))}
    if not all(path.exists() for path in files.values()):
        model = load_with_peft("tiny", teachers)
        for how, path in files.items():
            merge(model, list(teachers), how, rank, path)
    methods = [
        {"name": how.name + suffix, "lora": str(path), "accelerate": str(fast), "ask": ask}
        for how, path in files.items()
        for suffix, ask in ASKS.items()
    ]
    sources = write_scenes(out / "scenes" / "tune", "tune", TUNE_SCENES)
    report = run_bench(out / "tune", list(teachers), sources, methods, methods[0]["name"], console)
    found = {one["name"]: (one["vsa"], one["figures"]["psnr_truth"]["mean"]) for one in report["methods"]}
    score = {how: np.sum([found[how.name + suffix] for suffix in ASKS], axis=0).tolist() for how in files}
    best = [max((how for how in files if how.combination == name), key=lambda how: score[how]) for name in COMBINATIONS]
    return {how: files[how] for how in best}


def single_methods(run: Path, fast: Path, merges: Mapping[Merge, Path]) -> list[dict[str, Any]]:
    """Every method for one effect at a time, the collection last."""
    teachers, accelerate = {"loras": str(run / "teachers" / "{effect}.safetensors")}, {"accelerate": str(fast)}
    student = str(run / JOINT_STUDENT / "collection.safetensors")
    return [
        {"name": "teacher-40x2", **teachers, "steps": 40, "guidance": 4},
        {"name": "teacher-40", **teachers, "steps": 40, "guidance": 1},
        {"name": "teacher-8", **teachers, "steps": 8, "guidance": 1},
        {"name": "teacher+accel (set_adapters)", **teachers, **accelerate},
        {"name": "teacher+accel by a router", **teachers, **accelerate, "route": True},
        {"name": "joint-fm-40", "lora": str(run / "joint.safetensors"), "steps": 40, "guidance": 1},
        {"name": "joint-fm+accel", "lora": str(run / "joint.safetensors"), **accelerate},
        {"name": "joint-fm (student prompts)+accel", "lora": student, **accelerate},
        *(
            {"name": f"{how.combination}{suffix}+accel", "lora": str(path), **accelerate, "ask": ask}
            for how, path in merges.items()
            for suffix, ask in ASKS.items()
        ),
        {"name": "coarse+accel", "lora": str(run / "coarse.safetensors"), **accelerate},
        {"name": "collection", "lora": str(run / "collection.safetensors")},
    ]


def pair_methods(run: Path, out: Path, steps: int, teachers: Mapping[str, Path], fast: Path) -> list[dict[str, Any]]:
    """Every method for two effects at once, the collection last."""
    files = [*teachers.values(), fast]
    storage = round(sum(path.stat().st_size for path in files) / 1e6, 3)
    cost = {"num_loras": len(files), "storage_mb": storage}
    student = str(run / JOINT_STUDENT / "collection.safetensors")
    return [
        *(
            {"name": f"{how}+accel", "images": str(out / "made" / how), **cost, "nfe": steps * times}
            for how, times in FORWARDS.items()
        ),
        {"name": "joint-fm (student prompts)+accel", "lora": student, "accelerate": str(fast)},
        {"name": "coarse+accel", "lora": str(run / "coarse.safetensors"), "accelerate": str(fast)},
        {"name": "collection", "lora": str(run / "collection.safetensors")},
    ]


def merge_figures(best: Sequence[Merge], count: int) -> dict[str, Any]:
    """What was tried for so many LoRAs, and the best of each combination, with where it lies at an end of that."""
    tried = {"weights": [round(weight, 4) for weight in weights_for(count)], "densities": list(DENSITIES)}
    chosen = {
        how.combination: {"weight": round(how.weight, 4), "density": how.density, "at the end": edges(how, count)}
        for how in best
    }
    return {"tried": tried, "best": chosen}


def rows(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What is filed of a report."""
    found = []
    for one in report["methods"]:
        row = {key: one[key] for key in ("name", "outputs", "missing", *COSTS)}
        row |= {"bcr": _short(one["bcr"]), "bcr_interval": _short(one["bcr_interval"])}
        row |= {"vsa": _short(one["vsa"]), "vsa_interval": _short(one["vsa_interval"])}
        row |= {key: _short(figure["mean"]) for key, figure in one["figures"].items()}
        to_reference = ("bcr", "vsa", "detail_db", "psnr_truth")
        changes = {key: one["differences"][key] for key in to_reference if key in one["differences"]}
        row["to_reference"] = {key: [_short(c["mean"]), _short(c["interval"])] for key, c in changes.items()}
        row["bcr_by_effect"] = {effect: _short(rate) for effect, rate in one["effect_bcr"].items()}
        found.append(row)
    return found


def _short(value: Any) -> Any:
    if value is None:
        return None
    return round(value, 4) if isinstance(value, float) else [round(x, 4) for x in value]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="folder of a finished demo")
    parser.add_argument("--out", type=Path, help="folder of the benchmarks; RUN/baselines")
    parser.add_argument("--num-scenes", type=int, default=6)
    parser.add_argument("--figures", type=Path, help="write the table as JSON")
    arguments = parser.parse_args()
    console = Console(stderr=True)
    run = arguments.run.resolve()
    out = (arguments.out or run / "baselines").resolve()
    config = load_config(run / "config.yaml")
    teachers = {effect.name: run / "teachers" / f"{effect.name}.safetensors" for effect in config.effects}
    fast = acceleration_lora("tiny")
    assert fast is not None
    merges = merged(out, run, teachers, fast, console)
    sources = write_scenes(out / "scenes" / "judge", "judge", arguments.num_scenes)
    methods = single_methods(run, fast, merges)
    single = run_bench(out / "single", list(teachers), sources, methods, "collection", console)

    pairs = [pair for pair in PAIRS if set(pair.split(" + ")) <= set(teachers)]
    of = {pair: tuple(pair.split(" + ")) for pair in pairs}
    asked = {pair: (names, tuple(EFFECTS[name].prompt for name in names)) for pair, names in of.items()}
    sampling = few_step_sampling(config.schedule.num_steps, config.schedule.shift)
    compose("tiny", asked, teachers, fast, sources, sampling, out / "two" / "made")  # type: ignore[arg-type]
    methods = pair_methods(run, out / "two", config.schedule.num_steps, teachers, fast)
    two = run_bench(out / "two", pairs, sources, methods, "collection", console)
    figures = {
        "effects": list(teachers),
        "scenes": {"use": "judge", "first": SCENES["judge"], "count": arguments.num_scenes},
        "merges": merge_figures(list(merges), len(teachers)),
        "router": "letter trigrams of the full prompt against the criteria, by tf-idf (clora.evaluate.router)",
        "machine": machine(),
        "one effect": rows(single),
        "two effects": rows(two),
    }
    write_figures(arguments.figures, figures)


if __name__ == "__main__":
    main()

"""What settings of training cost in quality: `python -m bench.lab.train_settings --run runs/settings [--figures F]`.

The demo's effects are taught once and distilled anew with each setting; every collection is scored against the truth
on held-out scenes, with the same noise. "other seed" is the plain setting with other random draws: what is as small
as its change is chance. Half an hour on two CPU cores; a second call goes on where it was.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from rich.console import Console

from bench.lab.extend import Images, encode, sample
from bench.lab.quantized_base import psnr_to, quality
from clora.config import Config, load_config
from clora.distill.workspace import open_base
from clora.evaluate.baselines import COLLECTION, collection_method
from clora.evaluate.exact import evaluate_methods
from clora.jobs.demo import SCALES, write_dataset
from clora.jobs.teach import teach
from clora.jobs.train import train
from clora.lora.catalogue import read_catalogue
from clora.lora.files import read_lora
from clora.tiny.dataset import effect_names, write_eval_sources

PLAIN = "plain"
SETTINGS: dict[str, list[str]] = {
    PLAIN: [],
    "other seed": ["seed=1"],
    "bfloat16 moments": ["train.adam_moments=bfloat16"],
    "int8 base, bfloat16 moments": ["train.adam_moments=bfloat16", "base.quantize=int8"],
    "critic on samples of its own": ["train.critic_reuse=false"],
}


def taught(run: Path, names: list[str], console: Console) -> Config:
    """The demo's dataset with its teachers."""
    write_dataset(run, names, SCALES["full"], seed=0)
    config = load_config(run / "config.yaml")
    teach(config, resume="latest", console=console)
    return config


def distil(run: Path, names: list[str], setting: str, console: Console) -> Path:
    """The collection of one setting; made anew only if it is not there."""
    lora = [f"effects.{i}.lora={run / 'teachers' / name}.safetensors" for i, name in enumerate(names)]
    out = run / setting.replace(" ", "_").replace(",", "")
    config = load_config(run / "config.yaml", [f"output_dir={out}", *lora, *SETTINGS[setting]])
    path = out / "collection.safetensors"
    if not path.exists():
        train(config, resume="latest", console=console)
    return path


def prompts_of(collection: Path) -> dict[str, dict[str, str]]:
    """Another seed has other triggers, so that every collection is asked in its own words."""
    return {entry.name: {"student": entry.prompt} for entry in read_catalogue(collection).effects}


def sample_all(config: Config, collections: dict[str, Path], scenes: dict[int, Path]) -> dict[str, Images]:
    """Every collection's images of all effects on the held-out scenes."""
    workspace = open_base(config, Console(stderr=True))
    examples = {name: encode(workspace, prompts_of(path), scenes) for name, path in collections.items()}
    workspace.backbone.free_encoders()
    method = collection_method(config.schedule.num_steps, config.schedule.shift, config.schedule.sampler)
    images = {}
    for name, path in collections.items():
        modules = read_lora(path, workspace.adapters.module_shapes).modules
        workspace.adapters.add_lora(COLLECTION, modules)
        images[name] = sample(workspace, method, examples[name])
        workspace.adapters.remove_stack(COLLECTION)
    return images


def measure(run: Path, num_effects: int, num_scenes: int) -> dict[str, Any]:
    console = Console(stderr=True)
    names = effect_names(num_effects)
    config = taught(run, names, console)
    collections = {}
    for setting in SETTINGS:
        console.rule(setting)
        collections[setting] = distil(run, names, setting, console)
    scenes = write_eval_sources(run / "data" / "held_out", num_scenes)
    images = sample_all(config, collections, scenes)
    scores = evaluate_methods(images)
    rows = []
    for setting, overrides in SETTINGS.items():
        found = quality(scores[setting], scores[PLAIN]) | {"vsa": round(scores[setting].vsa, 3)}
        found["psnr_to_plain"] = round(psnr_to(images[setting], images[PLAIN]), 2)
        rows.append({"setting": setting, "overrides": overrides} | found)
    return {
        "effects": names,
        "scenes": num_scenes,
        "coarse_steps": config.train.coarse_steps,
        "full_steps": config.train.max_train_steps - config.train.coarse_steps,
        "rows": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--effects", type=int, default=12)
    parser.add_argument("--scenes", type=int, default=12)
    parser.add_argument("--figures", type=Path, help="write the figures as JSON")
    arguments = parser.parse_args()
    figures = measure(arguments.run.resolve(), arguments.effects, arguments.scenes)
    command = f"python -m bench.lab.train_settings --effects {arguments.effects} --scenes {arguments.scenes}"
    if arguments.figures:
        arguments.figures.write_text(json.dumps({"command": command} | figures, indent=1) + "\n")
    line = "{setting:28s} BCR {bcr:.4f} ({bcr_change:+.4f})  PSNR {psnr} dB, to plain {psnr_to_plain} dB  VSA {vsa}"
    for row in figures["rows"]:
        print(line.format(**row))


if __name__ == "__main__":
    main()

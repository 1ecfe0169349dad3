"""Do old effects survive `clora extend`? `python -m bench.lab.extend --run runs/extend [--figures F] [key=value ...]`.

The tiny base's collection of 50 effects, extended by the next three of the world (Table 5) or by those named: a teacher
is taught to each (once per folder), the collection is extended, and old and new effects are scored against the truth on
held-out scenes before and after, with the same noise. Settings are chosen on `--scenes tune` (`key=value` are overrides
of the configuration) and judged on `--scenes judge`, which are others.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from clora.config import Config, acceleration_of, collection_lora, load_config
from clora.data.examples import Example
from clora.data.image_grid import Pixels, to_uint8
from clora.data.pairs import Pair
from clora.distill.opened import OpenBase
from clora.distill.run import open_bank
from clora.distill.workspace import open_base
from clora.evaluate.baselines import (
    ACCELERATION,
    COLLECTION,
    Method,
    collection_method,
    methods,
    sample_examples,
)
from clora.evaluate.exact import MethodScores, Outputs, evaluate_methods
from clora.evaluate.statistics import bootstrap_interval
from clora.inference.sampling import teacher_sampling
from clora.jobs.demo import SCALES
from clora.jobs.extend import extend
from clora.jobs.teach import teach
from clora.lora.catalogue import Catalogue, read_catalogue
from clora.lora.files import read_lora
from clora.tiny.dataset import EVAL_SCENES, effect_config, effect_names, write_effect_pairs, write_eval_sources
from clora.training.tracker import read_log

PAIRS = 40
NEW_NOISES = 4  # images of a new effect on each scene: there are few new effects
TEACH = tuple(one for one in SCALES["long"].overrides if one.startswith("teach."))  # as for the collection of 50
# The first held-out scene of each use: those that settings are chosen on, and those that they are judged on.
SCENES = {"tune": EVAL_SCENES, "judge": EVAL_SCENES + 60_000}
Images = dict[tuple[str, int], list[Pixels]]


def write_dataset(run: Path, names: Sequence[str]) -> Path:
    """Pairs of the new effects; returns the configuration file."""
    for name in names:
        write_effect_pairs(run / "data" / name, name, PAIRS)
    values = {
        "base": "tiny",
        "output_dir": "extended",
        "effects": [
            row | {"lora": f"teachers/{row['name']}.safetensors"} for row in effect_config(names, Path("data"))
        ],
    }
    path = run / "new.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


def teach_new(config: Config, run: Path, console: Console) -> None:
    """A teacher for each effect, to `run/teachers`."""
    effects = [effect.model_copy(update={"lora": None}) for effect in config.effects]
    teach(config.model_copy(update={"effects": effects, "output_dir": run}), resume="latest", console=console)


Examples = dict[tuple[str, int], Example]  # by effect and scene


def encode(workspace: OpenBase, prompts: dict[str, dict[str, str]], scenes: dict[int, Path]) -> Examples:
    """Every effect on every scene, encoded."""
    return {
        (name, scene): workspace.encoder.encode(Pair((path,), None, None, name, str(path)), name, texts)
        for name, texts in prompts.items()
        for scene, path in scenes.items()
    }


def sample(workspace: OpenBase, method: Method, examples: Examples, num_noises: int = 1) -> Images:
    """So many uint8 images of every effect and scene; a scene has the same noises in every method."""
    images: Images = {}
    keys, batch_size = list(examples), workspace.config.eval.batch_size
    for noise in range(num_noises):
        seeds = [scene % 100_003 + noise * 100_003 for _, scene in examples]
        made = sample_examples(workspace.backbone, method, list(examples.values()), seeds, batch_size)
        for place, image in made:
            images.setdefault(keys[place], []).append(to_uint8(image))
    return images


def sample_collections(config: Config, before: Path, after: Path, scenes: dict[int, Path]) -> dict[str, Images]:
    """Images of the collection before and after, and of the new effects' teachers: at 40 steps, and at the collection's
    number of steps with the base's acceleration LoRA."""
    console = Console(stderr=True)
    workspace = open_base(config, console)
    new = {effect.name: effect.prompt for effect in config.effects}
    catalogue = read_catalogue(after)
    negative = config.objective.negative_prompt
    prompts = {
        entry.name: {"student": entry.prompt, "teacher": new.get(entry.name, ""), "negative": negative}
        for entry in catalogue.effects
    }
    examples = encode(workspace, prompts, scenes)
    workspace.backbone.free_encoders()
    old = {key: example for key, example in examples.items() if key[0] not in new}
    added = {key: example for key, example in examples.items() if key[0] in new}
    few = catalogue.schedule.num_steps
    images: dict[str, Images] = {}
    for name, path in (("before", before), ("after", after)):
        console.print(f"sampling: {name}")
        modules = read_lora(path, workspace.adapters.module_shapes).modules
        workspace.adapters.add_lora(COLLECTION, modules)
        method = collection_method(few, config.schedule.shift, catalogue.sampler)
        images[name] = sample(workspace, method, old, 1)
        if name == "after":
            images[name] |= sample(workspace, method, added, NEW_NOISES)
        workspace.adapters.remove_stack(COLLECTION)
    bank = open_bank(workspace)
    assert bank is not None
    unguided = replace(teacher_sampling(config), guidance=1.0)
    teachers = Method("teachers", len(new), unguided, "teacher", bank.slots_for)
    images["teachers"] = sample(workspace, teachers, added, NEW_NOISES)
    fast = acceleration_of(config)
    assert fast is not None
    workspace.adapters.add_lora(ACCELERATION, read_lora(fast, workspace.adapters.module_shapes).modules)
    stacked = next(m for m in methods(config, bank, [ACCELERATION]) if m.name == "teacher+accel")
    images["teachers, accelerated"] = sample(workspace, stacked, added, NEW_NOISES)
    return images


def figures_of(images: dict[str, Images], new: set[str]) -> dict[str, Any]:
    """BCR, VSA and PSNR of old and new effects, and what extending changed of the old ones' BCR."""
    methods: dict[str, Outputs] = {
        "old, before": images["before"],
        "old, after": {key: value for key, value in images["after"].items() if key[0] not in new},
        "new, after": {key: value for key, value in images["after"].items() if key[0] in new},
        "new, teachers": images["teachers"],
        "new, teachers, accelerated": images["teachers, accelerated"],
    }
    scores = evaluate_methods(methods)
    before, after = scores["old, before"].per_effect, scores["old, after"].per_effect
    changes = {name: after[name].bcr - before[name].bcr for name in before}
    return {
        "rows": [{"effects": name, **row(one)} for name, one in scores.items()],
        "old_bcr_change": round(scores["old, after"].bcr - scores["old, before"].bcr, 4),
        # Effects drawn with replacement.
        "old_bcr_change_interval": [
            round(x, 4) for x in bootstrap_interval({(name,): [c] for name, c in changes.items()})
        ],
        "old_bcr_change_by_effect": {name: round(c, 3) for name, c in sorted(changes.items()) if c},
        "new_bcr_by_effect": {
            name: {
                key: round(scores[row].per_effect[name].bcr, 3)
                for key, row in (
                    ("after", "new, after"),
                    ("teacher", "new, teachers"),
                    ("teacher, accelerated", "new, teachers, accelerated"),
                )
            }
            for name in scores["new, after"].per_effect
        },
    }


def row(scores: MethodScores) -> dict[str, Any]:
    psnr = None if scores.psnr is None else round(scores.psnr, 2)
    return {"bcr": round(scores.bcr, 4), "vsa": round(scores.vsa, 3), "psnr": psnr, "outputs": scores.num_outputs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--new", metavar="NAME,...", help="effects added; default: the next three in the world's order")
    parser.add_argument("--scenes", choices=SCENES, default="judge", help="scenes to choose settings on, or to judge")
    parser.add_argument("--num-scenes", type=int, default=12)
    parser.add_argument("--figures", type=Path, help="write the figures as JSON")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_args()
    console = Console(stderr=True)
    collection = collection_lora("tiny")
    assert collection is not None
    old: Catalogue = read_catalogue(collection)
    following = effect_names(len(old.effects) + 3)[len(old.effects) :]
    names = arguments.new.split(",") if arguments.new else following
    file = write_dataset(arguments.run, names)
    if not all((arguments.run / "teachers" / f"{name}.safetensors").exists() for name in names):
        teach_new(load_config(file, TEACH), arguments.run, console)
    config = load_config(file, arguments.overrides)
    extended = extend(collection, config, "latest", console)  # for other scenes nothing is trained again
    (*_, last) = read_log(config.output_dir / "extend")
    folder = arguments.run / "data" / f"held_out_{arguments.scenes}"
    scenes = write_eval_sources(folder, arguments.num_scenes, first=SCENES[arguments.scenes])
    images = sample_collections(config, collection, extended, scenes)
    figures = {
        "collection": {"effects": len(old.effects), "version": old.version},
        "new": names,
        "scenes": {"use": arguments.scenes, "first": SCENES[arguments.scenes], "count": arguments.num_scenes},
        "overrides": arguments.overrides,
        "extend": config.extend.model_dump(),
        "seconds": round(float(last["seconds"]), 1),
        **figures_of(images, set(names)),
    }
    if arguments.figures:
        arguments.figures.write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()

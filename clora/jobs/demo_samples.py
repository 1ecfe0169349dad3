"""What a demo's methods make of held-out scenes: every method, in every step count that is trained for."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from clora.config import Config, acceleration_lora
from clora.data.examples import Example
from clora.data.image_grid import Pixels, to_uint8
from clora.data.pairs import Pair
from clora.distill.opened import OpenBase
from clora.distill.run import open_bank
from clora.distill.workspace import open_base
from clora.evaluate.baselines import (
    ACCELERATION,
    COARSE,
    COLLECTION,
    JOINT,
    JOINT_STUDENT,
    STACKED,
    Method,
    methods,
    sample_examples,
)
from clora.lora.files import read_lora
from clora.method.prompts import effect_prompts
from clora.tiny.dataset import EVAL_SCENES

Images = dict[tuple[str, int], NDArray[np.uint8]]


def held_out(out: Path, count: int) -> dict[int, Path]:
    """The held-out pictures of a run in the folder `out`, by scene."""
    return {EVAL_SCENES + i: out / "data" / "held_out" / f"{i:03d}.png" for i in range(count)}


def sample_all(config: Config, sources: Mapping[int, Path], out: Path, console: Console) -> None:
    """Every method's images of every effect on the held-out scenes, to `samples/METHOD.npz`, with times."""
    workspace = open_base(config, console)
    examples = encode_held_out(workspace, sources)
    found = load_methods(workspace, out)
    folder = out / "samples"
    folder.mkdir(exist_ok=True)
    for method in found:
        path = folder / f"{method.name}.npz"
        if path.exists():
            continue
        console.print(f"sampling {method.name} ({method.nfe} forwards an image)")
        images, seconds = sample_held_out(workspace, method, examples)
        arrays: dict[str, Any] = {f"{effect}|{scene}": image for (effect, scene), image in images.items()}
        arrays |= {"seconds": seconds, "nfe": method.nfe, "num_loras": method.num_loras}
        np.savez(path.with_suffix(".tmp.npz"), **arrays)
        path.with_suffix(".tmp.npz").rename(path)


def encode_held_out(workspace: OpenBase, sources: Mapping[int, Path]) -> dict[tuple[str, int], Example]:
    """Every effect on every held-out scene, encoded."""
    config = workspace.config
    student = {prompt.name: prompt.student_prompt for prompt in effect_prompts(config)}
    negative = config.objective.negative_prompt
    examples = {}
    for effect in config.effects:
        texts = {"student": student[effect.name], "teacher": effect.prompt, "negative": negative}
        for scene, path in sources.items():
            pair = Pair((path,), None, None, effect.name, str(path))
            examples[effect.name, scene] = workspace.encoder.encode(pair, effect.name, texts)
    workspace.backbone.free_encoders()
    return examples


def load_methods(workspace: OpenBase, out: Path) -> list[Method]:
    """Load every adapter a method needs into slots of its own."""
    adapters, accelerate = workspace.adapters, acceleration_lora(workspace.config.base.model)
    files = {
        COLLECTION: out / "collection.safetensors",
        JOINT: out / "joint.safetensors",
        JOINT_STUDENT: out / JOINT_STUDENT / "collection.safetensors",
        COARSE: out / "coarse.safetensors",
    }
    if accelerate is not None:
        files[ACCELERATION] = accelerate
    for slot, path in files.items():
        adapters.add_lora(slot, read_lora(path, adapters.module_shapes).modules)
    bank = open_bank(workspace)
    assert bank is not None
    return in_every_count(workspace.config, lambda config: methods(config, bank, files))


def in_every_count(config: Config, made: Callable[[Config], list[Method]]) -> list[Method]:
    """The methods in the schedule's number of steps, and in the other step counts that the student is trained for."""
    found = {method.name: method for method in made(config)}
    schedule = config.schedule
    for count in dict.fromkeys(count for count in schedule.trained_counts if count != schedule.num_steps):
        for method in made(config.with_values(schedule={"num_steps": count})):
            if method.nfe == count and not method.name.startswith("teacher-"):  # whose name tells it
                method = replace(method, name=f"{method.name}, {count} steps")
            found.setdefault(method.name, method)
    return list(found.values())


def sample_held_out(
    workspace: OpenBase, method: Method, examples: dict[tuple[str, int], Example]
) -> tuple[Images, float]:
    """uint8 images by (effect, scene), and seconds per image; the same seed for a scene in every method."""
    keys, seeds = list(examples), [scene % 100_003 for _, scene in examples]
    batch_size = workspace.config.eval.batch_size
    started = time.perf_counter()
    made = sample_examples(workspace.backbone, method, list(examples.values()), seeds, batch_size)
    images = {keys[place]: to_uint8(image) for place, image in made}
    return images, (time.perf_counter() - started) / len(images)


def read_samples(folder: Path) -> Iterator[tuple[str, dict[str, Any], dict[tuple[str, int], list[Pixels]]]]:
    """Name, figures and outputs of every sampled method."""
    for path in sorted(folder.glob("*.npz")):
        with np.load(path) as stored:
            figures = {key: stored[key].item() for key in ("seconds", "nfe", "num_loras")}
            outputs: dict[tuple[str, int], list[Pixels]] = {}
            for key in stored.files:
                if "|" in key:
                    effect, scene = key.split("|")
                    outputs[effect, int(scene)] = [stored[key]]
        yield path.stem, figures, outputs


def table_order(nfe: Mapping[str, int]) -> list[str]:
    """Methods by falling forwards an image; of as many: teachers, LoRAs with the acceleration LoRA, the collection."""
    places = {name: place for place, name in enumerate(("teacher+accel", *STACKED, COLLECTION))}
    return sorted(nfe, key=lambda name: (-nfe[name], places.get(name.split(", ")[0], -1)))

"""What a benchmark's method loads and asks for each effect, how it samples, and what it costs to keep and to run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from clora.evaluate.bench_made import Made
from clora.evaluate.benchmark import BenchEffect, Benchmark, BenchMethod, lora_files, lora_of
from clora.evaluate.router import route
from clora.inference.edit_prompts import edit_prompt, find_catalogue
from clora.inference.editor import default_sampling
from clora.inference.sampling import Sampling
from clora.io.digest import file_digest


class Asked(NamedTuple):
    """What one effect is made with: the LoRA file, and what the model reads."""

    lora: Path
    prompt: str


class Cost(NamedTuple):
    """Of serving all effects: LoRAs kept ready, their size on disk, forwards an image, the share of effects that the
    router finds. None: not known, or no router."""

    num_loras: int | None = None
    storage_mb: float | None = None
    nfe: int | None = None
    routed_right: float | None = None


def asked(bench: Benchmark, method: BenchMethod, name: str) -> Asked:
    """What a method that makes its pictures loads and asks for an effect.

    Raises `InputError` for an effect that the method's collection does not hold.
    """
    effects = {effect.name: effect for effect in bench.effects}
    effect = effects[routed(bench, effects[name])] if method.route else effects[name]
    lora = method.lora or lora_of(method, effect.name)
    assert lora is not None
    catalogue = find_catalogue(lora)
    if catalogue is not None:
        return Asked(lora, edit_prompt(catalogue, effect.of or (effect.name,)))
    text = effect.instruction if method.ask == "instruction" else effect.student_prompt
    return Asked(lora, edit_prompt(None, (), text))


def routed(bench: Benchmark, effect: BenchEffect) -> str:
    """The effect that a router takes a request for this one to be about: descriptions are the criteria."""
    descriptions = {one.name: one.criteria or one.instruction for one in bench.effects}
    return route(effect.student_prompt or effect.instruction, descriptions)


def sampling_of(bench: Benchmark, method: BenchMethod, lora: Path) -> Sampling:
    """How a method that makes its pictures samples with one of its LoRA files."""
    sampling = default_sampling(bench.base, find_catalogue(lora), method.accelerate is not None)
    return sampling.changed(method.steps, method.guidance)


def recipes(bench: Benchmark, method: BenchMethod, effects: Sequence[str]) -> dict[str, Made]:
    """How a method makes its pictures of each effect: all that decides them but the source and the seed.

    A base is known by its name alone, for its files may be tens of gigabytes. Raises `InputError` where a LoRA file
    cannot be read, or a collection lacks an effect.
    """
    found: dict[str, Made] = {}
    for effect in dict.fromkeys(effects):
        lora, prompt = asked(bench, method, effect)
        sampling = sampling_of(bench, method, lora)
        found[effect] = {
            "base": Path(bench.base).name if Path(bench.base).is_dir() else bench.base,
            "LoRA": file_digest(lora).hex(),
            "acceleration LoRA": None if method.accelerate is None else file_digest(method.accelerate).hex(),
            "prompt": prompt,
            "sampler": sampling.sampler,
            "steps": sampling.num_steps,
            "shift": sampling.shift,
            "guidance": sampling.guidance,
            # Without guidance neither has an effect.
            "guidance rescale": sampling.rescale if sampling.is_guided else None,
            "negative prompt": sampling.negative_prompt if sampling.is_guided else None,
        }
    return found


def cost_of(bench: Benchmark, method: BenchMethod) -> Cost:
    """What a method costs: counted, or as its section says where its pictures were made elsewhere."""
    if method.images is not None:
        return Cost(method.num_loras, method.storage_mb, method.nfe)
    files = lora_files(bench, method)
    right = [routed(bench, effect) == effect.name for effect in bench.effects] if method.route else None
    return Cost(
        len(files),
        round(sum(file.stat().st_size for file in files) / 1e6, 3),
        sampling_of(bench, method, files[0]).num_forwards,
        None if right is None else sum(right) / len(right),
    )

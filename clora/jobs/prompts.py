"""`clora prompts`: triggers and student prompts of every effect, in a file that `effects:` can name."""

from __future__ import annotations

import json
import logging
import os
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
from PIL import Image

from clora.config import Config, EffectConfig
from clora.data.images import load_image
from clora.data.pairs import read_pairs
from clora.errors import InputError, raise_faults
from clora.io.atomic import write_text
from clora.jobs.prompt_rewriting import rewrite_prompt
from clora.method.prompts import EffectPrompt, make_triggers, offline_prompt

log = logging.getLogger(__name__)

ImagePairs = list[tuple[Image.Image, Image.Image]]


def write_prompts(
    config: Config,
    output: Path | None = None,
    client: httpx.Client | None = None,
) -> list[EffectPrompt]:
    """Write the effects with trigger and student prompt filled in, as JSONL that `effects:` can name.

    With `prompts.endpoint` set, a vision model rewrites the prompt of every effect that has no
    `student_prompt` and at least two pairs. `output`
    defaults to `effects.jsonl` in `output_dir`; answers are kept beside it, so that a second call asks only
    for what is missing. Raises `InputErrors` with every effect that failed, and writes nothing then.
    """
    output = output or config.output_dir / "effects.jsonl"
    triggers = make_triggers(config.effects, config.seed, config.prompts.trigger_scheme)
    cache = output.parent / "prompt_cache"

    def one(effect: EffectConfig) -> EffectPrompt | list[str]:
        try:
            return _write_one(config, effect, triggers[effect.name], cache, client)
        except InputError as error:
            return [f"effect '{effect.name}': {fault}" for fault in error.faults]

    with ThreadPoolExecutor(max_workers=4) as pool:  # an endpoint's answer takes seconds
        results = list(pool.map(one, config.effects))
    raise_faults([fault for result in results if isinstance(result, list) for fault in result])
    prompts = [result for result in results if isinstance(result, EffectPrompt)]
    lines = [
        json.dumps(_effect_row(config, effect, prompt), ensure_ascii=False)
        for effect, prompt in zip(config.effects, prompts, strict=True)
    ]
    write_text(output, "".join(f"{line}\n" for line in lines))
    return prompts


def _write_one(
    config: Config,
    effect: EffectConfig,
    trigger: str,
    cache: Path,
    client: httpx.Client | None,
) -> EffectPrompt:
    if effect.student_prompt or config.prompts.endpoint is None:
        return offline_prompt(effect, trigger)
    pairs = example_pairs(config, effect)
    if len(pairs) < 2:
        log.warning("effect '%s' has no two pairs to show; its prompt is made from the template", effect.name)
        return offline_prompt(effect, trigger)
    images = [image for pair in pairs[:2] for image in pair]
    text = rewrite_prompt(effect.prompt, images, config.prompts, cache, client=client)
    return EffectPrompt(effect.name, effect.prompt, trigger, text, "vision model")


def _effect_row(config: Config, effect: EffectConfig, prompt: EffectPrompt) -> dict[str, Any]:
    filled = effect.model_copy(update={"trigger": prompt.trigger, "student_prompt": prompt.text})
    values = filled.model_dump(mode="json", exclude_none=True)
    # Paths stay relative to the configuration file, as they are in every effects file.
    return {
        key: os.path.relpath(value, config.folder) if key in ("lora", "pairs") else value
        for key, value in values.items()
    }


def example_pairs(config: Config, effect: EffectConfig, count: int = 2) -> ImagePairs:
    """`count` pairs of the effect as RGB images, drawn by the configuration's seed, to rewrite its prompt.

    Effects without pairs, or whose pairs have no targets, give an empty list.
    """
    if effect.pairs is None:
        return []
    pairs = read_pairs(effect.pairs, config.data_roots, require_target=False, effect=effect.name)
    complete = [(pair.source, pair.target) for pair in pairs if pair.target is not None]
    chosen = random.Random(f"{config.seed}/{effect.name}").sample(complete, min(count, len(complete)))
    return [(load_image(source), load_image(target)) for source, target in chosen]

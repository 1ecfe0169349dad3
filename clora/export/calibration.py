"""What a served network sees when it edits: edits of a catalogue's effects, with its inputs watched for scales."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from PIL import Image
from torch import Tensor, nn

from clora.backbones.cond import make_cond
from clora.backbones.load import load_backbone, rotary_positions
from clora.export.graph_velocity import GraphVelocity
from clora.export.manifest import Limits
from clora.export.quantize import Choice, Inputs, Numbers, choose, watched
from clora.inference.sampling import few_step_sampling, follow
from clora.lora.catalogue import Catalogue

MOST_EDITS = 16
MOST_CASES = 4  # forwards on which costs are measured, once a layer


def calibrate(
    network: nn.Module,
    base: str,
    catalogue: Catalogue,
    images: Sequence[Image.Image],
    limits: Limits,
    dtype: torch.dtype,
    numbers: Numbers,
) -> Choice:
    """Sample edits of the images (RGB) with the catalogue's effects in turn, and choose from what the network then sees
    which of its linears take eight bits. The costs are measured at steps spread over the schedule."""
    backbone = load_backbone(base, "cpu", dtype, ("vae", "text_encoder"))
    schedule = catalogue.schedule
    sampling = few_step_sampling(schedule.num_steps, schedule.shift, catalogue.sampler)
    seen: list[Inputs] = []

    def run(*inputs: Tensor) -> Tensor:
        seen.append(tuple(value.clone() for value in inputs))
        velocity: Tensor = network(*inputs)
        return velocity

    positions = partial(rotary_positions, base)
    velocity = GraphVelocity(run, base, positions, schedule.num_steps, schedule.shift, limits, dtype)
    prompts = [effect.prompt for effect in catalogue.effects]
    number = min(MOST_EDITS, max(len(images), len(prompts)))
    with watched(network) as most:
        for edit in range(number):
            prompt, image = prompts[edit % len(prompts)], images[edit % len(images)]
            text, refs = backbone.encode_prompts([prompt], [[image]]), [backbone.encode_references([image])]
            cond = make_cond(text, refs, backbone.grid(backbone.output_size(image)))
            follow(backbone, velocity, cond, sampling, [edit], pipeline_noise=True)
    spread = range(0, len(seen), max(1, len(seen) // MOST_CASES + 1))
    return choose(network, most, [seen[index] for index in spread], numbers)

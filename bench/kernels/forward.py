"""One forward of the whole transformer, random weights: `python -m bench.kernels.forward [--json] [--rounds N]`.

60 layers of full width, or 20 with `--size full-20`, 1024 x 1024 pixels with one reference (8192 image tokens), 512
text tokens, batch 1, bf16. "merged" is the transformer alone, as after a LoRA is merged into its weights; "rank 128"
has an unmerged adapter on every linear, PEFT's in diffusers' ways. "eager" is diffusers as it comes, "compiled"
diffusers with the fastest attention here and `compile_repeated_blocks`, "ours" clora's blocks, "ours_compiled" those
compiled likewise. All hold the same weights. Bytes are a floor: every weight once, and every block's hidden states in
and out. Checked first at a narrow width, as in `bench.kernels.block`. Without a GPU two narrow layers run, and ours is
plain torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from bench.kernels.block import FULL, SMALL, Models, check, make_models, sharing_weights, using
from bench.kernels.timing import Case, run
from bench.training.cycle_models import CHANNELS, Size, random_transformer
from clora.backbones.qwen_image.block import fastest_attention

SIZES = {
    "small": replace(SMALL, transformer={**SMALL.transformer, "num_layers": 2}),
    "full-20": replace(FULL, transformer={"num_layers": 20}),
    "full": replace(FULL, transformer={"num_layers": 60}),
}


def forward(transformer: Callable[..., Any], inputs: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        velocity: Tensor = transformer(**inputs)[0]
    return velocity


def make_inputs(size: Size, device: str) -> dict[str, Any]:
    """Latents of result and reference, text and time, in the transformer's argument names."""
    rng = torch.Generator(device).manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng, device=device).to(size.dtype)

    return {
        "hidden_states": normal(1, 2 * size.grid[0] * size.grid[1], CHANNELS),
        "encoder_hidden_states": normal(1, size.text_tokens, size.text_width),
        "timestep": torch.full((1,), 0.75, device=device, dtype=size.dtype),
        "img_shapes": [[(1, *size.grid)] * 2],
        "return_dict": False,
    }


def add_compiled(models: Models) -> None:
    """Both ways once more, with the fastest attention and each block compiled."""
    models["compiled"], models["ours_compiled"] = (sharing_weights(models[way]) for way in ("eager", "ours"))
    for way in ("compiled", "ours_compiled"):
        if (backend := fastest_attention()) is not None:
            models[way].set_attention_backend(backend)
        for block in models[way].transformer_blocks:  # what `compile_repeated_blocks` does to the stock class
            block.compile(fullgraph=True, dynamic=False)


def count(transformer: Any, inputs: dict[str, Any]) -> tuple[int, int]:
    """Bytes (a floor) and FLOPs of a forward."""
    with FlopCounterMode(display=False) as counter:
        forward(transformer, inputs)
    weights = sum(parameter.nbytes for parameter in transformer.parameters())
    tokens = inputs["hidden_states"].shape[1] + inputs["encoder_hidden_states"].shape[1]
    states = tokens * transformer.inner_dim * inputs["hidden_states"].itemsize
    return weights + 2 * len(transformer.transformer_blocks) * states, counter.get_total_flops()


def make_case(transformer: Any, size: Size, rank: int | None, device: str) -> Case:
    models, adapters = make_models(transformer, rank)
    if device == "cuda":
        add_compiled(models)
    inputs = make_inputs(size, device)
    ways: dict[str, Callable[[], object]] = {}
    for way, model in models.items():
        call = model if adapters is None or "ours" not in way else using(adapters, model)
        ways[way] = partial(forward, call, inputs)
    name = f"{size.transformer['num_layers']} layers, {size.width} wide, {size.sequence} tokens, "
    name += "merged" if rank is None else f"rank {rank}"
    return Case(name, partial(check, SMALL, device, size.dtype), ways, *count(models["eager"], inputs))


def all_cases(device: str, size_name: str) -> list[Case]:
    size = SIZES[size_name]
    transformer = random_transformer(size, device)  # whose weights all ways of both cases hold
    return [make_case(transformer, size, rank, device) for rank in (None, size.rank)]


if __name__ == "__main__":
    run("forward", __doc__, all_cases, tuple(SIZES))

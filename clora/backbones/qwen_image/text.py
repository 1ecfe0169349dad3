"""Prompts of a Qwen-Image base: counted with its tokenizer, encoded in the stock pipeline's template.

Shape legend: L text tokens, D text width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from clora.backbones.qwen_image.sizes import condition_size
from clora.errors import InputError


def count_tokens(pipeline: Any, prompt: str) -> int:
    """Tokens of a prompt's own words, without template and images."""
    return len(pipeline.tokenizer(prompt)["input_ids"])


def longest_prompt(pipeline: Any) -> int:
    """Tokens: the pipeline's limit, or what the text encoder's positions leave beside the template."""
    template = count_tokens(pipeline, pipeline.prompt_template_encode.format(""))
    return int(min(pipeline.tokenizer_max_length, pipeline.text_positions - template))


@torch.no_grad()
def encode_prompt(
    pipeline: Any, prompt: str, references: Sequence[Image.Image], area: int, device: torch.device
) -> Tensor:
    """Embeddings (L, D) of one prompt with its reference images (RGB), shown to the text encoder at `area` pixels.

    One prompt at a time: the pipeline cannot tell which image belongs to which prompt. Raises `InputError` where they
    are longer together than the text encoder can take; nothing is ever cut off.
    """
    length, limit = count_tokens(pipeline, prompt), longest_prompt(pipeline)
    if length > limit:
        raise InputError(f"prompt {prompt[:60]!r}... has {length} tokens, the limit is {limit}; shorten it")
    small = [condition_image(pipeline, image, area) for image in references]
    text, mask = pipeline.encode_prompt([prompt], small or None, device=device)
    embedding: Tensor = text[0] if mask is None else text[0][mask[0].bool()]
    return embedding


def condition_image(pipeline: Any, image: Image.Image, area: int) -> Image.Image:
    """A reference image as the stock pipeline shows it to the text encoder."""
    small: Image.Image = pipeline.image_processor.resize(image, *condition_size(image.size, area))
    return small

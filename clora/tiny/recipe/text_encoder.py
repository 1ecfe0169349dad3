"""The tiny world's text side: a small BPE tokenizer and a frozen, randomly initialised Qwen2.5-VL.

`python -m clora.tiny.recipe.text_encoder --out clora/tiny/base` writes `tokenizer/`, `processor/` and `text_encoder/`.
A frozen random text model is enough here: its residual stream keeps every word's identity (tests/tiny probes it
linearly) and the transformer's rotary embedding gives the order. The tokenizer must be a BPE, not bytes: the pipeline
drops the first 64 tokens of its prompt template, which is the whole system prompt only if its words are single tokens.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from diffusers import QwenImageEditPlusPipeline
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from clora.tiny.effects import EFFECTS
from clora.tiny.instructions import generic_edit
from clora.tiny.world.scenes import render, sample_scene

SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
VISION_SIDE = 56  # 4 x 4 patches of 14 pixels, merged 2 x 2: four vision tokens an image
COMPOSITION = "Please apply {A} to the input image, and then apply {B}."


def prompt_template() -> str:
    """The stock pipeline's own prompt template with one picture."""
    pipeline = QwenImageEditPlusPipeline(None, None, None, None, None, None)
    template: str = pipeline.prompt_template_encode
    return template.format("Picture 1: <|vision_start|><|image_pad|><|vision_end|>{}")


def corpus(count: int = 6000) -> list[str]:
    """Template, effect prompts and generic instructions; the template often enough that its words are whole."""
    rendered = render(sample_scene(0), 32)
    instructions = [generic_edit(rendered, np.random.default_rng(seed))[0] for seed in range(count)]
    effects = [text for effect in EFFECTS.values() for text in (effect.prompt, effect.student_prompt)]
    return instructions + effects * 40 + [prompt_template(), COMPOSITION] * 400


def train_tokenizer(vocabulary: int = 1100) -> Qwen2Tokenizer:
    """A byte-level BPE with Qwen2's own pre-tokenisation, about `vocabulary` entries."""
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    bpe.decoder = decoders.ByteLevel()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - len(SPECIAL), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    text = corpus()
    for special in SPECIAL:
        text = [line.replace(special, "") for line in text]
    bpe.train_from_iterator(text, trainer)
    vocab = bpe.get_vocab()
    merges = [tuple(pair) for pair in _merges(bpe)]
    return Qwen2Tokenizer(
        vocab=vocab, merges=merges, additional_special_tokens=SPECIAL[1:], eos_token=SPECIAL[2], pad_token=SPECIAL[0]
    )


def _merges(bpe: Tokenizer) -> list[list[str]]:
    merges: list[list[str]] = json.loads(bpe.to_str())["model"]["merges"]
    return merges


def make_text_encoder(tokenizer: Qwen2Tokenizer, seed: int = 0) -> Qwen2_5_VLForConditionalGeneration:
    """Two layers, width 96, weights N(0, .02), fp32: about 0.5 M parameters."""
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in SPECIAL}
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 96,
            "intermediate_size": 192,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "max_position_embeddings": 1024,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 4, 4]},
            "bos_token_id": ids["<|endoftext|>"],
            "eos_token_id": ids["<|im_end|>"],
            "tie_word_embeddings": True,
        },
        vision_config={
            "depth": 2,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 4,
            "out_hidden_size": 96,
            "window_size": 56,
            "fullatt_block_indexes": [1],
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )
    torch.manual_seed(seed)
    return Qwen2_5_VLForConditionalGeneration(config).eval().requires_grad_(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    tokenizer = train_tokenizer()
    area = VISION_SIDE**2
    size = {"shortest_edge": area, "longest_edge": area}
    processor = Qwen2VLImageProcessorPil(min_pixels=area, max_pixels=area, size=size)
    prefix = prompt_template().split("Picture 1")[0]
    length = len(tokenizer(prefix)["input_ids"])
    if length != 64:
        raise SystemExit(f"the template's prefix has {length} tokens, the pipeline drops 64: change the vocabulary")
    tokenizer.save_pretrained(arguments.out / "tokenizer")
    tokenizer.save_pretrained(arguments.out / "processor")
    processor.save_pretrained(arguments.out / "processor")
    make_text_encoder(tokenizer, arguments.seed).half().save_pretrained(arguments.out / "text_encoder")


if __name__ == "__main__":
    main()

"""A Qwen-Image-Edit base of random weights in diffusers format, small enough to build in a second."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImageEditPlusPipeline,
    QwenImageTransformer2DModel,
)
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
]
SPECIAL += ["<|video_pad|>"]
AREA = 64 * 64


def random_transformer(seed: int = 0, **config: Any) -> QwenImageTransformer2DModel:
    """Two blocks of width 48, every parameter random (the stock start leaves biases zero), fp32."""
    torch.manual_seed(seed)
    settings = {
        "num_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 3,
        "joint_attention_dim": 32,
    }
    settings |= {"axes_dims_rope": (4, 6, 6), **config}
    model = QwenImageTransformer2DModel(**settings)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


def random_vae(seed: int = 0) -> AutoencoderKLQwenImage:
    torch.manual_seed(seed)
    spread = torch.linspace(-0.2, 0.3, 16).tolist(), torch.linspace(0.5, 2.0, 16).tolist()
    return AutoencoderKLQwenImage(
        base_dim=8,
        dim_mult=[1, 1, 2],
        num_res_blocks=1,
        z_dim=16,
        temperal_downsample=[False, False],
        latents_mean=spread[0],
        latents_std=spread[1],
    ).eval()


def template_tokenizer() -> Qwen2Tokenizer:
    """A byte-level BPE to which every word of the pipeline's prompt template is one token."""
    template = QwenImageEditPlusPipeline(None, None, None, None, None, None).prompt_template_encode
    for special in SPECIAL:
        template = template.replace(special, "")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=2000, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator([template + " Picture 1: paint it"] * 2, trainer)
    merges = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    return Qwen2Tokenizer(
        vocab=bpe.get_vocab(),
        merges=merges,
        additional_special_tokens=SPECIAL[1:],
        eos_token=SPECIAL[2],
        pad_token=SPECIAL[0],
    )


def random_text_encoder(
    tokenizer: Qwen2Tokenizer, seed: int = 0, width: int = 32
) -> Qwen2_5_VLForConditionalGeneration:
    torch.manual_seed(seed)
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in SPECIAL}
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": width,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": width // 16,
            "num_key_value_heads": width // 16,
            "max_position_embeddings": 192,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
            "bos_token_id": ids["<|endoftext|>"],
            "eos_token_id": ids["<|im_end|>"],
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "out_hidden_size": width,
            "window_size": 56,
            "fullatt_block_indexes": [1],
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    model = Qwen2_5_VLForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)  # so that attention, and with it every position, shows in the output
    return model


def write_random_base(
    folder: Path, area: int = AREA, dtype: torch.dtype = torch.float32, **transformer_config: Any
) -> Path:
    """Save all pieces in `dtype`, `model_index.json` and `clora.json` (64 x 64 pixels) under `folder`."""
    tokenizer = template_tokenizer()
    width = transformer_config.get("joint_attention_dim", 32)
    side = int(area**0.5)
    # 4 x 8 patches of 14 pixels at most, merged 2 x 2.
    image_processor = Qwen2VLImageProcessorPil(size={"shortest_edge": 28 * 28, "longest_edge": 56 * 112})
    pieces = {
        "transformer": ("diffusers", random_transformer(**transformer_config).to(dtype)),
        "vae": ("diffusers", random_vae()),
        "scheduler": ("diffusers", FlowMatchEulerDiscreteScheduler()),
        "text_encoder": ("transformers", random_text_encoder(tokenizer, width=width).to(dtype)),
        "tokenizer": ("transformers", tokenizer),
        "processor": ("transformers", image_processor),
    }
    index: dict[str, Any] = {"_class_name": "QwenImageEditPlusPipeline", "_diffusers_version": "0.42.1"}
    for name, (library, piece) in pieces.items():
        piece.save_pretrained(folder / name)
        index[name] = [library, type(piece).__name__]
    tokenizer.save_pretrained(folder / "processor")
    index["processor"] = ["transformers", "Qwen2VLProcessor"]
    (folder / "model_index.json").write_text(json.dumps(index))
    sizes = {"vae_image_area": area, "condition_image_area": area, "default_size": [side, side]}
    (folder / "clora.json").write_text(json.dumps(sizes))
    return folder

"""What in a LoRA file is not for a Qwen-Image transformer: whose it looks like, by the names of its keys.

Sources of the names: the model classes of diffusers, and the original layouts that ComfyUI and musubi-tuner load.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from clora.lora.keys import layout_of, unwrapped

FAMILY = "Qwen-Image"

_ENCODERS = re.compile(
    r"(?:base_model\.model\.|module\.|pipe\.|lora_|lycoris_)*"
    r"(?:text_encoders?|te|text_model|cond_stage_model|conditioner|clip_[lg]|t5xxl|llm)\d?(?:_\d)?[._]"
)

# Tensors beside or instead of a plain LoRA's, by what their keys contain: what they are, and the mend.
_PLAIN = "train or export it as LoRA"
_KINDS = (
    ("lora_mid|lokr_t[12]|hada_t[12]", "a Tucker factor of a convolution, which this transformer has none of", _PLAIN),
    ("oft_|boft_", "OFT's, which turns the base's own weights", _PLAIN),
    (r"\.[ab][12]\.weight$", "GLoRA's, which needs the base's own weights", _PLAIN),
    ("on_input$|ia3_", "IA3's, which scales the base's activations", _PLAIN),
    (r"diff_b$|\.lora_[AB]\.bias$|lora_(up|B)\.bias$|\.bias$", "a change of a bias, which a LoRA cannot hold", _PLAIN),
    (
        r"lora_embedding_|bundle_emb|emb_params|string_to_param|modules_to_save",
        "of an embedding or a layer trained in full beside the LoRA",
        "train it without",
    ),
    (r"w_norm$|b_norm$|\.set_weight$|reshape_weight$", "for a weight that replaces the base's own", _PLAIN),
    (
        r"scaled_fp8|weight_scale|scale_weight|scale_inv|absmax|quant_state|quant_map",
        "of quantized weights with scales of their own",
        "save the LoRA as bfloat16",
    ),
    (r"\.scalar$", "a trained scalar of LyCORIS", "save the LoRA with LyCORIS's own export, which multiplies it in"),
)
_COMPILED_KINDS = tuple((re.compile(marks), what, mend) for marks, what, mend in _KINDS)

# Whose names these are; the first that fits is told, so marks of one model stand before those that several share.
# `~` stands for a dot or the underscore of flat names, `#` for a number.
_MODELS = (
    ("Qwen-Image 2.1", r"img_mlp~(?:gate_layer|out|proj)$|^modulation~#$"),
    ("Chroma", "distilled_guidance_layer"),
    ("AuraFlow", "joint_transformer_blocks"),
    ("HiDream", "(?:double|single)_stream_blocks"),
    ("Kandinsky 5", "(?:visual|text)_transformer_blocks"),
    (
        "HunyuanVideo",
        r"token_refiner|double_blocks~#~(?:img|txt)_(?:mlp~fc#|mlp_fc#|mod~linear|mod_linear)"
        r"|double_blocks\.#\.(?:img|txt)_attn_|single_blocks~#~modulation~linear",
    ),
    ("FLUX.2", r"to_qkv_mlp_proj|ff(?:_context)?~linear_(?:in|out)|(?:single|double)_stream_modulation"),
    ("FLUX.1 (dev, Kontext) or a model built like it", "single_transformer_blocks|single_blocks|double_blocks"),
    ("Mochi", "^blocks~#~attn~(?:qkv|proj)_[xy]|transformer_blocks~#~attn1~add_[qkv]_proj"),
    ("Stable Diffusion 3 or FLUX.1", "joint_blocks|transformer_blocks~#~(?:ff_context|norm1_context)"),
    (
        "Stable Diffusion 1.5 or SDXL",
        "^(?:down_blocks|up_blocks|mid_block|input_blocks|output_blocks|middle_block)~",
    ),
    ("Cosmos", "^blocks~#~(?:(?:self|cross)_attn~[qkv]_proj|adaln_modulation|mlp~layer)"),
    ("Wan", "^blocks~#~(?:self_attn|cross_attn|attn[12]|ffn)~"),
    ("Z-Image or Lumina", "^(?:layers~#~(?:attention|feed_forward|adaLN_modulation|attn)|(?:noise|context)_refiner)~"),
    ("LTX-Video, PixArt, Sana or CogVideoX", "transformer_blocks~#~attn[12]~"),
    ("a language model", "layers~#~(?:self_attn~[qkvo]_proj|mlp~(?:gate|up|down)_proj)"),
)
_COMPILED_MODELS = tuple(
    (model, re.compile(marks.replace("~", "[._]").replace("#", r"\d+"))) for model, marks in _MODELS
)

# Widths of models whose attention layers have the names of Qwen-Image's.
_OTHER_WIDTHS = {1536: "Stable Diffusion 3", 2432: "Stable Diffusion 3.5"}


def is_text_encoder(key: str) -> bool:
    """Whether a key belongs to a text encoder."""
    return _ENCODERS.match(key) is not None


def other_kind(key: str) -> tuple[str, str] | None:
    """What a tensor that is no part of a LoRA is, and the mend; None when unknown."""
    return next(((what, mend) for marks, what, mend in _COMPILED_KINDS if marks.search(key)), None)


def model_of(stems: Iterable[str]) -> str | None:
    """The model that these names of modules look like, None when they look like none that is known."""
    names = []
    for stem in stems:
        layout, rest = layout_of(stem)
        names.append(unwrapped(rest, layout)[-1])
    for model, marks in _COMPILED_MODELS:
        if any(marks.search(name) for name in names):
            return model
    return None


def model_of_width(width: int) -> str | None:
    """The other model with layers of the same names that is this wide."""
    return _OTHER_WIDTHS.get(width)

"""Loading the pieces of a stock `QwenImageEditPlusPipeline`, and the two faults of the stock stack mended
here.

Without torchvision transformers cannot build `Qwen2VLProcessor`, whose video half is never used: see
`StillImageProcessor`. Under transformers 5 the pipeline forgets to pass `mm_token_type_ids`, so the text
encoder silently loses the 3-D positions of reference images (diffusers issue 14194): see `pass_token_types`.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImageEditPlusPipeline,
    QwenImageTransformer2DModel,
)
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import logging as diffusers_logging
from torch import nn
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen2VLProcessor,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.utils import logging as transformers_logging
from transformers.utils.import_utils import is_torchvision_available

from clora.errors import InputError


class StillImageProcessor(Qwen2VLProcessor):
    """The stock processor without its video half."""

    @classmethod
    def get_attributes(cls) -> list[str]:
        return ["image_processor", "tokenizer"]


def load_pipeline(base: str, folder: Path, dtype: torch.dtype, components: Sequence[str]) -> Any:
    """The stock pipeline from a folder (called `base` in messages), with None for the components left out.

    It carries `text_positions`, the longest sequence of its text encoder. Raises `InputError` for pieces that do not
    fit each other, or a tokenizer the prompt template was not made for.
    """

    # Their progress bars for loading weights would tear ours apart.
    transformers_logging.disable_progress_bar()
    diffusers_logging.disable_progress_bar()

    def load(cls: Any, name: str, **kwargs: Any) -> Any:
        return cls.from_pretrained(folder, subfolder=name, **kwargs)

    def optional(cls: Any, name: str, **kwargs: Any) -> Any:
        return load(cls, name, **kwargs) if name in components else None

    vae_config = AutoencoderKLQwenImage.load_config(folder, subfolder="vae")
    _check_config(base, QwenImageTransformer2DModel.load_config(folder, subfolder="transformer"), vae_config)
    tokenizer = load(Qwen2Tokenizer, "tokenizer")
    pipeline_class: Any = QwenImageEditPlusPipeline
    pipeline = pipeline_class(
        scheduler=load(FlowMatchEulerDiscreteScheduler, "scheduler"),
        vae=optional(AutoencoderKLQwenImage, "vae", torch_dtype=dtype),
        text_encoder=optional(Qwen2_5_VLForConditionalGeneration, "text_encoder", dtype=dtype),
        tokenizer=tokenizer,
        processor=_load_processor(load, tokenizer),
        transformer=optional(QwenImageTransformer2DModel, "transformer", torch_dtype=dtype),
    )
    # The pipeline takes these from its VAE and guesses without one.
    pipeline.vae_scale_factor = 2 ** len(vae_config["temperal_downsample"])
    pipeline.latent_channels = vae_config["z_dim"]
    pipeline.image_processor = VaeImageProcessor(vae_scale_factor=2 * pipeline.vae_scale_factor)
    pipeline.text_positions = load(Qwen2_5_VLConfig, "text_encoder").text_config.max_position_embeddings
    _check_template(base, pipeline)
    for name in components:
        getattr(pipeline, name).requires_grad_(False).eval()
    if pipeline.text_encoder is not None:
        pass_token_types(pipeline.text_encoder)
    return pipeline


def count_encoder_parameters(vae: Mapping[str, Any], text_encoder: Mapping[str, Any]) -> dict[str, int]:
    """Parameters of the VAE and the text encoder ("vae", "text_encoder"), from their config.json."""
    vae_class: Any = AutoencoderKLQwenImage
    with torch.device("meta"):
        models = {
            "vae": vae_class.from_config(dict(vae)),
            "text_encoder": Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig.from_dict(dict(text_encoder))),
        }
    return {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}


def pass_token_types(text_encoder: nn.Module) -> None:
    """Give every forward the `mm_token_type_ids` its caller left out (1 at image tokens), and bound its
    length."""
    config: Any = text_encoder.config
    wanted = "mm_token_type_ids" in inspect.signature(text_encoder.forward).parameters
    limit = config.text_config.max_position_embeddings

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        ids = kwargs["input_ids"]
        if ids.shape[1] > limit:
            length = ids.shape[1]
            raise InputError(f"prompt and images take {length} tokens, the limit is {limit}; shorten the prompt")
        if wanted and kwargs.get("mm_token_type_ids") is None:
            kwargs["mm_token_type_ids"] = (ids == config.image_token_id).int()
        return args, kwargs

    text_encoder.register_forward_pre_hook(before, with_kwargs=True)


def _check_config(base: str, transformer: Any, vae: Any) -> None:
    """Refuse transformers of the family that need inputs an edit does not have."""
    for flag in ("guidance_embeds", "use_additional_t_cond", "use_layer3d_rope"):
        if transformer.get(flag):
            raise InputError(f"base {base}: its transformer has {flag}, which clora cannot feed; use another")
    given, needed = transformer.get("in_channels", 64), 4 * vae.get("z_dim", 16)
    if given != needed:
        raise InputError(f"base {base}: transformer of {given} channels a token, VAE of {needed}; replace one")


def _check_template(base: str, pipeline: Any) -> None:
    """The pipeline drops a fixed number of tokens, which must be the system prompt and nothing else."""
    length = len(pipeline.tokenizer(pipeline.prompt_template_encode.split("{}")[0])["input_ids"])
    dropped = pipeline.prompt_template_encode_start_idx
    if length != dropped:
        raise InputError(
            f"base {base}: its tokenizer makes {length} tokens of the system prompt where the pipeline drops"
            f" {dropped}; use the tokenizer the base was trained with"
        )


def _load_processor(load: Any, tokenizer: Any) -> Any:
    """The stock processor; without torchvision the same without video and with Pillow's resizing."""
    if is_torchvision_available():
        return load(Qwen2VLProcessor, "processor")
    processor: Any = StillImageProcessor
    return processor(image_processor=load(Qwen2VLImageProcessorPil, "processor"), tokenizer=tokenizer)

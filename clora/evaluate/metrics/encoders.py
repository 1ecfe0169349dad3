"""Cosine similarity of two images by a vision encoder: CLIP image similarity, and DINO.

| name | model | embedding | preprocessing |
|---|---|---|---|
| clip | CLIP ViT-B/32 (arXiv 2103.00020), `openai/clip-vit-base-patch32` | projected class token | short side 224, centre crop 224, CLIP's mean and std |
| dino | DINO ViT-B/16 (arXiv 2104.14294), `facebook/dino-vitb16` | class token of the last layer | short side 256, centre crop 224, ImageNet's mean and std |

Both: RGB in 0 to 1, bicubic resizing by Pillow, fp32, cosine in [-1, 1], 1 for equal images. The paper cites DETR's "DINO",
a detector, which gives no embedding; the self-supervised ViT is what its kind of table uses. Figures of other models,
crops or resizers do not compare: `Encoder.facts` goes into every report.
"""  # noqa: E501  (the table)

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from PIL import Image
from torch import Tensor, nn

from clora.errors import InputError

EncoderName = Literal["clip", "dino"]
ENCODERS: tuple[EncoderName, ...] = get_args(EncoderName)

DEFAULT_MODELS: dict[EncoderName, str] = {"clip": "openai/clip-vit-base-patch32", "dino": "facebook/dino-vitb16"}
SHORT_SIDE: dict[EncoderName, int] = {"clip": 224, "dino": 256}
CROP = 224
MEAN_STD: dict[EncoderName, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "dino": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


@dataclass(frozen=True, eq=False)
class Encoder:
    """An open encoder. `model` and `revision` are where its weights come from."""

    name: EncoderName
    model: str
    revision: str | None
    network: nn.Module

    @property
    def facts(self) -> str:
        """All that the figure depends on, in a line."""
        mean, std = MEAN_STD[self.name]
        return (
            f"{self.model} at {self.revision or 'its newest revision'}, short side {SHORT_SIDE[self.name]}, centre crop"
            f" {CROP}, Pillow bicubic, mean {mean}, std {std}, float32"
        )

    @torch.no_grad()
    def embed(self, images: Sequence[Image.Image]) -> Tensor:
        """Unit vectors (N, D), fp32, of images (RGB, any size)."""
        pixels = preprocess(self.name, images)
        if self.name == "clip":
            vectors = self.network(pixel_values=pixels).image_embeds
        else:
            vectors = self.network(pixel_values=pixels).last_hidden_state[:, 0]
        return nn.functional.normalize(vectors.float(), dim=-1)

    def similarity(self, a: Image.Image, b: Image.Image) -> float:
        """Cosine of two images' embeddings, in [-1, 1]."""
        first, second = self.embed([a, b])
        return float(first @ second)


def open_encoder(name: EncoderName, model: str | None = None, revision: str | None = None) -> Encoder:
    """An encoder from a folder or the hub, on the CPU; raises `InputError` where its weights cannot be had."""
    from transformers import CLIPVisionModelWithProjection, ViTModel

    kinds: dict[EncoderName, Any] = {"clip": CLIPVisionModelWithProjection, "dino": ViTModel}
    model = model or DEFAULT_MODELS[name]
    options: dict[str, Any] = {} if name == "clip" else {"add_pooling_layer": False}
    try:
        network, loading = kinds[name].from_pretrained(
            model, revision=revision, torch_dtype=torch.float32, output_loading_info=True, **options
        )
    except (OSError, ValueError) as error:
        said = str(error).split("\n")[0][:200]
        raise InputError(f"encoders.{name}: {model} cannot be loaded ({said}); give a folder that holds it") from error
    if missing := sorted(loading["missing_keys"]):  # random weights pass most tests and mean nothing
        raise InputError(f"encoders.{name}: {model} lacks the weight {missing[0]}; give the whole model")
    return Encoder(name, model, revision, network.eval())


def preprocess(name: EncoderName, images: Sequence[Image.Image]) -> Tensor:
    """What the encoder takes of images (RGB): fp32 (N, 3, 224, 224)."""
    from transformers import CLIPImageProcessorPil

    mean, std = MEAN_STD[name]
    processor = CLIPImageProcessorPil(
        do_resize=True,
        size={"shortest_edge": SHORT_SIDE[name]},
        resample=Image.Resampling.BICUBIC,
        do_center_crop=True,
        crop_size={"height": CROP, "width": CROP},
        do_rescale=True,
        rescale_factor=1 / 255,
        do_normalize=True,
        image_mean=list(mean),
        image_std=list(std),
        do_convert_rgb=False,
    )
    pixels: Tensor = processor(images=list(images), return_tensors="pt")["pixel_values"]
    return pixels.float()

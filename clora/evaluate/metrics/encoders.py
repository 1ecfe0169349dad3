"""How alike two images are to a vision encoder: CLIP image similarity, DINO, DreamSim, and EfficientNet's features.

| name | model | embedding | pixels | figure |
|---|---|---|---|---|
| clip | CLIP ViT-B/32 (arXiv 2103.00020), `openai/clip-vit-base-patch32` | projected class token | short side 224, centre crop 224, CLIP's mean and std | cosine |
| dino | DINO ViT-B/16 (arXiv 2104.14294), `facebook/dino-vitb16` | class token of the last layer | short side 256, centre crop 224, ImageNet's mean and std | cosine |
| dreamsim | DreamSim (arXiv 2306.09344), module `dreamsim` | of one or three tuned encoders, centred | squashed to 224 x 224, each encoder's mean and std | 1 - cosine |
| efficientnet | EfficientNet-lite0 (arXiv 1905.11946), module `efficientnet` | mean of the last feature map | centre square, 224 x 224, (x - 127) / 128 | cosine |

All: RGB, bicubic resizing by Pillow, fp32. Cosines are in [-1, 1], 1 for equal images; DreamSim's distance is in [0, 2], 0
for equal images. The paper cites DETR's "DINO", a detector, which gives no embedding; the self-supervised ViT is what its
kind of table uses. Figures of other models, crops or resizers do not compare: `Encoder.facts` goes into every report.
"""  # noqa: E501  (the table)

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from PIL import Image
from torch import Tensor, nn

from clora.errors import InputError
from clora.evaluate.metrics.dreamsim import IMAGENET, OPENAI, dreamsim_fault, open_dreamsim
from clora.evaluate.metrics.efficientnet import efficientnet_fault, open_efficientnet

EncoderName = Literal["clip", "dino", "dreamsim", "efficientnet"]
ENCODERS: tuple[EncoderName, ...] = get_args(EncoderName)

_TYPES = {"clip": ("clip", "clip_vision_model"), "dino": ("vit",)}  # as their configurations name them
DEFAULT_MODELS = {"clip": "openai/clip-vit-base-patch32", "dino": "facebook/dino-vitb16"}
SIDE = 224


class Pixels(NamedTuple):
    """What an encoder takes of an image: `SIDE` x `SIDE` pixels, `(x * factor - mean) / std` of each channel's byte x.

    `short_side`: the image is reduced to it, and its middle cut out; None: all of it is squashed. `square`: the middle
    is cut out first, so that all of the short side is seen. `mean_std` None: left to the network.
    """

    short_side: int | None
    mean_std: tuple[tuple[float, ...], tuple[float, ...]] | None
    factor: float = 1 / 255
    square: bool = False

    @property
    def facts(self) -> str:
        shape = f"squashed to {SIDE} x {SIDE}"
        if self.short_side is not None:
            shape = f"short side {self.short_side}, centre crop {SIDE}"
        if self.square:
            shape = f"centre crop to a square, reduced to {SIDE} x {SIDE}"
        scale = "RGB in 0 to 255" if self.factor == 1 else "RGB in 0 to 1"
        norm = "each encoder's own mean and std"
        if self.mean_std is not None:
            norm = f"mean {self.mean_std[0]}, std {self.mean_std[1]}"
        return f"{shape}, Pillow bicubic, {scale}, {norm}"


PIXELS: dict[EncoderName, Pixels] = {
    "clip": Pixels(224, OPENAI),
    "dino": Pixels(256, IMAGENET),
    "dreamsim": Pixels(None, None),
    "efficientnet": Pixels(224, ((127.0,) * 3, (128.0,) * 3), factor=1, square=True),
}


@dataclass(frozen=True, eq=False)
class Encoder:
    """An open encoder. `model` and `revision` say which weights it has; a folder of transformers has no revision."""

    name: EncoderName
    model: str
    revision: str | None
    network: nn.Module

    @property
    def facts(self) -> str:
        """All that the figure depends on, and which way it goes, in a line."""
        model = f"{self.model}, revision {self.revision}" if self.revision else f"{self.model}, a folder"
        figure = "cosine, in [-1, 1], 1 for equal pictures, higher is nearer"
        if self.name == "dreamsim":
            figure = "1 - cosine, in [0, 2], 0 for equal pictures, LOWER is nearer"
        return f"{model}, {PIXELS[self.name].facts}, float32; {figure}"

    @torch.no_grad()
    def embed(self, images: Sequence[Image.Image]) -> Tensor:
        """Unit vectors (N, D), fp32, of images (RGB, any size)."""
        pixels = preprocess(self.name, images)
        if self.name == "clip":
            vectors = self.network(pixel_values=pixels).image_embeds
        elif self.name == "dino":
            vectors = self.network(pixel_values=pixels).last_hidden_state[:, 0]
        else:
            vectors = self.network(pixels)
        return nn.functional.normalize(vectors.float(), dim=-1)

    def compare(self, first: Tensor, second: Tensor) -> float:
        """What reports give of two embeddings (D,): the cosine; of DreamSim 1 - cosine, lower for nearer ones."""
        cosine = float(first @ second)
        return 1 - cosine if self.name == "dreamsim" else cosine

    def figure(self, a: Image.Image, b: Image.Image) -> float:
        """What reports give of two images, as `compare`."""
        first, second = self.embed([a, b])
        return self.compare(first, second)


def encoder_fault(name: EncoderName, model: str | None, revision: str | None = None) -> str:
    """Why an encoder cannot be opened, as far as can be told without its weights, in a sentence; "" where it can. Of a
    model on the hub its configuration is fetched."""
    why = {"dreamsim": dreamsim_fault, "efficientnet": efficientnet_fault}
    fault = why[name](model) if name in why else _config_fault(model or DEFAULT_MODELS[name], revision, _TYPES[name])
    return f"encoders.{name}: {fault}" if fault else ""


def _config_fault(model: str, revision: str | None, types: Sequence[str]) -> str:
    """Why this folder or repository holds no model of these types of transformers; "" where it does."""
    from transformers import AutoConfig

    try:
        found = AutoConfig.from_pretrained(model, revision=revision).model_type
    except (OSError, ValueError) as error:
        return _not_loaded(model, error)
    return "" if found in types else f"{model} is of type {found}, not {types[0]}; give another"


def _not_loaded(model: str, error: Exception) -> str:
    said = str(error).split("\n")[0][:200]
    return f"{model} cannot be loaded ({said}); give a folder that holds it"


def open_encoder(name: EncoderName, model: str | None = None, revision: str | None = None) -> Encoder:
    """An encoder from a folder, the hub or a package, on the CPU; raises `InputError` where its weights cannot be had.

    model: None for the usual one; of DreamSim the folder of its published files (module `dreamsim`), of EfficientNet
    None. revision: of the hub's repository; the commit that it turned out to be is in the encoder.
    """
    if fault := encoder_fault(name, model, revision):
        raise InputError(fault)
    _processor(name)  # imported here, by one thread: transformers gives several at once an ImportError
    if name == "dreamsim":
        assert model is not None
        return Encoder(name, *open_dreamsim(Path(model)))
    if name == "efficientnet":
        return Encoder(name, *open_efficientnet())
    from transformers import CLIPVisionModelWithProjection, ViTModel

    kinds: dict[str, Any] = {"clip": CLIPVisionModelWithProjection, "dino": ViTModel}
    model = model or DEFAULT_MODELS[name]
    options: dict[str, Any] = {} if name == "clip" else {"add_pooling_layer": False}
    try:
        network, loading = kinds[name].from_pretrained(
            model, revision=revision, torch_dtype=torch.float32, output_loading_info=True, **options
        )
    except (OSError, ValueError) as error:
        raise InputError(f"encoders.{name}: {_not_loaded(model, error)}") from error
    if missing := sorted(loading["missing_keys"]):  # random weights pass most tests and mean nothing
        raise InputError(f"encoders.{name}: {model} lacks the weight {missing[0]}; give the whole model")
    commit = getattr(network.config, "_commit_hash", None)
    return Encoder(name, model, commit or revision, network.eval())


def preprocess(name: EncoderName, images: Sequence[Image.Image]) -> Tensor:
    """What the encoder takes of images (RGB): fp32 (N, 3, 224, 224), as `PIXELS` says."""
    given = [_square(image) if PIXELS[name].square else image for image in images]
    pixels: Tensor = _processor(name)(images=given, return_tensors="pt")["pixel_values"]
    return pixels.float()


@cache
def _processor(name: EncoderName) -> Any:
    from transformers import CLIPImageProcessorPil

    how = PIXELS[name]
    mean, std = how.mean_std or ((), ())
    whole = {"height": SIDE, "width": SIDE}
    return CLIPImageProcessorPil(
        do_resize=True,
        size=whole if how.short_side is None else {"shortest_edge": how.short_side},
        resample=Image.Resampling.BICUBIC,
        do_center_crop=how.short_side is not None,
        crop_size=whole,
        do_rescale=how.factor != 1,
        rescale_factor=how.factor,
        do_normalize=how.mean_std is not None,
        image_mean=list(mean),
        image_std=list(std),
        do_convert_rgb=False,
    )


def _square(image: Image.Image) -> Image.Image:
    """The middle square, of whole pixels."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))

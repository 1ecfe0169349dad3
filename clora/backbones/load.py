"""The room's door: a base of any known family, and what can be said of a base without its weights.

A base's family is known by the pipeline that its model_index.json names. Its libraries take seconds to import and are
only imported for a base of that family. The configurations of well-known bases lie in `shapes/`, so that nothing needs
to be downloaded to plan a run on them or to check a LoRA file.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clora.backbones import COMPONENTS
from clora.backbones.base import Backbone
from clora.backbones.cond import Grid, Size
from clora.backbones.counts import Footprint
from clora.backbones.hub import hub_folder
from clora.config import Quantize, read_sidecar, resolve_base
from clora.errors import InputError
from clora.io.text import parse_json, read_text

Rotate = Callable[[Tensor, Tensor, Tensor], Tensor]
SHAPES = Path(__file__).parent / "shapes"
QWEN_IMAGE_EDIT = "QwenImageEditPlusPipeline"  # Qwen-Image-Edit-2509 and 2511


def load_backbone(
    base: str | Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    components: Sequence[str] = COMPONENTS,
    revision: str | None = None,
    transformer_device: torch.device | str | None = None,
    quantize: Quantize = "none",
) -> Backbone:
    """Load a base model (see `resolve_base`), frozen and in eval mode, with only the `components` asked for.

    The transformer may be left on another device, to be moved to `device` later. `quantize` is for the linears of its
    blocks. Tokenizer and configurations always come along, so that prompts can be counted and sizes computed without
    any weights. Raises `InputError` for a folder or hub id that holds no base of a known family.
    """
    if unknown := set(components) - set(COMPONENTS):
        raise ValueError(f"unknown components {sorted(unknown)}; known: {', '.join(COMPONENTS)}")
    resolved = resolve_base(base)
    folder = resolved if isinstance(resolved, Path) else hub_folder(resolved, revision, components)
    pipeline = _json(base, folder / "model_index.json").get("_class_name")
    if pipeline == QWEN_IMAGE_EDIT:
        from clora.backbones.qwen_image.backbone import load_qwen_image
        from clora.backbones.qwen_image.sizes import ImageSizes

        sidecar = read_sidecar(resolved)
        sizes = ImageSizes(sidecar.vae_image_area, sidecar.condition_image_area, sidecar.default_size)
        device = torch.device(device)
        elsewhere = device if transformer_device is None else torch.device(transformer_device)
        return load_qwen_image(str(base), folder, sizes, device, dtype, components, elsewhere, quantize)
    raise _unknown_family(base, pipeline)


def choose_device(name: str | None) -> torch.device:
    """The device of that name; None: a GPU if there is one. Raises `InputError` for one that is not there."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise InputError(f"device: {name!r} is no device; give cpu, cuda or cuda:N") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"device: {name} is not there ({torch.cuda.device_count()} GPUs); give cpu")
    return device


def served_network(backbone: Backbone, sigmas: Tensor, rotate: Rotate | None = None) -> nn.Module:
    """The backbone's transformer, without adapters, as the network that artefacts hold: at these noise levels alone,
    in a form that can be exported (`qwen_image.served.ServedNetwork`). It shares the weights.

    `rotate` takes the place of plain torch where a format has an operator of its own for rotary positions.
    """
    from clora.backbones.qwen_image import served

    return served.ServedNetwork(backbone.transformer, sigmas, rotate or served.rotate).eval()


def served_vae(backbone: Backbone) -> tuple[nn.Module, nn.Module]:
    """The backbone's VAE as the two networks that artefacts hold, encoder and decoder
    (`qwen_image.served_vae`), which share its weights."""
    from clora.backbones.qwen_image.served_vae import ServedDecoder, ServedEncoder

    vae: Any = backbone.vae
    return ServedEncoder(vae).eval(), ServedDecoder(vae).eval()


def rotary_positions(base: str | Path, grids: Sequence[Grid], num_text: int) -> tuple[Tensor, Tensor]:
    """The positions that a `served_network` takes for a result and its references (`grids`, the result first) and
    `num_text` tokens of text: cos and sin, fp32. No weights are read."""
    from clora.backbones.qwen_image.served import rotary_positions as positions

    config = _configurations(base, None, ("transformer",))["transformer"]
    return positions(config, list(grids), num_text)


def read_footprint(base: str | Path, revision: str | None = None) -> Footprint:
    """The base's sizes, from its configurations; raises `InputError` as `load_backbone` does."""
    configs = _configurations(base, revision, ("transformer", "vae"))
    if configs["_class_name"] == QWEN_IMAGE_EDIT:
        from clora.backbones.qwen_image.footprint import transformer_footprint

        area = read_sidecar(resolve_base(base)).vae_image_area
        return transformer_footprint(configs["transformer"], configs["vae"], area)
    raise _unknown_family(base, configs["_class_name"])


def result_size(base: str | Path, pixels: tuple[int, int], revision: str | None = None) -> Size:
    """The (height, width) of what the base makes of an image of `pixels` (width, height), as
    `Backbone.output_size` says once it is open. Raises `InputError` for an image that the base has no size for."""
    configs = _configurations(base, revision, ("vae",))
    if configs["_class_name"] == QWEN_IMAGE_EDIT:
        from clora.backbones.qwen_image.footprint import pixels_per_token
        from clora.backbones.qwen_image.sizes import ImageSizes, image_size

        sidecar = read_sidecar(resolve_base(base))
        sizes = ImageSizes(sidecar.vae_image_area, sidecar.condition_image_area, sidecar.default_size)
        return image_size(pixels, sizes, pixels_per_token(configs["vae"]))
    raise _unknown_family(base, configs["_class_name"])


def linear_shapes(base: str | Path, revision: str | None = None) -> dict[str, tuple[int, int]]:
    """Names and weight shapes (N, K) of the transformer's linears, for `check_lora`; no weights are read."""
    return dict(read_footprint(base, revision).linears)


def shipped_linear_shapes(base: str | Path) -> dict[str, tuple[int, int]] | None:
    """`linear_shapes` of a well-known hub id, without the hub; None for every other base."""
    folder = resolve_base(base)
    known = not isinstance(folder, Path) and _shipped(folder).is_file()
    return linear_shapes(base) if known else None


def encoder_parameters(base: str | Path, revision: str | None = None) -> dict[str, int]:
    """Parameters of the VAE ("vae") and the text encoder ("text_encoder"), from their configurations."""
    configs = _configurations(base, revision, ("vae", "text_encoder"))
    if "parameters" in configs:
        return dict(configs["parameters"])
    if configs["_class_name"] == QWEN_IMAGE_EDIT:
        from clora.backbones.qwen_image.pipeline import count_encoder_parameters

        return count_encoder_parameters(configs["vae"], configs["text_encoder"])
    raise _unknown_family(base, configs["_class_name"])


def _configurations(base: str | Path, revision: str | None, components: Sequence[str]) -> dict[str, Any]:
    """`_class_name` of the pipeline and the components' config.json by name; of a well-known hub id the shipped ones,
    with the encoders' `parameters`."""
    folder = resolve_base(base)
    if not isinstance(folder, Path):
        if _shipped(folder).is_file():
            return _json(base, _shipped(folder))
        folder = hub_folder(folder, revision)
    found: dict[str, Any] = {name: _json(base, folder / name / "config.json") for name in components}
    return found | {"_class_name": _json(base, folder / "model_index.json").get("_class_name")}


def _shipped(hub_id: str) -> Path:
    return SHAPES / f"{hub_id.replace('/', '--')}.json"


def _json(base: str | Path, path: Path) -> dict[str, Any]:
    try:
        values = parse_json(read_text(path))
    except InputError as error:
        raise InputError(f"base {base}: cannot be loaded ({error})") from error
    except ValueError as error:
        raise InputError(f"base {base}: cannot be loaded ({path}: {error}); replace the file") from error
    if not isinstance(values, dict):
        raise InputError(f"base {base}: cannot be loaded ({path} holds no object); replace the file")
    return values


def _unknown_family(base: str | Path, pipeline: Any) -> InputError:
    known = f"a {QWEN_IMAGE_EDIT} (Qwen-Image-Edit-2509 or 2511)"
    return InputError(f"base {base}: its model_index.json names {pipeline}; clora needs {known}")

"""The VAE of a base as two graphs beside the network: pixels to latents, and latents to pixels.

With them an artefact needs of its base the text encoder alone, which runs in PyTorch.

Shape legend: B batch, z latent channels, H W pixels, h w latent pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clora.backbones.cond import VaeGraph
from clora.export.aoti import build_aoti, open_aoti_part
from clora.export.graph import DECODER, ENCODER, Part, Run
from clora.export.manifest import Format, Limits
from clora.export.onnx_graph import build_onnx, open_onnx

Build = Callable[[nn.Module, tuple[Tensor, ...], Limits, Path, Part], None]


def build_vae(
    networks: tuple[nn.Module, nn.Module], channels: int, form: Format, dtype: torch.dtype, limits: Limits, folder: Path
) -> None:
    """Write the graphs of encoder and decoder (`backbones.load.served_vae`) of `channels` latent channels."""
    rng = torch.Generator().manual_seed(0)
    pixels = torch.rand(2, 3, 32, 48, generator=rng) * 2 - 1
    latents = torch.randn(2, channels, 4, 6, generator=rng)
    build: Build = build_aoti if form == "aoti" else build_onnx
    build(networks[0], (pixels.to(dtype),), limits, folder, ENCODER)
    build(networks[1], (latents.to(dtype),), limits, folder, DECODER)


def open_vae(folder: Path, form: Format, dtype: torch.dtype) -> tuple[VaeGraph, VaeGraph]:
    """Encoder and decoder in a checked folder."""
    open_part: Any = open_aoti_part if form == "aoti" else open_onnx
    encode: Run = open_part(folder, ENCODER)
    decode: Run = open_part(folder, DECODER)
    return (lambda pixels: encode(pixels.to(dtype))), (lambda latents: decode(latents.to(dtype)))

"""Images of a Qwen-Image base: packed latents, and pixels again.

Latents are packed tokens (B, T, C), C = 4 z: a 2 x 2 square of the VAE's latent pixels, normalised by the VAE's
`latents_mean` and `latents_std`.

Shape legend: B batch, T tokens, C latent channels per token, z latent channels, H W pixels, h w latent pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from clora.backbones.cond import Grid, Size, VaeGraph
from clora.errors import InputError


def grid_of(size: Size, unit: int) -> Grid:
    """Tokens of an image of (height, width) pixels; both must be multiples of `unit`, the pixels of a token."""
    if size[0] % unit or size[1] % unit or min(size) < unit:
        raise InputError(f"size {size[0]}x{size[1]} (height x width): both must be multiples of {unit}")
    return size[0] // unit, size[1] // unit


@torch.no_grad()
def encode_pixels(
    pipeline: Any,
    images: Sequence[Image.Image],
    size: Size,
    device: torch.device,
    dtype: torch.dtype,
    graph: VaeGraph | None = None,
) -> Tensor:
    """Packed, normalised latents (B, T, C) of images (RGB) resized to (height, width): the posterior's mode.

    `graph`: a `served_vae.ServedEncoder`, in place of the pipeline's VAE.
    """
    pixels = pipeline.image_processor.preprocess(list(images), *size).to(device, dtype)
    if graph is not None:
        return pack_latents(pipeline, graph(pixels))
    return pack_latents(pipeline, pipeline._encode_vae_image(pixels.unsqueeze(2), generator=None))


def pack_latents(pipeline: Any, latents: Tensor) -> Tensor:
    """Tokens (B, T, C) of normalised latents (B, z, 1, h, w), or (B, z, h, w)."""
    batch_size, channels, height, width = latents.shape[0], latents.shape[1], *latents.shape[-2:]
    packed: Tensor = pipeline._pack_latents(latents, batch_size, channels, height, width)
    return packed


@torch.no_grad()
def decode_latents(
    pipeline: Any, x_BTC: Tensor, size: Size, device: torch.device, dtype: torch.dtype, graph: VaeGraph | None = None
) -> Tensor:
    """Images (B, 3, H, W) in [0, 1], fp32, of this (height, width), as the stock pipeline decodes them.

    `graph`: a `served_vae.ServedDecoder`, in place of the pipeline's VAE.
    """
    vae = pipeline.vae
    unpacked = pipeline._unpack_latents(x_BTC, *size, pipeline.vae_scale_factor)
    if graph is not None:
        return graph(unpacked[:, :, 0].to(device, dtype))
    latents = unpacked.to(device, vae.dtype)
    shape = (1, vae.config.z_dim, 1, 1, 1)
    mean = torch.tensor(vae.config.latents_mean).view(shape).to(latents)
    inverse_std = 1.0 / torch.tensor(vae.config.latents_std).view(shape).to(latents)
    images = vae.decode(latents / inverse_std + mean, return_dict=False)[0][:, :, 0]
    pixels: Tensor = (images.float() * 0.5 + 0.5).clamp(0, 1)
    return pixels

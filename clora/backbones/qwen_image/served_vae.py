"""The VAE as two networks that graph exporters take: pixels to latents, and latents to pixels.

They run the stock VAE and compute what `images.encode_pixels` and `images.decode_latents` do between pixels and
unpacked latents, with the normalisation inside.

Shape legend: B batch, z latent channels, H W pixels, h w latent pixels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class ServedEncoder(nn.Module):
    """pixels (B, 3, H, W) in [-1, 1] -> normalised latents (B, z, h, w): the posterior's mode."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae
        self.register_buffer("mean", _spread(vae, "latents_mean"))
        self.register_buffer("std", _spread(vae, "latents_std"))

    def forward(self, pixels: Tensor) -> Tensor:
        latents: Tensor = self.vae.encode(pixels[:, :, None], return_dict=False)[0].mode()
        return ((latents - self.get_buffer("mean")) / self.get_buffer("std"))[:, :, 0]


class ServedDecoder(nn.Module):
    """normalised latents (B, z, h, w) -> pixels (B, 3, H, W) in [0, 1], fp32."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae
        self.register_buffer("mean", _spread(vae, "latents_mean"))
        self.register_buffer("inverse_std", 1.0 / _spread(vae, "latents_std"))

    def forward(self, latents: Tensor) -> Tensor:
        spread = latents[:, :, None] / self.get_buffer("inverse_std") + self.get_buffer("mean")
        images: Tensor = self.vae.decode(spread, return_dict=False)[0][:, :, 0]
        return (images.float() * 0.5 + 0.5).clamp(0, 1)


def _spread(vae: Any, name: str) -> Tensor:
    """`latents_mean` or `latents_std` of the VAE's configuration, (1, z, 1, 1, 1) in its dtype."""
    values = torch.tensor(getattr(vae.config, name)).view(1, -1, 1, 1, 1)
    return values.to(vae.device, vae.dtype)

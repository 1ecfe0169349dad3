"""What a model family offers: the Protocol that the rest of the package is typed on.

A `Backbone` is an open base. Everything with a model's name in it (its pipeline, how it packs latents, what its blocks
are called) stays behind it, in the family's folder. A base that is not open is counted by `counts.Footprint`.

Shape legend: B batch, T image tokens, C latent channels per token, L text tokens, D text width, H W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from PIL import Image
from torch import Tensor, nn

from clora.backbones import Kernels
from clora.backbones.cond import Cond, Grid, Size, VaeGraph
from clora.lora.adapters import Adapters
from clora.lora.slots import Slot


class Backbone(Protocol):
    """One open base model, frozen, with the adapters on it."""

    @property
    def device(self) -> torch.device:
        """Where velocities are computed, and where encoders and decoder put their results."""

    @property
    def dtype(self) -> torch.dtype:
        """The type of the base's weights, before any quantization."""

    # Sizes

    @property
    def token_channels(self) -> int:
        """C, the latent channels of one token."""

    def grid(self, size: Size) -> Grid:
        """Tokens of an image of (height, width) pixels; `InputError` for a size that is no multiple of a token."""

    def output_size(self, image: Image.Image | None = None) -> Size:
        """(height, width) of a result for its last reference image, whose shape it keeps, or for none."""

    # Text and images

    @property
    def max_prompt_tokens(self) -> int:
        """The longest prompt that `encode_prompts` takes without images."""

    def count_prompt_tokens(self, prompt: str) -> int:
        """Tokens of a prompt's own words. Needs no text encoder."""

    def encode_prompts(self, prompts: Sequence[str], images: Sequence[Sequence[Image.Image]]) -> list[Tensor]:
        """Embeddings (L_i, D) of each prompt with its own reference images (RGB); `InputError` if one is too long."""

    def encode_references(self, images: Sequence[Image.Image]) -> tuple[Tensor, Grid]:
        """Latents (B, T, C) of reference images (RGB, of one aspect ratio) at the stock pipeline's size, their grid."""

    def encode_targets(self, images: Sequence[Image.Image], size: Size) -> tuple[Tensor, Grid]:
        """Latents x0 (B, T, C) of results (RGB) of this (height, width), and their grid."""

    def decode(self, x_BTC: Tensor, grid: Grid) -> Tensor:
        """Images (B, 3, H, W) in [0, 1], fp32."""

    def use_vae_graphs(self, encode: VaeGraph, decode: VaeGraph) -> None:
        """Encode and decode images with graphs of `load.served_vae` from now on; the VAE need not be loaded."""

    def to_pil(self, images: Tensor) -> list[Image.Image]:
        """RGB images from (B, 3, H, W) in [0, 1], rounded to 8 bits."""

    def free_encoders(self, vae: bool = False) -> None:
        """Drop the text encoder (and the VAE if asked) from memory, for good."""

    # The transformer

    @property
    def transformer(self) -> nn.Module:
        """The module that adapters lie on."""

    @property
    def vae(self) -> nn.Module:
        """The module that encodes and decodes images."""

    @property
    def blocks(self) -> list[nn.Module]:
        """Its blocks in order: what is recomputed, and split over processes, one at a time."""

    @property
    def default_targets(self) -> tuple[str, ...]:
        """The linears that an adapter covers where nobody says which, as suffixes of module names."""

    def add_adapters(self, targets: Sequence[str] | None = None) -> Adapters:
        """Freeze the transformer and give its target linears adapter slots; None: the default ones."""

    def use_kernels(self, kernels: Kernels) -> None:
        """Run the blocks on `clora.kernels` ("fused"), as the library does ("reference"), or as the device asks."""

    def use_plain_attention(self) -> None:
        """Attention by plain matrix products."""

    def set_gradient_checkpointing(self, enabled: bool, num_blocks_kept: int = 0) -> None:
        """Recompute each block but the last `num_blocks_kept` in the backward pass; call it after `use_kernels`."""

    def own_sigmas(self, num_steps: int, num_tokens: int) -> Tensor:
        """Noise levels, fp32 (num_steps,), at which the base's own pipeline samples a result of so many tokens."""

    def velocity(self, x_BTC: Tensor, sigma_B: Tensor, cond: Cond, slots: Sequence[Slot] | None = None) -> Tensor:
        """eps - x0 at noise level sigma (1 = noise), (B, T, C) in x's dtype; `slots` as in `Adapters.use`."""

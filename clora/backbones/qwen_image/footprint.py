"""Sizes of a Qwen-Image transformer, from its configuration alone: parameters, and bytes of activations.

The bytes are those of diffusers' `QwenImageTransformer2DModel` under `SlotLinear`s: `saved_by_block` is exact on a CPU,
and tests/backbones/qwen_image/test_footprint.py holds the others to 10 %.

Legend: D width, H heads, r rank of the adapters in use, e bytes of one number of the base.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from clora.backbones.counts import ForwardSize
from clora.lora.layers import QWEN_IMAGE_TARGETS

MLP = 4  # the MLPs' inner width over D

# Tensors of width D that are alive at once, per token, at the fullest moment of a forward without grad: seven that
# the block's frame holds and two of 4 D inside the MLP (image), of which the text stream's have gone.
FORWARD_IMAGE, FORWARD_TEXT = 15, 7
FORWARD_ZERO_COND_T = 2  # and with `zero_cond_t` the two gates, which every image token then has of its own
BACKWARD = 7  # and in a backward, beyond what the forward kept


@dataclass(frozen=True)
class QwenImageFootprint:
    """The `Footprint` of a Qwen-Image-Edit base, whose members are described there."""

    width: int
    num_heads: int
    num_layers: int
    linears: Mapping[str, tuple[int, int]]
    num_parameters: int
    zero_cond_t: bool
    pixels_per_token: int
    reference_tokens: int

    @property
    def default_targets(self) -> tuple[str, ...]:
        return QWEN_IMAGE_TARGETS

    @property
    def block_linears(self) -> list[tuple[int, int]]:
        return [shape for name, shape in self.linears.items() if name.startswith("transformer_blocks.")]

    @property
    def block_parameters(self) -> int:
        heads = 4 * (self.width // self.num_heads)
        return heads + sum(N * (K + 1) for N, K in self.block_linears) // self.num_layers

    def adapter_parameters(self, rank: int, targets: Sequence[str]) -> int:
        endings = tuple(f".{target}" for target in targets)
        return rank * sum(N + K for name, (N, K) in self.linears.items() if f".{name}".endswith(endings))

    def saved_by_block(self, forward: ForwardSize) -> int:
        """Per token: 9 inputs of linears and gates, q k v out of the attention, q and k before and after their norm
        (fp32 and e), the MLP before and after its GELU; r numbers of each adapter; the statistics of norms and
        attention."""
        D, H, r, e = self.width, self.num_heads, forward.rank, forward.itemsize
        per_token = (9 + 4 + 2 * MLP) * D * e + 2 * D * 4 + 6 * r * e + 12 * H + 4 * e
        if e != 4:
            per_token += 2 * D * e
        saved = forward.batch_size * (forward.tokens * per_token + (18 * D + 2 * r) * e)
        if self.zero_cond_t:  # scales and gates of their own for every image token, and the masks that chose them
            saved += forward.batch_size * _image_tokens(forward) * (4 * D * e + 6)
        return saved

    def saved_by_recomputed_block(self, forward: ForwardSize) -> int:
        """Its inputs and the attention's result."""
        statistics = 4 * forward.batch_size * forward.tokens * self.num_heads
        return 2 * self._per_token(forward) * forward.tokens + statistics

    def saved_outside_blocks(self, forward: ForwardSize) -> int:
        return self._per_token(forward) * _image_tokens(forward)

    def forward_workspace(self, forward: ForwardSize) -> int:
        per_image_token = FORWARD_IMAGE + (FORWARD_ZERO_COND_T if self.zero_cond_t else 0)
        per_sample = per_image_token * _image_tokens(forward) + FORWARD_TEXT * forward.text_tokens
        return self._per_token(forward) * per_sample

    def backward_workspace(self, forward: ForwardSize) -> int:
        return BACKWARD * self._per_token(forward) * forward.tokens

    def _per_token(self, forward: ForwardSize) -> int:
        """Bytes of one tensor of width D for one token of every sample."""
        return forward.batch_size * self.width * forward.itemsize


def transformer_footprint(
    config: Mapping[str, Any], vae: Mapping[str, Any], reference_area: int = 1024 * 1024
) -> QwenImageFootprint:
    """The sizes in the config.json of a `QwenImageTransformer2DModel` and its VAE; keys left out have diffusers'
    defaults. `reference_area`: pixels of a reference image as the VAE sees it."""
    heads = int(config.get("num_attention_heads", 24))
    per_head = int(config.get("attention_head_dim", 128))
    layers, D = int(config.get("num_layers", 60)), heads * per_head
    channels, text_width = int(config.get("in_channels", 64)), int(config.get("joint_attention_dim", 3584))
    out_channels = int(config.get("patch_size", 2)) ** 2 * int(config.get("out_channels", 16) or channels)
    # In the module's own order.
    attention = ("to_q", "to_k", "to_v", "add_k_proj", "add_v_proj", "add_q_proj", "to_out.0", "to_add_out")
    block = {"img_mod.1": (6 * D, D)} | {f"attn.{name}": (D, D) for name in attention}
    block |= {"img_mlp.net.0.proj": (MLP * D, D), "img_mlp.net.2": (D, MLP * D)}
    block |= {"txt_mod.1": (6 * D, D), "txt_mlp.net.0.proj": (MLP * D, D), "txt_mlp.net.2": (D, MLP * D)}
    linears = {
        "time_text_embed.timestep_embedder.linear_1": (D, 256),
        "time_text_embed.timestep_embedder.linear_2": (D, D),
        "img_in": (D, channels),
        "txt_in": (D, text_width),
        **{f"transformer_blocks.{i}.{name}": shape for i in range(layers) for name, shape in block.items()},
        "norm_out.linear": (2 * D, D),
        "proj_out": (out_channels, D),
    }
    norms = text_width + layers * 4 * per_head
    total = norms + sum(N * (K + 1) for N, K in linears.values())
    zero_cond_t, unit = bool(config.get("zero_cond_t", False)), pixels_per_token(vae)
    return QwenImageFootprint(D, heads, layers, linears, total, zero_cond_t, unit, reference_area // unit**2)


def pixels_per_token(vae: Mapping[str, Any]) -> int:
    """Pixels along one side of a token: 2 x 2 of the latent pixels of an `AutoencoderKLQwenImage`."""
    return int(2 * 2 ** len(vae.get("temperal_downsample", (False, True, True))))


def _image_tokens(forward: ForwardSize) -> int:
    return forward.image_tokens + forward.reference_tokens

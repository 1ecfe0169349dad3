"""Sizes of a Qwen-Image transformer, from its configuration alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MLP = 4  # the MLPs' inner width over D


@dataclass(frozen=True)
class ModelShapes:
    """What a transformer's configuration says of its size. `linears`: (N, K) of every linear by module name."""

    width: int
    num_heads: int
    num_layers: int
    linears: dict[str, tuple[int, int]]
    num_parameters: int
    zero_cond_t: bool = False

    @property
    def block_linears(self) -> list[tuple[int, int]]:
        """(N, K) of the linears of all blocks."""
        return [shape for name, shape in self.linears.items() if name.startswith("transformer_blocks.")]

    @property
    def block_parameters(self) -> int:
        """Parameters of one block: what FSDP2 gathers at a time."""
        heads = 4 * (self.width // self.num_heads)
        return heads + sum(N * (K + 1) for N, K in self.block_linears) // self.num_layers

    def adapter_parameters(self, rank: int, targets: Sequence[str]) -> int:
        """Parameters of a LoRA of this rank on the linears whose names end in a target."""
        endings = tuple(f".{target}" for target in targets)
        return rank * sum(N + K for name, (N, K) in self.linears.items() if f".{name}".endswith(endings))


def model_shapes(config: Mapping[str, Any]) -> ModelShapes:
    """The sizes in a `QwenImageTransformer2DModel`'s config.json; keys left out have diffusers' defaults."""
    heads = int(config.get("num_attention_heads", 24))
    per_head = int(config.get("attention_head_dim", 128))
    layers, D = int(config.get("num_layers", 60)), heads * per_head
    channels, text_width = int(config.get("in_channels", 64)), int(config.get("joint_attention_dim", 3584))
    out_channels = int(config.get("patch_size", 2)) ** 2 * int(config.get("out_channels", 16) or channels)
    attention = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "to_out.0", "to_add_out")
    block = {"img_mod.1": (6 * D, D), "txt_mod.1": (6 * D, D)} | {f"attn.{name}": (D, D) for name in attention}
    for stream in ("img", "txt"):
        block |= {f"{stream}_mlp.net.0.proj": (MLP * D, D), f"{stream}_mlp.net.2": (D, MLP * D)}
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
    return ModelShapes(D, heads, layers, linears, total, bool(config.get("zero_cond_t", False)))

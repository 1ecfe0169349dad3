"""A transformer of the real model's width, in the memory of one of its blocks."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import QwenImageTransformer2DModel

FULL_WIDTH = {
    "num_layers": 2,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 3584,
    "axes_dims_rope": (16, 56, 56),
}


def full_width_transformer(zero_cond_t: bool = False) -> Any:
    """Two random blocks of width 3072, frozen, fp32, no parameter zero; 1.5 GB.

    The second block holds the first's tensors: what tells blocks apart in a test are the adapters, which each has of
    its own.
    """
    with torch.device("meta"):
        model: Any = QwenImageTransformer2DModel(**FULL_WIDTH, zero_cond_t=zero_cond_t)
    rng = torch.Generator().manual_seed(0)
    for name, parameter in list(model.named_parameters()):
        parent, _, leaf = name.rpartition(".")
        if (first := parent.replace("transformer_blocks.1.", "transformer_blocks.0.")) != parent:
            made = model.get_submodule(first)._parameters[leaf]
        else:
            values = torch.empty(parameter.shape).uniform_(-0.035, 0.035, generator=rng)
            norm = parameter.ndim == 1 and name.endswith("weight")
            made = torch.nn.Parameter(values + 1 if norm else values, requires_grad=False)
        model.get_submodule(parent)._parameters[leaf] = made
    model.pos_embed = type(model.pos_embed)(theta=10000, axes_dim=list(FULL_WIDTH["axes_dims_rope"]), scale_rope=True)
    return model.eval()

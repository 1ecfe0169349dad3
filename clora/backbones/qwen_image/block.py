"""The Qwen-Image block on the Triton ops of `clora.kernels`, over the stock block's own weights.

`FusedBlock` takes a stock block's place in `transformer.transformer_blocks` and holds the same submodules under the
same names, so that weights, adapters, checkpoints of either kind and the rest of the transformer stay as they are. It
computes what `QwenImageTransformerBlock.forward` does, with fewer passes over memory and fewer roundings:

    x                = adaln(hidden)
    q, k, v          = qk_norm_rope(projections of image and text)         image first, text behind it
    hidden, x        = gated_residual_adaln(hidden, out(attention(q, k, v)))
    hidden           = hidden + gate * mlp(x)

Text of different lengths in one batch takes no mask, which would cost attention its fast path: padding ends each row
of q, k and v, so that each sample attends within the beginning of its own.

Shape legend: B batch, L image tokens (result and references), M text tokens, J = L + M, D width, H heads, E width of
a head.
"""

from __future__ import annotations

import importlib.util
from typing import Any, cast

import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor, nn

from clora.kernels.adaln import EPS, adaln, gated_residual_adaln
from clora.kernels.lora_linear import Epilogue, lora_linear
from clora.kernels.lora_low_rank import MAX_RANK
from clora.kernels.lora_qkv import lora_qkv
from clora.kernels.qk_norm_rope import qk_norm_rope, rotary_tables
from clora.lora.frozen_linear import is_quantized
from clora.lora.slots import SlotLinear

PARTS = ("img_mod", "img_norm1", "attn", "img_norm2", "img_mlp", "txt_mod", "txt_norm1", "txt_norm2", "txt_mlp")
FP16_MAX = 65504.0


class FusedBlock(nn.Module):
    """A stock `QwenImageTransformerBlock`'s submodules, run on the ops."""

    attn: Any  # `nn.Module` would say Tensor | Module of each
    img_mod: Any
    txt_mod: Any

    def __init__(self, block: Any) -> None:
        super().__init__()
        for name in PARTS:
            self.add_module(name, getattr(block, name))
        self.zero_cond_t = bool(block.zero_cond_t)
        _check(block)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_mask: Tensor | None,
        temb: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor],
        joint_attention_kwargs: dict[str, Any] | None = None,
        modulate_index: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(text (B, M, D), image (B, L, D)) after the block; the arguments are the stock block's.

        `joint_attention_kwargs` (the transformer's `attention_kwargs`) may hold "rotary", the tables of
        `qk_norm_rope`, made once for all blocks, and "text_lengths", each sample's text tokens where they differ.
        Raises ValueError for a mask, which "text_lengths" stands for.
        """
        if encoder_hidden_states_mask is not None:
            raise ValueError("a fused block takes no text mask; give attention_kwargs={'text_lengths': (...)}")
        given = joint_attention_kwargs or {}
        image, text = hidden_states, encoder_hidden_states
        img, txt = self._modulation(temb)
        tables = given["rotary"] if "rotary" in given else rotary_tables(*image_rotary_emb)
        x_img = adaln(image, img.scale1, img.shift1, modulate_index)
        x_txt = adaln(text, txt.scale1, txt.shift1)
        y_img, y_txt = self._attention(x_img, x_txt, tables, given.get("text_lengths"))
        image, x_img = gated_residual_adaln(image, y_img, img.gate1, img.scale2, img.shift2, modulate_index)
        text, x_txt = gated_residual_adaln(text, y_txt, txt.gate1, txt.scale2, txt.shift2)
        image = _gated_residual(image, _mlp(self.img_mlp, x_img), img.gate2, modulate_index)
        text = _gated_residual(text, _mlp(self.txt_mlp, x_txt), txt.gate2)
        if image.dtype == torch.float16:  # as the stock block does
            image, text = image.clamp(-FP16_MAX, FP16_MAX), text.clamp(-FP16_MAX, FP16_MAX)
        return text, image

    def _modulation(self, temb: Tensor) -> tuple[Modulation, Modulation]:
        """Of image and text. With `zero_cond_t` temb is (2 B, D): the second half, of time 0, is for references."""
        signal = F.silu(temb)
        img = linear(self.img_mod[1], signal[:, None])[:, 0]
        txt = linear(self.txt_mod[1], (signal.chunk(2)[0] if self.zero_cond_t else signal)[:, None])[:, 0]
        return Modulation(img), Modulation(txt)

    def _attention(
        self, x_img: Tensor, x_txt: Tensor, tables: tuple[Tensor, Tensor], text_lengths: tuple[int, ...] | None
    ) -> tuple[Tensor, Tensor]:
        """The joint attention of image and text, with its projections: (B, L, D) and (B, M, D)."""
        attn = self.attn
        q, k, v = qk_norm_rope(
            *three_linears((attn.to_q, attn.to_k, attn.to_v), x_img),
            *three_linears((attn.add_q_proj, attn.add_k_proj, attn.add_v_proj), x_txt),
            attn.norm_q.weight, attn.norm_k.weight, attn.norm_added_q.weight, attn.norm_added_k.weight, *tables,
        )  # fmt: skip
        backend = attn.processor._attention_backend
        out = joint_attention(q, k, v, x_img.shape[1], text_lengths, backend).flatten(2)
        L = x_img.shape[1]
        return linear(attn.to_out[0], out[:, :L]), linear(attn.to_add_out, out[:, L:])


class Modulation:
    """The six parameters (B, D) that a stream's modulation linear gives, in the stock block's order."""

    def __init__(self, parameters: Tensor) -> None:
        self.shift1, self.scale1, self.gate1, self.shift2, self.scale2, self.gate2 = parameters.chunk(6, dim=-1)


def fuse_blocks(transformer: Any) -> None:
    """Put a `FusedBlock` in each stock block's place. Nothing is copied; a second call changes nothing."""
    blocks = transformer.transformer_blocks
    for index, block in enumerate(blocks):
        if not isinstance(block, FusedBlock):
            blocks[index] = FusedBlock(block).train(block.training)


def linear(layer: nn.Linear, x_BLK: Tensor, epilogue: Epilogue = "none") -> Tensor:
    """A linear layer (B, L, N) with the adapters that are in use, and GELU behind it if asked."""
    if (lanes := _lanes(layer, x_BLK)) is not None:
        return lora_linear(x_BLK, layer.weight, layer.bias, *lanes, epilogue)
    y: Tensor = layer(x_BLK)
    return F.gelu(y, approximate="tanh") if epilogue == "gelu_tanh" else y


def three_linears(layers: tuple[nn.Linear, nn.Linear, nn.Linear], x_BLK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The projections of one input to q, k and v, with one pass over it for the adapters of all three."""
    asked = [_lanes(layer, x_BLK) for layer in layers]
    lanes = [of_layer for of_layer in asked if of_layer is not None]
    if len(lanes) == 3:
        A, B, scale, slot = zip(*lanes, strict=True)
        weights, biases = (tuple(getattr(layer, name) for layer in layers) for name in ("weight", "bias"))
        return lora_qkv(x_BLK, weights, biases, A, B, scale, slot[0])
    q, k, v = (linear(layer, x_BLK) for layer in layers)
    return q, k, v


def _lanes(layer: nn.Linear, x_BLK: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """What an op takes of a layer's adapters; None where none is in use, and for what no op takes: an int8 weight, and
    slots whose ranks add up to more than the kernels hold."""
    if not isinstance(layer, SlotLinear) or is_quantized(layer.weight):
        return None
    lanes = layer.lanes(x_BLK.shape[0])
    return None if lanes is None or lanes[0].shape[1] > MAX_RANK else lanes


def joint_attention(
    q: Tensor, k: Tensor, v: Tensor, L: int, text_lengths: tuple[int, ...] | None, backend: Any = None
) -> Tensor:
    """Attention without a mask over (B, J, H, E), by a library's kernel (`backend`, as diffusers names them).

    Samples of different text lengths attend one by one, within their first L + length tokens; what the result holds
    in padding is zero.
    """
    if text_lengths is None:
        return cast(Tensor, dispatch_attention_fn(q, k, v, backend=backend))
    rows = []
    for sample, length in enumerate(text_lengths):
        real = slice(0, L + length)
        parts = [x[sample : sample + 1, real] for x in (q, k, v)]
        out = dispatch_attention_fn(*parts, backend=backend)
        rows.append(F.pad(out, (0, 0, 0, 0, 0, q.shape[1] - out.shape[1])))
    return torch.cat(rows)


def fastest_attention() -> str | None:
    """diffusers' name of the attention to use on this process's GPU; None leaves its choice.

    FlashAttention-3 where it is installed (it takes the place of torch's own flash kernel, for the whole process),
    else cuDNN's; both are for Hopper, and their backward passes are torch's operators.
    """
    if torch.cuda.get_device_capability() != (9, 0):
        return None
    if importlib.util.find_spec("flash_attn_interface") is None:
        return "_native_cudnn"
    torch.nn.attention.activate_flash_attention_impl("FA3")
    return "_native_flash"


def _mlp(mlp: Any, x: Tensor) -> Tensor:
    return linear(mlp.net[2], linear(mlp.net[0].proj, x, "gelu_tanh"))


def _gated_residual(x: Tensor, y: Tensor, gate: Tensor, index: Tensor | None = None) -> Tensor:
    """x + gate * y; with an index as in `gated_residual_adaln`."""
    if index is None:
        return torch.addcmul(x, gate[:, None], y)
    first, second = gate[:, None].chunk(2)
    return torch.addcmul(x, torch.where(index[..., None] == 0, first, second), y)


def _check(block: Any) -> None:
    """Raise ValueError where the stock block is of another kind than this file computes."""
    norms = [block.attn.norm_q, block.attn.norm_k, block.attn.norm_added_q, block.attn.norm_added_k]
    layers = [block.img_norm1, block.img_norm2, block.txt_norm1, block.txt_norm2]
    if any(norm is None or norm.eps != EPS for norm in norms) or any(layer.eps != EPS for layer in layers):
        raise ValueError(f"a fused block needs RMSNorm on q and k, and epsilon {EPS:g} in every norm")

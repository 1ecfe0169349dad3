"""The network that an artefact holds: a Qwen-Image transformer at the noise levels of one schedule.

It runs over the stock modules and computes what `QwenImageTransformer2DModel.forward` does, in a form that graph
exporters take: rotary positions in real arithmetic, one attention call with a mask, and no linears of modulation. What
those would give depends on the noise level alone; for a schedule's levels it is a table, which takes the place of a
third of the base's weights.

Shape legend: B batch, T tokens of the result, R of the references, L = T + R, M text tokens, J = L + M, C latent
channels per token, D width, W text width, H heads, E width of a head, S noise levels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.transformers.transformer_qwenimage import QwenEmbedRope
from torch import Tensor, nn

from clora.backbones.cond import Grid
from clora.kernels.qk_norm_rope import rotary_tables

Rotate = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x (B, H, J, E), cos (J, E / 2), sin) -> x with each pair of neighbours turned by its token's angle."""


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`Rotate` in plain torch, in fp32 with one rounding to x's dtype."""
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2).to(x.dtype)


class ServedNetwork(nn.Module):
    """`transformer` (stock, without adapters) at `sigmas` (S,); its weights are shared, not copied.

    It keeps no linear of modulation, so that they are freed with the transformer.
    """

    def __init__(self, transformer: Any, sigmas: Tensor, rotate: Rotate = rotate) -> None:
        super().__init__()
        signal = modulation_signal(transformer, sigmas)
        self.img_in, self.txt_norm, self.txt_in = transformer.img_in, transformer.txt_norm, transformer.txt_in
        self.blocks = nn.ModuleList(ServedBlock(block, signal, rotate) for block in transformer.transformer_blocks)
        self.norm_out, self.proj_out = transformer.norm_out.norm, transformer.proj_out
        self.register_buffer("out", _table(transformer.norm_out.linear, signal))
        self.num_levels = len(sigmas)

    def forward(
        self, x: Tensor, refs: Tensor, text: Tensor, cos: Tensor, sin: Tensor, step: Tensor, text_len: Tensor
    ) -> Tensor:
        """Velocity (B, T, C) of x (B, T, C) at noise level number `step` (B,), int64.

        refs (B, R, C): latents of all references. text (B, M, W): embeddings, of which the first `text_len` (B,),
        int64, count. cos, sin (J, E / 2), fp32: positions, in the order result, references, text.
        """
        T, L, M = x.shape[1], x.shape[1] + refs.shape[1], text.shape[1]
        image = self.img_in(torch.cat([x, refs], dim=1))
        text = self.txt_in(_rms_norm(self.txt_norm, text))
        key = torch.arange(L + M, device=x.device)
        mask = (key < L + text_len[:, None])[:, None, None].expand(-1, 1, L + M, -1)
        is_ref = (torch.arange(L, device=x.device) >= T)[:, None]
        for block in self.blocks:
            text, image = block(image, text, cos, sin, mask, step, is_ref)
        scale, shift = self.get_buffer("out")[step].chunk(2, dim=-1)
        velocity: Tensor = self.proj_out(_modulated(self.norm_out(image[:, :T]), scale[:, None], shift[:, None]))
        return velocity


class ServedBlock(nn.Module):
    """A stock `QwenImageTransformerBlock` with tables for its modulation (S, 6 D); with `zero_cond_t` that of the
    image has one more row, of noise level 0, for the tokens of references."""

    def __init__(self, block: Any, signal: Tensor, rotate: Rotate) -> None:
        super().__init__()
        for name in ("attn", "img_norm1", "img_norm2", "img_mlp", "txt_norm1", "txt_norm2", "txt_mlp"):
            self.add_module(name, getattr(block, name))
        self.zero_cond_t = bool(block.zero_cond_t)
        self.heads = int(block.num_attention_heads)
        self.rotate = rotate
        self.register_buffer("img", _table(block.img_mod[1], signal))
        self.register_buffer("txt", _table(block.txt_mod[1], signal))

    def forward(
        self, image: Tensor, text: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, step: Tensor, is_ref: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(text (B, M, D), image (B, L, D)) after the block; `is_ref` (L, 1) marks the tokens of references."""
        img, txt = self.get_buffer("img")[step][:, None], self.get_buffer("txt")[step][:, None]
        if self.zero_cond_t:
            img = torch.where(is_ref, self.get_buffer("img")[-1], img)
        i_shift1, i_scale1, i_gate1, i_shift2, i_scale2, i_gate2 = img.chunk(6, dim=-1)
        t_shift1, t_scale1, t_gate1, t_shift2, t_scale2, t_gate2 = txt.chunk(6, dim=-1)
        x_img = _modulated(self.get_submodule("img_norm1")(image), i_scale1, i_shift1)
        x_txt = _modulated(self.get_submodule("txt_norm1")(text), t_scale1, t_shift1)
        y_img, y_txt = self._attention(x_img, x_txt, cos, sin, mask)
        image, text = image + i_gate1 * y_img, text + t_gate1 * y_txt
        x_img = _modulated(self.get_submodule("img_norm2")(image), i_scale2, i_shift2)
        x_txt = _modulated(self.get_submodule("txt_norm2")(text), t_scale2, t_shift2)
        image = image + i_gate2 * self.get_submodule("img_mlp")(x_img)
        text = text + t_gate2 * self.get_submodule("txt_mlp")(x_txt)
        return text, image

    def _attention(self, x_img: Tensor, x_txt: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        attn: Any = self.attn
        L = x_img.shape[1]
        q_img, k_img, v_img = (self._heads(layer(x_img)) for layer in (attn.to_q, attn.to_k, attn.to_v))
        added = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
        q_txt, k_txt, v_txt = (self._heads(layer(x_txt)) for layer in added)
        q = torch.cat([_rms_norm(attn.norm_q, q_img), _rms_norm(attn.norm_added_q, q_txt)], dim=2)
        k = torch.cat([_rms_norm(attn.norm_k, k_img), _rms_norm(attn.norm_added_k, k_txt)], dim=2)
        q, k = self.rotate(q, cos, sin), self.rotate(k, cos, sin)
        v = torch.cat([v_img, v_txt], dim=2)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
        return attn.to_out[0](out[:, :L]), attn.to_add_out(out[:, L:])

    def _heads(self, x: Tensor) -> Tensor:
        """(B, N, H E) -> (B, H, N, E)."""
        heads: Tensor = x.unflatten(-1, (self.heads, -1))
        return heads.transpose(1, 2)


@torch.no_grad()
def modulation_signal(transformer: Any, sigmas: Tensor) -> Tensor:
    """What every linear of modulation takes at `sigmas` (S,), fp64 (S, D); a last row of level 0 with `zero_cond_t`.

    Noise levels and sines are rounded as the pipeline and the stock model round them in the weights' dtype, because
    that is the function which was trained; all behind them is in fp64.
    """
    dtype = transformer.proj_out.weight.dtype
    levels = torch.cat([sigmas, sigmas.new_zeros(1)]) if transformer.zero_cond_t else sigmas
    timestep = (levels.float() * 1000).to(dtype) / 1000
    embed = transformer.time_text_embed
    first, second = embed.timestep_embedder.linear_1, embed.timestep_embedder.linear_2
    sines: Tensor = embed.time_proj(timestep).to(first.weight.device, dtype).double()
    signal: Tensor = F.silu(_linear(second, F.silu(_linear(first, sines))))
    return signal


def rotary_positions(config: dict[str, Any], grids: list[Grid], num_text: int) -> tuple[Tensor, Tensor]:
    """cos and sin (J, E / 2), fp32, of a result and its references (`grids`, the result first) and `num_text` tokens;
    `config` is the transformer's."""
    embed: Any = QwenEmbedRope(theta=10000, axes_dim=list(config["axes_dims_rope"]), scale_rope=True)
    shapes = [(1, height, width) for height, width in grids]
    return rotary_tables(*embed([shapes], max_txt_seq_len=num_text, device=torch.device("cpu")))


def _table(layer: nn.Linear, signal: Tensor) -> Tensor:
    """What a linear of modulation gives for each row of the signal, rounded once to its dtype."""
    return _linear(layer, signal).to(layer.weight.dtype).detach()


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    return F.linear(x, layer.weight.double(), None if layer.bias is None else layer.bias.double())


def _rms_norm(norm: Any, x: Tensor) -> Tensor:
    return F.rms_norm(x, norm.weight.shape, norm.weight, norm.eps)


def _modulated(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return x * (1 + scale) + shift

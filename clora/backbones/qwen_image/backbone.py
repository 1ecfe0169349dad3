"""Qwen-Image-Edit (2509 and 2511): an open base, and its velocity through diffusers' own code.

What reaches the transformer is bit for bit what the stock `QwenImageEditPlusPipeline` would give it, with one
exception: the text encoder gets `mm_token_type_ids`, which the pipeline forgets under transformers 5 (diffusers issue
14194), losing the 3-D positions of reference images. 2511 differs from 2509 in one key of the transformer's
configuration, `zero_cond_t`: tokens of references are modulated as at noise level 0, whatever that of the result is.

Shape legend: B batch, T tokens, C latent channels per token, L text tokens, D text width, H W pixels.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from diffusers.utils import logging as diffusers_logging
from PIL import Image
from torch import Tensor, nn

from clora.backbones import Kernels
from clora.backbones.base_schedule import base_sigmas
from clora.backbones.cond import Cond, Grid, Size, VaeGraph
from clora.backbones.qwen_image.block import fastest_attention, fuse_blocks
from clora.backbones.qwen_image.images import decode_latents, encode_pixels, grid_of
from clora.backbones.qwen_image.pipeline import load_pipeline
from clora.backbones.qwen_image.sizes import ImageSizes, image_size
from clora.backbones.qwen_image.text import count_tokens, encode_prompt, longest_prompt
from clora.errors import InputError, first_line
from clora.kernels.qk_norm_rope import rotary_tables
from clora.lora.adapters import Adapters, inject_adapters
from clora.lora.frozen_linear import check_torchao, quantize_linears
from clora.lora.layers import QWEN_IMAGE_TARGETS
from clora.lora.recompute import checkpoint_fn
from clora.lora.slots import Slot

# What a recomputed block does not compute again: attention, by whichever of torch's kernels.
KEPT = (
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
)


def load_qwen_image(
    base: str,
    folder: Path,
    sizes: ImageSizes,
    device: torch.device,
    dtype: torch.dtype,
    components: Sequence[str],
    transformer_device: torch.device,
    quantize: str,
) -> QwenImageBackbone:
    """The base in `folder`, called `base` in messages; the arguments are those of `clora.backbones.load`."""
    if quantize == "int8":
        check_torchao()
    try:
        pipeline = load_pipeline(base, folder, dtype, components)
    except InputError:
        raise
    except (OSError, ValueError) as error:  # diffusers and transformers raise these for bad files
        reason = first_line(error)
        raise InputError(f"base {base}: cannot be loaded ({reason}); check the folder or hub id") from error
    if quantize == "int8" and "transformer" in components:
        quantize_linears(pipeline.transformer.transformer_blocks, device)
    for name in components:
        getattr(pipeline, name).to(transformer_device if name == "transformer" else device)
    return QwenImageBackbone(base, pipeline, sizes, device, dtype)


class QwenImageBackbone:
    """One base model: `pipeline` holds the stock pieces (those not asked for are None), `adapters` its slots.

    The methods that `clora.backbones.base.Backbone` has are described there.
    """

    def __init__(self, base: str, pipeline: Any, sizes: ImageSizes, device: torch.device, dtype: torch.dtype) -> None:
        self.base = base
        self.pipeline = pipeline
        self.sizes = sizes
        self.device, self.dtype = device, dtype
        self.adapters: Adapters | None = None
        self.fused = False
        self.encode_graph: VaeGraph | None = None
        self.decode_graph: VaeGraph | None = None
        self._rotary: tuple[Any, tuple[Tensor, Tensor]] | None = None  # the last tables, and what they are of

    @property
    def transformer(self) -> Any:
        return self._component("transformer")

    @property
    def blocks(self) -> list[nn.Module]:
        return list(self.transformer.transformer_blocks)

    @property
    def vae(self) -> Any:
        return self._component("vae")

    def _component(self, name: str) -> Any:
        module = getattr(self.pipeline, name)
        if module is None:
            raise RuntimeError(f"the {name} of {self.base} is not loaded (or was freed); load the base with it")
        return module

    # Adapters and memory

    @property
    def default_targets(self) -> tuple[str, ...]:
        return QWEN_IMAGE_TARGETS

    def add_adapters(self, targets: Sequence[str] | None = None) -> Adapters:
        self.adapters = inject_adapters(self.transformer, QWEN_IMAGE_TARGETS if targets is None else targets)
        return self.adapters

    def set_gradient_checkpointing(self, enabled: bool, num_blocks_kept: int = 0) -> None:
        """With adapters all is recomputed but attention, a third of a block's arithmetic at 1024 x 1024 pixels and a
        small part of its memory. The last blocks are the first that a backward pass frees. Blocks are known by
        identity, and a recomputed one has the slots that its forward used.
        """
        if not enabled:
            self.transformer.disable_gradient_checkpointing()
        elif self.adapters is None:
            self.transformer.enable_gradient_checkpointing()
        else:
            whole = self.blocks[max(0, len(self.blocks) - num_blocks_kept) :]
            self.transformer.enable_gradient_checkpointing(checkpoint_fn(self.adapters.choice, KEPT, whole))

    def use_kernels(self, kernels: Kernels) -> None:
        """With "auto" blocks are fused on a GPU, where the ops are kernels; elsewhere they are plain torch, and
        diffusers' blocks are as fast. On a GPU attention is `fastest_attention`'s. Fusing is for good: blocks cannot be
        put back.
        """
        if kernels == "fused" or (kernels == "auto" and self.device.type == "cuda"):
            fuse_blocks(self.transformer)
            self.fused = True
            # The fast kernels are of half precision; fp32 keeps diffusers' choice.
            on_gpu = self.device.type == "cuda" and self.dtype != torch.float32
            if on_gpu and (backend := fastest_attention()) is not None:
                use_attention(self.transformer, backend)
        elif kernels == "reference" and self.fused:
            raise RuntimeError("the blocks are fused already; load the base anew to run diffusers' own")

    def use_plain_attention(self) -> None:
        """On a CPU in bf16 the fused attention's backward pass is slow."""
        use_attention(self.transformer, "_native_math")

    def free_encoders(self, vae: bool = False) -> None:
        self.pipeline.text_encoder = None
        if vae:
            self.pipeline.vae = None
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    # Sizes

    @property
    def token_channels(self) -> int:
        if self.pipeline.transformer is None:  # the VAE's latents say it too: loading checks that they agree
            return 4 * int(self.pipeline.latent_channels)
        return int(self.transformer.config.in_channels)

    @property
    def pixels_per_token(self) -> int:
        return 2 * int(self.pipeline.vae_scale_factor)

    def grid(self, size: Size) -> Grid:
        return grid_of(size, self.pixels_per_token)

    def output_size(self, image: Image.Image | None = None) -> Size:
        return self.sizes.default_size if image is None else self.reference_size(image)

    def reference_size(self, image: Image.Image) -> Size:
        """The (height, width) at which a reference image is shown to the VAE: `sizes.image_size`."""
        return image_size(image.size, self.sizes, self.pixels_per_token)

    # Text and images

    @property
    def max_prompt_tokens(self) -> int:
        return longest_prompt(self.pipeline)

    def count_prompt_tokens(self, prompt: str) -> int:
        return count_tokens(self.pipeline, prompt)

    def encode_prompts(self, prompts: Sequence[str], images: Sequence[Sequence[Image.Image]]) -> list[Tensor]:
        self._component("text_encoder")
        area = self.sizes.condition_image_area
        return [
            encode_prompt(self.pipeline, prompt, references, area, self.device)
            for prompt, references in zip(prompts, images, strict=True)
        ]

    def encode_images(self, images: Sequence[Image.Image], size: Size) -> tuple[Tensor, Grid]:
        """Packed, normalised latents (B, T, C) of images (RGB) resized to (height, width), and their grid; in the
        base's dtype."""
        grid = self.grid(size)
        if self.encode_graph is None:
            self._component("vae")
        return encode_pixels(self.pipeline, images, size, self.device, self.dtype, self.encode_graph), grid

    def encode_references(self, images: Sequence[Image.Image]) -> tuple[Tensor, Grid]:
        sizes = {self.reference_size(image) for image in images}
        if len(sizes) != 1:
            raise InputError(f"reference images of one batch scale to different sizes {sorted(sizes)}; bucket them")
        return self.encode_images(images, sizes.pop())

    def encode_targets(self, images: Sequence[Image.Image], size: Size) -> tuple[Tensor, Grid]:
        return self.encode_images(images, size)

    def decode(self, x_BTC: Tensor, grid: Grid) -> Tensor:
        if self.decode_graph is None:
            self._component("vae")
        size = (grid[0] * self.pixels_per_token, grid[1] * self.pixels_per_token)
        return decode_latents(self.pipeline, x_BTC, size, self.device, self.dtype, self.decode_graph)

    def use_vae_graphs(self, encode: VaeGraph, decode: VaeGraph) -> None:
        self.encode_graph, self.decode_graph = encode, decode

    def to_pil(self, images: Tensor) -> list[Image.Image]:
        pixels = (images.detach().float().permute(0, 2, 3, 1) * 255).round().to(torch.uint8).cpu().numpy()
        return [Image.fromarray(one) for one in pixels]

    # The model

    def own_sigmas(self, num_steps: int, num_tokens: int) -> Tensor:
        return base_sigmas(self.pipeline.scheduler.config, num_steps, num_tokens)

    def velocity(self, x_BTC: Tensor, sigma_B: Tensor, cond: Cond, slots: Sequence[Slot] | None = None) -> Tensor:
        num_samples, num_tokens, _ = x_BTC.shape
        if num_samples != cond.batch_size or num_tokens != cond.grid[0] * cond.grid[1]:
            raise ValueError(f"latents {tuple(x_BTC.shape)} do not fit {cond.batch_size} samples of grid {cond.grid}")
        shapes = [(1, height, width) for height, width in (cond.grid, *cond.ref_grids)]
        tokens = torch.cat([part.to(self.dtype) for part in (x_BTC, *cond.refs)], dim=1)
        # The pipeline's own rounding: it holds 1000 sigma in the latents' dtype before it divides.
        timestep = (sigma_B.float() * 1000).to(self.dtype) / 1000
        with self._slots(slots):
            velocity: Tensor = self.transformer(
                hidden_states=tokens,
                timestep=timestep.expand(num_samples),
                encoder_hidden_states=cond.text_BLD.to(self.dtype),
                encoder_hidden_states_mask=None if self.fused else cond.text_mask_BL,
                img_shapes=[shapes] * num_samples,
                attention_kwargs=self._for_fused_blocks(cond, shapes) if self.fused else None,
                return_dict=False,
            )[0]
        return velocity[:, :num_tokens].to(x_BTC.dtype)

    def _for_fused_blocks(self, cond: Cond, shapes: list[tuple[int, int, int]]) -> dict[str, Any]:
        """What all blocks share, made once: the rotary tables (kept for the next call), and lengths for a mask."""
        text_tokens = cond.text_BLD.shape[1]
        key = (tuple(shapes), text_tokens)
        if self._rotary is None or self._rotary[0] != key:
            freqs = self.transformer.pos_embed([shapes], max_txt_seq_len=text_tokens, device=self.device)
            self._rotary = key, rotary_tables(*freqs)
        return {"rotary": self._rotary[1], "text_lengths": cond.text_lengths}

    def _slots(self, slots: Sequence[Slot] | None) -> Any:
        if slots is None:
            return nullcontext()
        if self.adapters is None:
            raise RuntimeError(f"slots {list(slots)} were asked of a base without adapters; call add_adapters first")
        return self.adapters.use(slots)


def use_attention(transformer: Any, backend: str) -> None:
    """Give a transformer this attention (`backend`, as diffusers names them), and leave other models theirs."""
    verbosity, of_others = diffusers_logging.get_verbosity(), _AttentionBackendRegistry.get_active_backend()[0]
    diffusers_logging.set_verbosity_error()  # it announces that choosing a backend is experimental
    transformer.set_attention_backend(backend)
    _AttentionBackendRegistry.set_active_backend(of_others)
    diffusers_logging.set_verbosity(verbosity)

"""Qwen-Image-Edit (2509 and 2511): loading, encoding, decoding and the velocity, through diffusers' own code.

Latents are packed tokens (B, T, C), C = 4 z: a 2 x 2 square of the VAE's latent pixels, normalised by the
VAE's `latents_mean` and `latents_std`. What reaches the transformer is bit for bit what the stock
`QwenImageEditPlusPipeline` would give it, with one exception: the text encoder gets `mm_token_type_ids`,
which the pipeline forgets under transformers 5 (diffusers issue 14194), losing the 3-D positions of reference
images.

Shape legend: B batch, T tokens, C latent channels per token, L text tokens, D text width, H W pixels, h w
tokens.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers.utils import logging as diffusers_logging
from PIL import Image
from torch import Tensor

from clora.backbones.base_schedule import base_sigmas
from clora.backbones.cond import Cond, Grid, make_cond
from clora.backbones.qwen_image.block import fastest_attention, fuse_blocks
from clora.backbones.qwen_image.pipeline import COMPONENTS, load_pipeline
from clora.backbones.qwen_image.sizes import Size, condition_size, image_size
from clora.config import BaseSidecar, Quantize, read_sidecar, resolve_base
from clora.errors import InputError
from clora.kernels.qk_norm_rope import rotary_tables
from clora.lora.adapters import DEFAULT_TARGETS, Adapters, inject_adapters
from clora.lora.frozen_linear import check_torchao, quantize_linears
from clora.lora.recompute import checkpoint_fn
from clora.lora.slots import Slot

Kernels = Literal["auto", "reference", "fused"]

# What a recomputed block does not compute again: attention, by whichever of torch's kernels.
KEPT = (
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
)


class QwenImageBackbone:
    """One base model: `pipeline` holds the stock pieces (those not asked for are None), `adapters` its
    slots."""

    def __init__(self, base: str, pipeline: Any, sizes: BaseSidecar, device: torch.device, dtype: torch.dtype) -> None:
        self.base = base
        self.pipeline = pipeline
        self.sizes = sizes
        self.device, self.dtype = device, dtype
        self.adapters: Adapters | None = None
        self.fused = False
        self._rotary: tuple[Any, tuple[Tensor, Tensor]] | None = None  # the last tables, and what they are of

    make_cond = staticmethod(make_cond)

    @property
    def transformer(self) -> Any:
        return self._component("transformer")

    @property
    def vae(self) -> Any:
        return self._component("vae")

    def _component(self, name: str) -> Any:
        module = getattr(self.pipeline, name)
        if module is None:
            raise RuntimeError(f"the {name} of {self.base} is not loaded (or was freed); load the base with it")
        return module

    # Adapters and memory

    def add_adapters(self, targets: Sequence[str] = DEFAULT_TARGETS) -> Adapters:
        """Freeze the transformer and give its target linears adapter slots."""
        self.adapters = inject_adapters(self.transformer, targets)
        return self.adapters

    def set_gradient_checkpointing(self, enabled: bool, num_blocks_kept: int = 0) -> None:
        """Recompute each block but the last `num_blocks_kept` in the backward pass, with the slots its forward used.

        With adapters all is recomputed but attention, a third of a block's arithmetic at 1024 x 1024 pixels and a
        small part of its memory. The last blocks are the first that a backward pass frees. Blocks are known by
        identity: call this after `use_kernels`.
        """
        if not enabled:
            self.transformer.disable_gradient_checkpointing()
        elif self.adapters is None:
            self.transformer.enable_gradient_checkpointing()
        else:
            blocks = list(self.transformer.transformer_blocks)
            whole = blocks[max(0, len(blocks) - num_blocks_kept) :]
            self.transformer.enable_gradient_checkpointing(checkpoint_fn(self.adapters, KEPT, whole))

    def use_kernels(self, kernels: Kernels) -> None:
        """Run the transformer's blocks on `clora.kernels` ("fused"), or as diffusers does ("reference").

        "auto" fuses on a GPU, where the ops are kernels; elsewhere they are plain torch, and diffusers' blocks are
        as fast. On a GPU attention is `fastest_attention`'s. Fusing is for good: blocks cannot be put back.
        """
        if kernels == "fused" or (kernels == "auto" and self.device.type == "cuda"):
            fuse_blocks(self.transformer)
            self.fused = True
            # The fast kernels are of half precision; fp32 keeps diffusers' choice.
            on_gpu = self.device.type == "cuda" and self.dtype != torch.float32
            if on_gpu and (backend := fastest_attention()) is not None:
                self._use_attention(backend)
        elif kernels == "reference" and self.fused:
            raise RuntimeError("the blocks are fused already; load the base anew to run diffusers' own")

    def use_plain_attention(self) -> None:
        """Attention by plain matrix products: on a CPU in bf16 the fused kernel's backward pass is slow."""
        self._use_attention("_native_math")

    def _use_attention(self, backend: str) -> None:
        verbosity = diffusers_logging.get_verbosity()
        diffusers_logging.set_verbosity_error()  # it announces that choosing a backend is experimental
        self.transformer.set_attention_backend(backend)
        diffusers_logging.set_verbosity(verbosity)

    def free_encoders(self, vae: bool = False) -> None:
        """Drop the text encoder (and the VAE if asked); needed no more once prompts and images are cached."""
        self.pipeline.text_encoder = None
        if vae:
            self.pipeline.vae = None
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    # Sizes

    @property
    def pixels_per_token(self) -> int:
        return 2 * int(self.pipeline.vae_scale_factor)

    def output_size(self, image: Image.Image | None = None) -> Size:
        """The size of a result: the base's area at the shape of the (last) image, see `sizes.image_size`."""
        return self.sizes.default_size if image is None else self.reference_size(image)

    def reference_size(self, image: Image.Image) -> Size:
        """The size at which a reference image is shown to the VAE."""
        return image_size(image.size, self.sizes, self.pixels_per_token)

    def grid(self, size: Size) -> Grid:
        """Tokens of an image of (height, width) pixels; both must be multiples of `pixels_per_token`."""
        unit = self.pixels_per_token
        if size[0] % unit or size[1] % unit or min(size) < unit:
            raise InputError(f"size {size[0]}x{size[1]} (height x width): both must be multiples of {unit}")
        return size[0] // unit, size[1] // unit

    # Text

    @property
    def max_prompt_tokens(self) -> int:
        """The longest prompt: the pipeline's limit, or what the text encoder's positions leave beside the
        template."""
        template = self.count_prompt_tokens(self.pipeline.prompt_template_encode.format(""))
        return int(min(self.pipeline.tokenizer_max_length, self.pipeline.text_positions - template))

    def count_prompt_tokens(self, prompt: str) -> int:
        """Tokens of a prompt's own words, without template and images. Needs no text encoder."""
        return len(self.pipeline.tokenizer(prompt)["input_ids"])

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str], images: Sequence[Sequence[Image.Image]]) -> list[Tensor]:
        """Embeddings (L_i, D) of each prompt with its own reference images (RGB), in the pipeline's template.

        Raises `InputError` for a prompt that, with its images, is longer than the text encoder can take;
        nothing is ever cut off.
        """
        self._component("text_encoder")
        embeddings = []
        for prompt, references in zip(prompts, images, strict=True):
            length = self.count_prompt_tokens(prompt)
            if length > self.max_prompt_tokens:
                limit = self.max_prompt_tokens
                raise InputError(f"prompt {prompt[:60]!r}... has {length} tokens, the limit is {limit}; shorten it")
            small = [self._condition_image(image) for image in references]
            # One at a time: the pipeline cannot tell which image belongs to which prompt.
            text, mask = self.pipeline.encode_prompt([prompt], small or None, device=self.device)
            embeddings.append(text[0] if mask is None else text[0][mask[0].bool()])
        return embeddings

    def _condition_image(self, image: Image.Image) -> Image.Image:
        small: Image.Image = self.pipeline.image_processor.resize(image, *condition_size(image.size, self.sizes))
        return small

    # Images

    @torch.no_grad()
    def encode_images(self, images: Sequence[Image.Image], size: Size) -> tuple[Tensor, Grid]:
        """Packed, normalised latents (B, T, C) of images (RGB) resized to (height, width), and their grid.

        The mode of the posterior, (z - latents_mean) / latents_std, in the base's dtype.
        """
        grid = self.grid(size)
        pixels = self.pipeline.image_processor.preprocess(list(images), *size).unsqueeze(2)
        vae = self.vae
        latents = self.pipeline._encode_vae_image(pixels.to(self.device, self.dtype), generator=None)
        packed = self.pipeline._pack_latents(
            latents, len(images), vae.config.z_dim, latents.shape[-2], latents.shape[-1]
        )
        return packed, grid

    def encode_references(self, images: Sequence[Image.Image]) -> tuple[Tensor, Grid]:
        """`encode_images` at `reference_size`; the images of a batch must share one aspect ratio."""
        sizes = {self.reference_size(image) for image in images}
        if len(sizes) != 1:
            raise InputError(f"reference images of one batch scale to different sizes {sorted(sizes)}; bucket them")
        return self.encode_images(images, sizes.pop())

    def encode_targets(self, images: Sequence[Image.Image], size: Size) -> tuple[Tensor, Grid]:
        """Target latents x0 (B, T, C) of images at the result's (height, width); the same encoding as
        references."""
        return self.encode_images(images, size)

    @torch.no_grad()
    def decode(self, x_BTC: Tensor, grid: Grid) -> Tensor:
        """Images (B, 3, H, W) in [0, 1], fp32, from packed latents, as the stock pipeline decodes them."""
        unit = self.pixels_per_token
        vae = self.vae
        latents = self.pipeline._unpack_latents(x_BTC, grid[0] * unit, grid[1] * unit, unit // 2)
        latents = latents.to(self.device, vae.dtype)
        shape = (1, vae.config.z_dim, 1, 1, 1)
        mean = torch.tensor(vae.config.latents_mean).view(shape).to(latents)
        inverse_std = 1.0 / torch.tensor(vae.config.latents_std).view(shape).to(latents)
        images = vae.decode(latents / inverse_std + mean, return_dict=False)[0][:, :, 0]
        pixels: Tensor = (images.float() * 0.5 + 0.5).clamp(0, 1)
        return pixels

    def to_pil(self, images: Tensor) -> list[Image.Image]:
        """RGB images from (B, 3, H, W) in [0, 1], rounded to 8 bits."""
        pixels = (images.detach().float().permute(0, 2, 3, 1) * 255).round().to(torch.uint8).cpu().numpy()
        return [Image.fromarray(one) for one in pixels]

    # The model

    @property
    def token_channels(self) -> int:
        """C, the latent channels of one token."""
        return int(self.transformer.config.in_channels)

    def own_sigmas(self, num_steps: int, num_tokens: int) -> Tensor:
        """The noise levels at which the base's own pipeline samples a result of so many tokens, see `base_sigmas`."""
        return base_sigmas(self.pipeline.scheduler.config, num_steps, num_tokens)

    def velocity(self, x_BTC: Tensor, sigma_B: Tensor, cond: Cond, slots: Sequence[Slot] | None = None) -> Tensor:
        """eps - x0 as the model predicts it at noise level sigma (1 = noise), (B, T, C) in x's dtype.

        `slots` as in `Adapters.use`; None leaves the current choice (outside of `use`: the base).
        """
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


def load_backbone(
    base: str | Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    components: Sequence[str] = COMPONENTS,
    revision: str | None = None,
    transformer_device: torch.device | str | None = None,
    quantize: Quantize = "none",
) -> QwenImageBackbone:
    """Load a base model (see `resolve_base`), frozen and in eval mode, with only the `components` asked for.

    The transformer may be left on another device, to be moved to `device` later. `quantize` is for the linears of its
    blocks.

    Tokenizer, processor and the VAE's configuration always come along, so that prompts can be counted and
    sizes computed without any weights. Raises `InputError` for a folder or hub id that holds no
    `QwenImageEditPlusPipeline`.
    """
    if unknown := set(components) - set(COMPONENTS):
        raise ValueError(f"unknown components {sorted(unknown)}; known: {', '.join(COMPONENTS)}")
    if quantize == "int8":
        check_torchao()
    path, device = resolve_base(base), torch.device(device)
    try:
        pipeline = load_pipeline(path, dtype, components, revision)
    except InputError:
        raise
    except (
        OSError,
        ValueError,
    ) as error:  # what diffusers, transformers and the hub's client raise for bad files
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"base {base}: cannot be loaded ({reason}); check the folder or hub id") from error
    if quantize == "int8" and "transformer" in components:
        quantize_linears(pipeline.transformer.transformer_blocks, device)
    for name in components:
        elsewhere = transformer_device is not None and name == "transformer"
        getattr(pipeline, name).to(transformer_device if elsewhere else device)
    return QwenImageBackbone(str(base), pipeline, read_sidecar(path), device, dtype)

"""The footprint: parameters against diffusers' own, activations as measured, 2509 and 2511."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel
from torch import Tensor, nn

from clora.backbones.counts import ForwardSize
from clora.backbones.load import SHAPES, encoder_parameters, linear_shapes, read_footprint
from clora.backbones.qwen_image.backbone import KEPT
from clora.backbones.qwen_image.footprint import transformer_footprint
from clora.backbones.qwen_image.pipeline import count_encoder_parameters
from clora.lora.adapters import Adapters, inject_adapters
from clora.lora.layers import QWEN_IMAGE_TARGETS
from clora.lora.recompute import checkpoint_fn
from clora.training.flat_parameters import FlatParameters
from tests.support.memory import PeakBytes
from tests.support.random_base import random_transformer

SMALL: dict[str, Any] = {
    "num_layers": 3,
    "attention_head_dim": 64,
    "num_attention_heads": 4,
    "joint_attention_dim": 96,
    "axes_dims_rope": (16, 24, 24),
}
KNOWN = ("Qwen/Qwen-Image-Edit-2509", "Qwen/Qwen-Image-Edit-2511")
RANK = 8


def size(dtype: torch.dtype, batch_size: int = 2) -> ForwardSize:
    """What `forward` below runs: 256 tokens of image, 256 of its reference, 20 of text."""
    return ForwardSize(batch_size, 256, 256, 20, dtype.itemsize, RANK)


def model_with_adapters(dtype: torch.dtype, **config: Any) -> tuple[Any, Adapters]:
    """Random layers with the student's adapters on the default targets, as they are trained."""
    model = random_transformer(**SMALL | config).to(dtype)
    model.set_attention_backend("native")
    adapters = inject_adapters(model, QWEN_IMAGE_TARGETS)
    adapters.add_stack("student", ["student"], RANK, RANK, trainable=True)
    FlatParameters(adapters.named_parameters("student"), dtype=dtype)
    return model, adapters


def forward(model: Any, batch: int, dtype: torch.dtype) -> Tensor:
    """One forward at the tokens of `size`."""
    velocity: Tensor = model(
        hidden_states=torch.randn(batch, 512, 64, dtype=dtype),
        timestep=torch.rand(batch).to(dtype),
        encoder_hidden_states=torch.randn(batch, 20, 96, dtype=dtype),
        img_shapes=[[(1, 16, 16)] * 2] * batch,
        return_dict=False,
    )[0]
    return velocity


# Parameters


@pytest.mark.parametrize(
    "config", [{"num_layers": 60}, SMALL, {"num_layers": 1, "in_channels": 32, "out_channels": None}]
)
def test_transformer_footprint_equals_diffusers(config: dict[str, Any]) -> None:
    with torch.device("meta"):
        model = QwenImageTransformer2DModel(**config)
    footprint = transformer_footprint(dict(model.config), {})
    linears = {
        name: (one.out_features, one.in_features) for name, one in model.named_modules() if isinstance(one, nn.Linear)
    }
    assert list(footprint.linears.items()) == list(linears.items())
    assert footprint.num_parameters == sum(p.numel() for p in model.parameters())
    assert footprint.block_parameters == sum(p.numel() for p in model.transformer_blocks[0].parameters())
    default = inject_adapters(model, footprint.default_targets)
    A_and_B = sum(N + K for N, K in default.module_shapes.values())
    assert footprint.adapter_parameters(3, footprint.default_targets) == 3 * A_and_B


@pytest.mark.parametrize("base", KNOWN)
def test_shipped_shapes_build_the_published_models(base: str) -> None:
    """20.4 billion parameters of transformer, 8.29 of text encoder, 127 million of VAE; 2511 says `zero_cond_t`."""
    shipped = json.loads((SHAPES / f"{base.replace('/', '--')}.json").read_text())
    with torch.device("meta"):
        model = QwenImageTransformer2DModel(**shipped["transformer"])
        vae = AutoencoderKLQwenImage(**shipped["vae"])
    assert vae.config.latents_std == AutoencoderKLQwenImage().config.latents_std  # the class's defaults are its own
    assert model.config.zero_cond_t == base.endswith("2511")
    footprint = read_footprint(base)
    assert footprint.num_parameters == sum(p.numel() for p in model.parameters())
    assert footprint.num_parameters / 1e9 == pytest.approx(20.43, abs=0.01)
    assert (footprint.pixels_per_token, footprint.reference_tokens, footprint.num_layers) == (16, 4096, 60)
    assert len(linear_shapes(base)) == 60 * len(QWEN_IMAGE_TARGETS) + 6
    counted = count_encoder_parameters(shipped["vae"], shipped["text_encoder"])
    assert encoder_parameters(base) == counted
    assert counted["text_encoder"] / 1e9 == pytest.approx(8.29, abs=0.01) and counted["vae"] / 1e6 == pytest.approx(
        127, abs=1
    )


# Activations


@pytest.mark.parametrize("zero_cond_t", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_by_block_is_what_autograd_keeps(dtype: torch.dtype, zero_cond_t: bool) -> None:
    """Distinct storages kept by a second block, parameters left out: to the byte, but for the modulation of
    `zero_cond_t`, whose second row a sample is left out."""

    def kept(num_layers: int) -> int:
        model, adapters = model_with_adapters(dtype, num_layers=num_layers, zero_cond_t=zero_cond_t)
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        storages: dict[int, Tensor] = {}

        def keep(tensor: Tensor) -> Tensor:
            if tensor.untyped_storage().data_ptr() not in own:
                storages[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), adapters.use(["student"]):
            forward(model, batch=2, dtype=dtype)
            return sum(tensor.untyped_storage().nbytes() for tensor in storages.values())

    footprint = transformer_footprint(SMALL | {"zero_cond_t": zero_cond_t}, {})
    tolerance = 1e-3 if zero_cond_t else 0
    assert kept(2) - kept(1) == pytest.approx(footprint.saved_by_block(size(dtype)), rel=tolerance, abs=0)


@pytest.mark.parametrize("zero_cond_t", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forwards_are_within_a_tenth_of_what_is_measured(dtype: torch.dtype, zero_cond_t: bool) -> None:
    footprint, one = transformer_footprint(SMALL | {"zero_cond_t": zero_cond_t}, {}), size(dtype)
    with PeakBytes() as measured:
        model, adapters = model_with_adapters(dtype, zero_cond_t=zero_cond_t)
        with adapters.use(["student"]):
            with torch.no_grad():
                forward(model, 2, dtype)  # makes the tables that stay
                before = measured.peak = measured.live
                forward(model, 2, dtype)
            assert footprint.forward_workspace(one) == pytest.approx(measured.peak - before, rel=0.1)
            kept = []
            for checkpointing in (False, True):
                if checkpointing:
                    model.enable_gradient_checkpointing(checkpoint_fn(adapters.choice, KEPT))
                output = forward(model, 2, dtype)
                kept.append(measured.live - before)
                del output
    outside = footprint.saved_outside_blocks(one)
    assert 3 * footprint.saved_by_block(one) + outside == pytest.approx(kept[0], rel=0.05)
    # Small beside the peak: what surrounds the blocks may be rough.
    assert 3 * footprint.saved_by_recomputed_block(one) + outside == pytest.approx(kept[1], rel=0.25)

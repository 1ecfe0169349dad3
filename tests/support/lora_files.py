"""LoRA files for tests: small modules, the keys of every layout, and updates by definition in fp64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from clora.errors import InputErrors
from clora.lora.files import read_lora
from clora.lora.keys import flat_name
from clora.lora.module import LoraModule
from clora.lora.summary import ModuleNames

TO_Q = "transformer_blocks.0.attn.to_q"
MLP = "transformer_blocks.11.img_mlp.net.0.proj"

LAYOUTS = {
    "comfyui": (f"diffusion_model.{TO_Q}", ("lora_A", "lora_B")),
    "diffusers": (f"transformer.{TO_Q}", ("lora_A", "lora_B")),
    "peft": (f"base_model.model.{TO_Q}", ("lora_A", "lora_B")),
    "bare": (TO_Q, ("lora_A.default", "lora_B.default")),
    "kohya": (f"lora_unet_{flat_name(TO_Q)}", ("lora_down", "lora_up")),
    "lycoris": (f"lycoris_{flat_name(TO_Q)}", ("lora_down", "lora_up")),
    "onetrainer": (f"lora_transformer_{flat_name(TO_Q)}", ("lora_down", "lora_up")),
    "diffsynth": (f"pipe.dit.{TO_Q}", ("lora_A.default", "lora_B.default")),
}


def module(seed: int, rank: int = 2, alpha: float = 3.0, dtype: torch.dtype = torch.float32) -> LoraModule:
    """A module of a 6 x 6 weight."""
    rng = torch.Generator().manual_seed(seed)
    A = torch.randn(rank, 6, generator=rng).to(dtype)
    return LoraModule(A, torch.randn(6, rank, generator=rng).to(dtype), alpha)


def pair(stem: str, seed: int = 0, names: tuple[str, str] = ("lora_A", "lora_B"), rank: int = 2) -> dict[str, Tensor]:
    one = module(seed, rank)
    return {f"{stem}.{names[0]}.weight": one.A, f"{stem}.{names[1]}.weight": one.B}


def save(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    save_file(tensors, path, metadata)
    return path


def faults_of(path: Path, names: ModuleNames | None = None) -> list[str]:
    with pytest.raises(InputErrors) as caught:
        read_lora(path, names)
    return caught.value.faults

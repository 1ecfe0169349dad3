"""A LoRA as PEFT keeps it: a folder with the matrices in one file and ranks, alphas and names in another."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clora.errors import InputError
from clora.lora.module import LoraModule

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."  # of PEFT's keys


def weights_file(path: Path) -> Path:
    """The file with the tensors: that of a PEFT folder, else `path` itself."""
    inside = path / WEIGHTS
    return inside if inside.is_file() else path


def adapter_config(modules: Mapping[str, LoraModule]) -> dict[str, Any]:
    """PEFT's configuration of these modules, with no key that an older PEFT does not know.

    `r` and `lora_alpha` are the most frequent ones, and the patterns name every other module in full: PEFT reads a
    pattern as a regular expression for the whole name, or the end of one.
    """
    ranks = {name: module.rank for name, module in sorted(modules.items())}
    alphas = {name: _number(module.alpha) for name, module in sorted(modules.items())}
    rank, alpha = _most(ranks.values()), _most(alphas.values())
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {name: own for name, own in ranks.items() if own != rank},
        "alpha_pattern": {name: own for name, own in alphas.items() if own != alpha},
        "target_modules": list(ranks),
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
    }


def check_folder(folder: Path) -> None:
    """Raise `InputError` where no new folder can have this name."""
    if folder.suffix == ".safetensors":
        raise InputError(f"{folder}: PEFT's layout is a folder with two files; name it without .safetensors")
    if folder.is_symlink() or folder.exists():
        raise InputError(f"{folder}: is there already, and no folder is overwritten; name a new one")


def _number(value: float) -> float:
    """An int where it is one, as PEFT's own files have it."""
    return int(value) if value == int(value) else value


def _most(values: Any) -> Any:
    return min(Counter(values).items(), key=lambda item: (-item[1], item[0]))[0]

"""A LoRA added to the weights of a base on disk, one weight at a time.

    W' = round(W + (alpha / rank) B A)

The sum is made in fp32 and rounded once, to the type that is written. No model is built, and one file of the base is
in memory at a time.

Shape legend: N outputs, K inputs, r rank of one module.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from clora.errors import InputError
from clora.io.atomic import write_text
from clora.io.safetensors import map_tensors, read_header, write_tensors
from clora.io.text import parse_json, read_text
from clora.lora.module import LoraModule


@dataclass(frozen=True)
class Merge:
    """What was merged: `modules` of them, `num_bytes` written; `rounding` is the largest |W' - sum| / |sum - W| of a
    weight (Frobenius): the part of its update that rounding took away or added."""

    modules: int
    num_bytes: int
    rounding: float


def merge_weights(
    source: Path,
    target: Path,
    modules: Mapping[str, LoraModule],
    dtype: torch.dtype,
    on_file: Callable[[str], None] = lambda name: None,
) -> Merge:
    """Write the transformer in the folder `source` to `target`, with `modules` added, every float in `dtype`.

    File names stay, and an index beside them is written anew. `on_file` is told each file's name before it is read.
    Raises `InputError` for a folder without safetensors weights, and for modules that it has no weight for.
    """
    headers = {path: read_header(path) for path in sorted(source.glob("*.safetensors"))}
    keys = {key for header in headers.values() for key in header.tensors}
    if missing := sorted(name for name in modules if f"{name}.weight" not in keys):
        raise InputError(f"{source}: has no weight for {missing[0]} of the LoRA; give the base it was made for")
    if not headers:
        raise InputError(f"{source}: no safetensors weights in it; give a base in diffusers format")
    target.mkdir(parents=True, exist_ok=True)
    rounding, total = 0.0, 0
    for path, header in headers.items():
        on_file(path.name)
        merged: dict[str, Tensor] = {}
        for key, value in map_tensors(path, header).items():
            module = modules.get(key.removesuffix(".weight")) if key.endswith(".weight") else None
            merged[key], error = merge_weight_once(value, module, dtype)
            rounding, total = max(rounding, error), total + merged[key].numel() * merged[key].element_size()
        write_tensors(target / path.name, merged, {"format": "pt"})
    for index in source.glob("*.safetensors.index.json"):
        values = parse_json(read_text(index))
        write_text(target / index.name, json.dumps(values | {"metadata": {"total_size": total}}, indent=2))
    return Merge(len(modules), total, rounding)


@torch.no_grad()
def merge_weight_once(weight: Tensor, module: LoraModule | None, dtype: torch.dtype) -> tuple[Tensor, float]:
    """W' in `dtype`, and |W' - sum| / |sum - W|; without a module the weight itself, floats in `dtype`, and 0."""
    if module is None:
        return weight.to(dtype) if weight.is_floating_point() else weight, 0.0
    if (module.B.shape[0], module.A.shape[1]) != tuple(weight.shape):
        raise InputError(f"a module for a weight {[module.B.shape[0], module.A.shape[1]]} meets {list(weight.shape)}")
    total = torch.addmm(weight.float(), module.B.float(), module.A.float(), alpha=module.scale)
    merged = total.to(dtype)
    update = (total - weight.float()).norm().item()
    return merged, (merged.float() - total).norm().item() / update if update else 0.0

"""merge: the sum in fp32, rounded once, one weight at a time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from clora.errors import InputError
from clora.lora.merge import merge_weight_once, merge_weights
from clora.lora.module import LoraModule


def module(N: int, K: int, seed: int = 0, alpha: float = 3.0) -> LoraModule:
    rng = torch.Generator().manual_seed(seed)
    return LoraModule(torch.randn(2, K, generator=rng), torch.randn(N, 2, generator=rng), alpha)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_weight_once_rounds_once(stored: torch.dtype, dtype: torch.dtype) -> None:
    weight, update = torch.randn(6, 8, generator=torch.Generator().manual_seed(1)).to(stored), module(6, 8)
    exact = weight.double() + update.delta()
    merged, error = merge_weight_once(weight, update, dtype)
    assert merged.dtype == dtype
    unit = torch.finfo(dtype).eps
    assert ((merged.double() - exact).abs() <= exact.abs() * unit / 2 + 1e-6).all()
    assert error == 0 if dtype == torch.float32 else 1e-4 < error < 1e-2


def test_merge_weights_adds_modules_and_keeps_the_rest(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    parts = {
        "a.safetensors": {"x.weight": torch.randn(6, 8), "x.bias": torch.randn(6)},
        "b.safetensors": {"n": torch.arange(3)},
    }
    for name, tensors in parts.items():
        save_file(tensors, source / name)
    index = {"metadata": {"total_size": 1}, "weight_map": {"x.weight": "a.safetensors"}}
    (source / "m.safetensors.index.json").write_text(json.dumps(index))
    seen: list[str] = []
    merge = merge_weights(source, target, {"x": module(6, 8)}, torch.float32, seen.append)
    found = load_file(target / "a.safetensors") | load_file(target / "b.safetensors")
    exact = parts["a.safetensors"]["x.weight"].double() + module(6, 8).delta()
    assert (found["x.weight"] - exact).abs().max() < 1e-6
    assert torch.equal(found["x.bias"], parts["a.safetensors"]["x.bias"]) and torch.equal(found["n"], torch.arange(3))
    assert (merge.modules, merge.rounding, merge.num_bytes) == (1, 0.0, 6 * 8 * 4 + 6 * 4 + 3 * 8)
    assert json.loads((target / "m.safetensors.index.json").read_text())["metadata"]["total_size"] == merge.num_bytes
    assert seen == ["a.safetensors", "b.safetensors"]


def test_merge_weights_names_a_module_without_a_weight(tmp_path: Path) -> None:
    save_file({"x.weight": torch.zeros(6, 8)}, tmp_path / "a.safetensors")
    with pytest.raises(InputError, match=r"has no weight for y of the LoRA"):
        merge_weights(tmp_path, tmp_path / "out", {"x": module(6, 8), "y": module(6, 8)}, torch.float32)
    with pytest.raises(InputError, match=r"\[5, 8\] meets \[6, 8\]"):
        merge_weights(tmp_path, tmp_path / "out", {"x": module(5, 8)}, torch.float32)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no safetensors weights"):
        merge_weights(tmp_path / "empty", tmp_path / "out", {}, torch.float32)

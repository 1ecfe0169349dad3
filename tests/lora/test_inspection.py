"""What `clora inspect` tells of a file: its modules, and every fault."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from clora.lora.files import write_lora
from clora.lora.inspection import inspect_lora
from tests.support.lora_files import MLP, TO_Q, module, pair, save


def test_inspect_lora_tells_what_is_there(tmp_path: Path) -> None:
    modules = {
        TO_Q: module(0, 2),
        MLP: module(1, 4, alpha=8.0),
        "transformer_blocks.1.attn.to_q": module(2, 2),
    }
    path = tmp_path / "a.safetensors"
    sha256 = write_lora(path, modules, {"clora.catalogue": '{"effects": []}'}, "kohya", torch.float16)
    found = inspect_lora(path)
    json.dumps(found)
    assert found["layout"] == "kohya" and found["faults"] == [] and found["sha256"] == sha256
    assert (found["num_tensors"], found["num_modules"], found["num_blocks"]) == (9, 3, 3)
    assert found["num_parameters"] == sum(m.A.numel() + m.B.numel() for m in modules.values())
    assert found["ranks"] == {"2": 2, "4": 1} and found["alphas"] == {"3": 2, "8": 1}
    assert found["targets"] == {"attn.to_q": 2, "img_mlp.net.0.proj": 1}
    assert found["dtypes"] == ["float16", "float32"] and found["catalogue"] == {"effects": []}


def test_inspect_lora_lists_faults(tmp_path: Path) -> None:
    tensors = pair(TO_Q) | {"other": torch.zeros(1)}
    tensors[f"{TO_Q}.lora_A.weight"][0, 0] = float("nan")
    found = inspect_lora(save(tmp_path / "a.safetensors", tensors, {"clora.catalogue": "{"}))
    assert len(found["faults"]) == 3 and found["catalogue"] is None and found["num_modules"] == 1

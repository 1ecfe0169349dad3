"""PEFT's folder: the stock libraries load it and compute what clora computes, and it reads back to the bit."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, inject_adapter_in_model, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn

from bench.training.cycle_models import as_backbone
from clora.backbones.cond import make_cond
from clora.backbones.load import load_backbone
from clora.config import collection_lora
from clora.errors import InputError, InputErrors, WriteError
from clora.inference.edit_prompts import find_catalogue
from clora.lora.catalogue import describe_file, read_catalogue
from clora.lora.convert import convert_lora
from clora.lora.files import map_lora, read_lora, write_lora
from clora.lora.module import LoraModule
from clora.lora.peft_folder import CONFIG, WEIGHTS, adapter_config
from tests.support.lora_files import TO_Q, module, pair, save
from tests.support.random_base import random_transformer

TARGETS = ("to_q", "to_add_out", "img_mlp.net.2", "txt_mod.1", "img_in", "proj_out", "norm_out.linear")
Lora = dict[str, LoraModule]


def stock_transformer() -> Any:
    """The tiny base's, fp32, from its files each time."""
    return load_backbone("tiny", dtype=torch.float32, components=("transformer",)).transformer


def random_modules(transformer: nn.Module, seed: int = 0) -> Lora:
    """Ranks 1 to 4 and alphas 0.5 to 2.5 (no scale a power of two but by chance), linears in and outside the blocks."""
    rng = torch.Generator().manual_seed(seed)
    modules = {}
    linears = {n: m for n, m in transformer.named_modules() if isinstance(m, nn.Linear) and n.endswith(TARGETS)}
    for i, (name, linear) in enumerate(linears.items()):
        rank = 1 + i % 4
        A = torch.randn(rank, linear.in_features, generator=rng) * linear.in_features**-0.5
        modules[name] = LoraModule(A, 0.5 * torch.randn(linear.out_features, rank, generator=rng), 0.5 + i % 3)
    return modules


def inputs() -> tuple[Tensor, Tensor, Any]:
    rng = torch.Generator().manual_seed(2)
    prompts = [torch.randn(length, 96, generator=rng) for length in (5, 9)]
    cond = make_cond(prompts, [(torch.randn(2, 4, 64, generator=rng), (2, 2))], (3, 4))
    return torch.randn(2, 12, 64, generator=rng), torch.rand(2, generator=rng), cond


@torch.no_grad()
def velocity(transformer: Any) -> Tensor:
    return as_backbone(transformer).velocity(*inputs(), None)


@torch.no_grad()
def clora_velocity(folder: Path) -> Tensor:
    """By clora's adapters, from what it reads of the folder."""
    backbone = as_backbone(stock_transformer())
    modules = read_lora(folder).modules
    adapters = backbone.add_adapters(list(modules))
    adapters.add_lora("a", modules)
    return backbone.velocity(*inputs(), ["a", "a"])


def by_peft_model(transformer: Any, folder: Path) -> None:
    PeftModel.from_pretrained(transformer, folder)


def by_state_dict(transformer: Any, folder: Path) -> None:
    inject_adapter_in_model(LoraConfig.from_pretrained(folder), transformer)
    outcome = set_peft_model_state_dict(transformer, load_file(folder / WEIGHTS))
    assert not outcome.unexpected_keys and not [key for key in outcome.missing_keys if "lora_" in key]


def by_diffusers(transformer: Any, folder: Path) -> None:
    transformer.load_lora_adapter(folder, prefix="base_model.model", weight_name=WEIGHTS)


LOADERS: list[Callable[[Any, Path], None]] = [by_peft_model, by_state_dict, by_diffusers]


def difference(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


@pytest.mark.parametrize("load", LOADERS)
def test_write_lora_of_peft_gives_the_stock_libraries_the_outputs_of_clora(tmp_path: Path, load: Any) -> None:
    transformer = stock_transformer()
    folder, modules = tmp_path / "adapter", random_modules(transformer)
    write_lora(folder, modules, layout="peft", dtype=torch.float32)
    want, bare = clora_velocity(folder), velocity(transformer)
    load(transformer, folder)
    got = velocity(transformer)
    assert difference(got, want) < 2e-6 and difference(bare, want) > 0.1
    layers = {name: m for name, m in transformer.named_modules() if hasattr(m, "lora_A")}
    assert {name.removeprefix("base_model.model.") for name in layers} == modules.keys()
    for name, layer in layers.items():
        (adapter,) = layer.active_adapters
        assert (layer.r[adapter], layer.scaling[adapter]) == (modules[name].rank, modules[name].scale)


@pytest.mark.parametrize(
    "change",
    [
        lambda config: config | {"lora_alpha": config["lora_alpha"] * 1.1},
        lambda config: config | {"alpha_pattern": {}},
        lambda config: config | {"use_rslora": True},
        lambda config: config | {"target_modules": config["target_modules"][1:]},
    ],
    ids=["another alpha", "no pattern", "rslora", "a module less"],
)
@pytest.mark.filterwarnings("ignore")
def test_write_lora_of_peft_is_seen_to_be_wrong_where_its_configuration_is(tmp_path: Path, change: Any) -> None:
    """The comparison above can fail."""
    transformer = stock_transformer()
    folder = tmp_path / "adapter"
    write_lora(folder, random_modules(transformer), layout="peft", dtype=torch.float32)
    want = clora_velocity(folder)
    place = folder / CONFIG
    place.write_text(json.dumps(change(json.loads(place.read_text()))))
    PeftModel.from_pretrained(transformer, folder)
    assert difference(velocity(transformer), want) > 1e-3


def test_adapter_config_names_each_module_of_many_blocks_alone(tmp_path: Path) -> None:
    """Blocks 1, 10 and 11, whose names begin alike, with ranks and alphas of their own, in PEFT's own layers."""
    transformer = random_transformer(num_layers=12)
    modules = random_modules(transformer)
    write_lora(tmp_path / "adapter", modules, layout="peft", dtype=torch.float32)
    by_peft_model(transformer, tmp_path / "adapter")
    for name, one in modules.items():
        layer = transformer.get_submodule(name)
        assert torch.equal(layer.lora_A["default"].weight, one.A) and torch.equal(layer.lora_B["default"].weight, one.B)
        assert layer.scaling["default"] == one.scale


def test_adapter_config_has_patterns_for_the_rare_alone() -> None:
    names = [f"transformer_blocks.{block}.attn.to_q" for block in range(4)]
    ranks, alphas = (2, 3, 2, 2), (4.0, 4.0, 0.5, 4.0)
    config = adapter_config({n: module(0, r, a) for n, r, a in zip(names, ranks, alphas, strict=True)})
    assert (config["r"], config["rank_pattern"]) == (2, {names[1]: 3})
    assert (config["lora_alpha"], config["alpha_pattern"]) == (4, {names[2]: 0.5})
    assert config["target_modules"] == names
    assert LoraConfig(**config).r == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_convert_lora_to_peft_and_back_is_equal_to_the_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    """Alpha / rank is no power of two, so that folding it anywhere would show."""
    modules = {TO_Q: module(0, 3, 5.0, dtype), "transformer_blocks.1.attn.to_k": module(1, 7, 0.1, dtype)}
    src = tmp_path / "a.safetensors"
    write_lora(src, modules, {"author": "me", "ss_network_alpha": "9"}, "kohya", None)
    read = read_lora(src)
    done = convert_lora(src, tmp_path / "deep" / "adapter", "peft")
    assert (done.layout, done.ranks) == ("kohya", {name: one.rank for name, one in modules.items()})
    convert_lora(tmp_path / "deep" / "adapter", tmp_path / "b.safetensors", "kohya")
    for found in (read_lora(tmp_path / "deep" / "adapter"), read_lora(tmp_path / "b.safetensors")):
        assert found.metadata["author"] == "me" and found.modules.keys() == modules.keys()
        for name, one in found.modules.items():
            want = read.modules[name]
            assert one.A.dtype == dtype and torch.equal(one.A, want.A) and torch.equal(one.B, want.B)
            assert one.alpha == want.alpha
    assert read_lora(tmp_path / "deep" / "adapter").layout == "peft"
    mapped = map_lora(tmp_path / "deep" / "adapter" / WEIGHTS)
    assert mapped[TO_Q].alpha == 5.0


def test_convert_lora_to_peft_twice_gives_equal_bytes(tmp_path: Path) -> None:
    src = save(tmp_path / "a.safetensors", pair(TO_Q) | {f"{TO_Q}.alpha": torch.tensor(3.0)})
    for name in ("first", "second"):
        convert_lora(src, tmp_path / name, "peft")
    assert sorted(path.name for path in (tmp_path / "first").iterdir()) == sorted([WEIGHTS, CONFIG])
    for name in (WEIGHTS, CONFIG):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def test_convert_lora_of_a_collection_to_peft_keeps_its_catalogue(tmp_path: Path) -> None:
    source, folder = collection_lora("tiny"), tmp_path / "adapter"
    assert source is not None
    convert_lora(source, folder, "peft")
    assert read_catalogue(folder) == find_catalogue(folder) == read_catalogue(source)
    assert describe_file(folder)["lora"]["layout"] == "peft"
    before, after = read_lora(source).modules, read_lora(folder).modules
    assert all(torch.equal(after[name].B, one.B) and after[name].alpha == one.alpha for name, one in before.items())


@pytest.mark.parametrize("name", ["there", "link"])
def test_convert_lora_to_peft_overwrites_nothing(tmp_path: Path, name: str) -> None:
    src = save(tmp_path / "a.safetensors", pair(TO_Q))
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(InputError, match="is there already, and no folder is overwritten; name a new one"):
        convert_lora(src, tmp_path / name, "peft")
    with pytest.raises(InputError, match=r"a folder with two files; name it without \.safetensors"):
        convert_lora(src, tmp_path / "b.safetensors", "peft")
    assert list((tmp_path / "there").iterdir()) == []


@pytest.mark.parametrize("broken", ["fsync", "rename"])
def test_convert_lora_to_peft_leaves_nothing_half_written(tmp_path: Path, broken: str, monkeypatch: Any) -> None:
    """A disk that is full at the second file, or at the last step."""
    src, calls = save(tmp_path / "a.safetensors", pair(TO_Q)), []
    true = getattr(os, broken)

    def fail(*args: Any) -> None:
        calls.append(args)
        if len(calls) > 2 or broken == "rename":
            raise OSError(28, "No space left on device")
        true(*args)

    monkeypatch.setattr(os, broken, fail)
    with pytest.raises(WriteError, match=r"adapter could not be written, the disk is full; make room"):
        convert_lora(src, tmp_path / "adapter", "peft")
    assert calls and [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_convert_lora_to_peft_refuses_what_a_plain_lora_cannot_hold(tmp_path: Path) -> None:
    dora = pair(TO_Q) | {f"{TO_Q}.dora_scale": torch.ones(6, 1)}
    large = {f"{TO_Q}.lokr_w1": torch.randn(17, 17), f"{TO_Q}.lokr_w2": torch.randn(18, 18)}
    for number, tensors in enumerate((dora, large)):
        src = save(tmp_path / f"{number}.safetensors", tensors)
        with pytest.raises(InputErrors) as caught:
            convert_lora(src, tmp_path / "adapter", "peft")
        (fault,) = caught.value.faults
        assert f"clora convert {src} OUT --to peft --rank 64" in fault and not (tmp_path / "adapter").exists()


def test_convert_lora_of_other_kinds_to_peft_is_exact(tmp_path: Path) -> None:
    w1, w2 = torch.randn(2, 2), torch.randn(3, 3)
    src = save(tmp_path / "a.safetensors", {f"{TO_Q}.lokr_w1": w1, f"{TO_Q}.lokr_w2": w2})
    convert_lora(src, tmp_path / "adapter", "peft")
    found = read_lora(tmp_path / "adapter").modules[TO_Q]
    torch.testing.assert_close(found.delta(), torch.kron(w1.double(), w2.double()), rtol=0, atol=1e-6)


def test_read_lora_of_a_peft_folder_whose_two_alphas_differ_is_refused(tmp_path: Path) -> None:
    """PEFT would read one and diffusers the other."""
    write_lora(tmp_path / "adapter", {TO_Q: module(0, 2, 3.0)}, layout="peft")
    place = tmp_path / "adapter" / CONFIG
    place.write_text(json.dumps(json.loads(place.read_text()) | {"lora_alpha": 4}))
    with pytest.raises(InputErrors, match=r"says alpha 3, adapter_config\.json beside it 4"):
        read_lora(tmp_path / "adapter")

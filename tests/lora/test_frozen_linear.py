"""int8 weights: torchao's integers against fp64, gradients that keep no floats, and whole models on them."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.training.cycle_models import as_backbone
from clora.backbones.base import Kernels
from clora.backbones.load import load_backbone
from clora.errors import InputError
from clora.jobs.teach import teach
from clora.jobs.train import make_caches, train
from clora.lora import frozen_linear as quantize
from clora.lora.frozen_linear import (
    QuantizedLinear,
    float_weight,
    frozen_linear,
    is_quantized,
    quantize_linears,
    weight_bytes,
)
from clora.lora.slots import Slot
from clora.training.tracker import read_log
from tests.backbones.qwen_image.test_block import add_random_stacks, batch, relative_error, with_gradients
from tests.support.random_base import random_transformer
from tests.support.small_job import make_config, write_dataset

pytest.importorskip("torchao")


def quantized(dtype: torch.dtype = torch.float32, K: int = 48, N: int = 80) -> tuple[nn.Linear, nn.Linear]:
    """A linear, and the same with an int8 weight."""
    torch.manual_seed(0)
    plain = nn.Linear(K, N).to(dtype).requires_grad_(False)
    holder = nn.ModuleDict({"linear": copy.deepcopy(plain)})
    quantize_linears(holder, "cpu")
    linear = holder["linear"]
    assert isinstance(linear, QuantizedLinear) and is_quantized(linear.weight) and not is_quantized(plain.weight)
    return plain, linear


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantize_linears_rounds_to_the_nearest_of_255_steps(dtype: torch.dtype) -> None:
    plain, linear = quantized(dtype)
    step = plain.weight.double().abs().amax(1, keepdim=True) / 127
    error = float_weight(linear.weight).double() - plain.weight.double()
    assert (error.abs() <= step * (0.5 + 1e-5)).all() and error.abs().max() > 0.4 * step.min()
    assert torch.equal(linear.bias, plain.bias) and linear.weight.dtype == dtype
    assert torch.equal(float_weight(plain.weight), plain.weight.float())
    # An integer a weight; a scale of four bytes and a zero of one for each output; the bias.
    assert weight_bytes(linear) == 80 * 48 + 80 * 5 + plain.bias.nbytes


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("rows", [1, 4, 5, 21])  # few have a product of their own in bfloat16 on a CPU
@pytest.mark.parametrize("at_once", [1, 48 * 32, 48 * 80])  # of the weight, in floats
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_frozen_linear_and_its_gradient_are_those_of_the_rounded_weight(
    dtype: torch.dtype, at_once: int, rows: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantize, "_FLOATS_AT_ONCE", {"cpu": at_once, "cuda": at_once})
    linear = quantized(dtype)[1].to(device)
    x = torch.randn(1, rows, 48).to(device, dtype).requires_grad_()
    grad = torch.randn(1, rows, 80).to(device, dtype)
    y = frozen_linear(x, linear.weight, linear.bias)
    y.backward(grad)
    weight = float_weight(linear.weight).double()
    wanted = F.linear(x.detach().double(), weight, linear.bias.double())
    assert y.dtype == dtype and x.grad is not None and x.grad.dtype == dtype
    tolerance = 1e-6 if dtype == torch.float32 else 5e-3
    assert relative_error(y.detach(), wanted) < tolerance
    assert relative_error(x.grad, grad.double() @ weight) < tolerance


def test_frozen_linear_keeps_no_copy_of_the_weight_for_the_backward_pass() -> None:
    _, linear = quantized(torch.bfloat16)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    x = torch.randn(7, 48).bfloat16().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        F.linear(x, linear.weight, linear.bias)
        assert max(tensor.numel() for tensor in kept) == 80 * 48  # what torchao's own gradient keeps
        kept.clear()
        linear(x)
    assert kept == []


@pytest.mark.parametrize("kernels", ["reference", "fused"])
@pytest.mark.parametrize("slots", [[None], ["a0"], ["a1", "b0", None], [("a0", "b0")]], ids=str)
def test_blocks_on_int8_equal_blocks_on_the_rounded_weights(kernels: Kernels, slots: list[Slot]) -> None:
    """Velocities and all gradients of adapters and inputs, with both kinds of blocks."""
    results = []
    for rounded in (True, False):
        transformer = random_transformer().requires_grad_(False)
        quantize_linears(transformer.transformer_blocks, "cpu")
        if rounded:
            for module in transformer.transformer_blocks.modules():
                if isinstance(module, nn.Linear):
                    module.weight = nn.Parameter(float_weight(module.weight), requires_grad=False)
        backbone = as_backbone(transformer)
        adapters = backbone.add_adapters()
        backbone.use_kernels(kernels)
        parameters = add_random_stacks(adapters)
        results.append(with_gradients(backbone, batch([5, 5, 5], 32), slots, parameters))
    for want, got in zip(*results, strict=True):
        assert torch.equal(got, want) if not want.any() else relative_error(got, want) < 1e-5


def test_merged_adapters_dequantize_and_leave_the_integers() -> None:
    transformer = random_transformer().requires_grad_(False)
    quantize_linears(transformer.transformer_blocks, "cpu")
    backbone = as_backbone(transformer)
    adapters = backbone.add_adapters()
    add_random_stacks(adapters)
    x, sigma, cond = batch([5], 32)
    before = {name: linear.weight for name, linear in adapters.linears.items()}
    with torch.no_grad():
        base = backbone.velocity(x, sigma, cond, [None])
        wanted = backbone.velocity(x, sigma, cond, [("a0", "b0")])
        with adapters.merged(("a0", "b0")):
            assert not any(is_quantized(linear.merged) for linear in adapters.linears.values())
            assert relative_error(backbone.velocity(x, sigma, cond), wanted) < 1e-5
        assert relative_error(wanted, base) > 1e-2
        assert torch.equal(backbone.velocity(x, sigma, cond, [None]), base)
    assert all(linear.weight is before[name] for name, linear in adapters.linears.items())


def test_load_backbone_quantizes_the_blocks_alone(random_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, small = (
        load_backbone(random_base, dtype=torch.float32, components=("transformer",), quantize=quantize).transformer
        for quantize in ("none", "int8")
    )
    linears = {name: module for name, module in small.named_modules() if isinstance(module, nn.Linear)}
    assert {name for name, linear in linears.items() if is_quantized(linear.weight)} == {
        name for name in linears if name.startswith("transformer_blocks.")
    }
    saved = sum(3 * linear.weight.numel() - 5 * len(linear.bias) for n, linear in linears.items() if "blocks" in n)
    assert weight_bytes(plain) - weight_bytes(small) == saved
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"base.quantize: int8 needs torchao.*pip install 'clora\[quantize\]'"):
        load_backbone(random_base, components=(), quantize="int8")


def test_train_on_an_int8_base_follows_training_on_the_plain_one(random_base: Path, tmp_path: Path) -> None:
    """Every loss within a hundredth over six steps of both streams; targets of one base are not the other's."""
    dataset, out = write_dataset(tmp_path / "data"), tmp_path / "run"
    same = ("schedule.step_counts=[4,2]", "train.coarse_target=images")
    both = [(f"base.quantize={quantize}", *same) for quantize in ("none", "int8")]
    configs = [make_config(random_base, dataset, out, *overrides) for overrides in both]
    teach(configs[0])
    cached = []
    for config in configs:
        make_caches(config)
        cached.append(len(list((out / "cache").rglob("*.safetensors"))))
    assert cached[1] - cached[0] == 2 * 3  # two effects' targets
    logs = []
    for config in configs:
        train(config.model_copy(update={"targets": config.targets.model_copy(update={"source": "pairs"})}))
        logs.append(read_log(out / "train"))
    for plain, small in zip(*logs, strict=True):
        assert plain.keys() == small.keys()
        losses = [name for name in plain if name.endswith("_loss")]
        assert losses and all(small[name] == pytest.approx(plain[name], rel=0.01) for name in losses)
        assert any(small[name] != plain[name] for name in losses)

"""fp8 and int8: what is simulated in torch is what the graph does, and layers that cost most stay in bf16."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from clora.backbones.load import load_backbone, served_network
from clora.export.graph import example_inputs
from clora.export.manifest import Limits, read_manifest
from clora.export.onnx_graph import GRAPH, WEIGHTS
from clora.export.quantize import (
    NUMBERS,
    Choice,
    EightBits,
    Scale,
    block_linears,
    choose,
    choose_kept,
    rounded,
    scales_of,
    simulated,
    watched,
)
from clora.export.quantize_graph import module_of, quantize_graph
from clora.export.tensorrt_engine import EngineOptions
from clora.jobs.export import ExportRequest, export
from clora.method.flow import few_step_sigmas


@pytest.fixture
def network(random_base: Path) -> nn.Module:
    backbone = load_backbone(random_base, "cpu", torch.bfloat16, ("transformer",))
    return served_network(backbone, few_step_sigmas(4, 3.0))


@pytest.fixture
def inputs() -> tuple[Tensor, ...]:
    return example_inputs(64, 32, 16, torch.bfloat16)


def test_rounded_is_the_nearest_of_e4m3_and_clips() -> None:
    """Against the list of all its values, made from their bits."""
    values = np.array([(-1) ** (b >> 7) * _e4m3(b & 0x7F) for b in range(256) if b & 0x7F != 0x7F])
    assert values.max() == NUMBERS["fp8"].most and len(values) == 254
    x = torch.linspace(-600, 600, 1001, dtype=torch.float64).float()
    scale = 0.25
    nearest = values[np.abs(x.numpy()[:, None] / scale - values).argmin(axis=1)] * scale
    made = rounded(x, scale, NUMBERS["fp8"]).numpy()
    between = np.abs(np.abs(made - x.numpy()) - np.abs(nearest - x.numpy()))
    assert between.max() == 0  # ties may go to either side


def _e4m3(bits: int) -> float:
    exponent, mantissa = bits >> 3, bits & 7
    return mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)


def test_rounded_int8_has_a_step_for_every_output_of_a_weight() -> None:
    weight = torch.tensor([[1.0, -0.5, 0.004], [100.0, 49.9, -127.0]])
    linear = nn.Linear(3, 2, bias=False)
    linear.weight.data = weight
    network = nn.ModuleDict({"blocks": nn.ModuleDict({"only": linear})})
    scale = scales_of(network, {"blocks.only": 254.0}, NUMBERS["int8"])["blocks.only"]
    assert scale.activation == 2.0 and torch.equal(scale.weight, torch.tensor([[1 / 127], [1.0]]))
    wanted = torch.tensor([[127.0, -64.0, 1.0], [100.0, 50.0, -127.0]]) * scale.weight
    torch.testing.assert_close(rounded(weight, scale.weight, NUMBERS["int8"]), wanted, rtol=1e-7, atol=0)
    x = torch.tensor([0.9, 1.1, -3.2, 253.9, 300.0, -1000.0])
    assert rounded(x, 2.0, NUMBERS["int8"]).tolist() == [0, 2, -4, 254, 254, -254]


@torch.no_grad()
@pytest.mark.parametrize("precision", ["fp8", "int8"])
def test_quantize_graph_computes_what_is_simulated(precision: EightBits, tmp_path: Path) -> None:
    """The rewritten graph, run by ONNX's own reference, against the network in torch."""
    onnx = pytest.importorskip("onnx")
    from onnx.reference import ReferenceEvaluator

    torch.manual_seed(0)
    linear = nn.Linear(16, 6, bias=False).bfloat16()
    numbers = NUMBERS[precision]
    largest = numbers.most * 2.0 ** torch.arange(-9, -3)  # scales are powers of two: no tie is left to chance
    linear.weight.data *= largest[:, None] / 4
    linear.weight.data[:, 0] = largest
    network = nn.ModuleDict({"blocks": nn.ModuleDict({"only": linear})})
    weight = onnx.helper.make_tensor("w", onnx.TensorProto.BFLOAT16, [16, 6], _raw(linear.weight.t()), raw=True)
    node = onnx.helper.make_node("MatMul", ["x", "w"], ["y"])
    node.metadata_props.add(key="pkg.torch.onnx.name_scopes", value="['', 'blocks.only', 'linear']")
    sides = [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.BFLOAT16, [5, m]) for n, m in (("x", 16), ("y", 6))]
    graph = onnx.helper.make_graph([node], "g", sides[:1], sides[1:], [weight])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 23)])
    onnx.save(model, str(tmp_path / GRAPH), save_as_external_data=True, location=WEIGHTS, size_threshold=0)

    x = torch.randn(5, 16).bfloat16()
    scales = scales_of(network, {"blocks.only": numbers.most / 64}, numbers)
    assert quantize_graph(tmp_path, Choice(numbers, scales, (), {}, 0.0, 0.0, 0.0)) == 1
    given = onnx.numpy_helper.to_array(
        onnx.helper.make_tensor("x", onnx.TensorProto.BFLOAT16, [5, 16], _raw(x), raw=True)
    )
    found = ReferenceEvaluator(str(tmp_path / GRAPH)).run(None, {"x": given})[0].astype(np.float64)
    with simulated(network, scales, numbers):
        wanted = linear(x).double().numpy()
    plain = linear(x).double().numpy()
    assert (np.abs(found - wanted).max(axis=0) <= 0.01 * np.abs(wanted).max(axis=0)).all()
    assert np.abs(found - wanted).max() < 0.2 * np.abs(plain - wanted).max()


def _raw(x: Tensor) -> bytes:
    return x.contiguous().view(torch.int16).numpy().tobytes()


@torch.no_grad()
def test_watched_sees_the_largest_input_of_every_block_linear(network: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    linear = block_linears(network)["blocks.0.img_mlp.net.2"]
    seen: list[float] = []
    handle = linear.register_forward_pre_hook(lambda _, args: seen.append(args[0].abs().max().item()))
    with watched(network) as most:
        network(*inputs)
        network(inputs[0] * 3, *inputs[1:])
    handle.remove()
    assert set(most) == set(block_linears(network)) and most["blocks.0.img_mlp.net.2"] == max(seen)
    assert not any(m._forward_pre_hooks for m in block_linears(network).values())
    scales = scales_of(network, most, NUMBERS["fp8"])
    assert scales["blocks.0.img_mlp.net.2"].activation == max(seen) / 448
    assert (
        scales["blocks.1.attn.to_q"].weight
        == block_linears(network)["blocks.1.attn.to_q"].weight.abs().max().float() / 448
    )


@torch.no_grad()
def test_simulated_rounds_one_linear_and_puts_it_back(network: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    wanted = network(*inputs)
    linear = block_linears(network)["blocks.0.attn.to_q"]
    x = torch.randn(5, 48, generator=torch.Generator().manual_seed(0)).bfloat16()
    fp8 = NUMBERS["fp8"]
    plain, weight = linear(x), rounded(linear.weight, 0.002, fp8)
    with simulated(network, {"blocks.0.attn.to_q": Scale(0.01, torch.tensor([[0.002]]))}, fp8):
        by_hand = nn.functional.linear(rounded(x, 0.01, fp8), weight, linear.bias)
        assert torch.equal(linear(x), by_hand) and not torch.equal(linear(x), plain)
        assert torch.equal(linear.weight, weight)
        assert not torch.equal(network(*inputs), wanted)
    assert torch.equal(network(*inputs), wanted) and torch.equal(linear(x), plain)


@pytest.mark.parametrize("precision", ["fp8", "int8"])
def test_choose_keeps_what_costs_most(network: nn.Module, inputs: tuple[Tensor, ...], precision: EightBits) -> None:
    with torch.no_grad(), watched(network) as most:
        network(*inputs)
    spoilt = "blocks.0.img_mlp.net.0.proj"
    found = choose(
        network, most | {spoilt: most[spoilt] * 1e5}, [inputs], NUMBERS[precision]
    )  # its inputs all become zero
    assert spoilt in found.kept and len(found.kept) == round(0.1 * len(found.costs))
    assert found.costs[spoilt] == max(found.costs.values()) and spoilt not in found.rounded
    assert 0 < found.cost < found.cost_of_all and 0 < found.worst < 0.2
    assert choose_kept({"a": 1.0, "b": 3.0, "c": 2.0}, 0.67) == ("b", "c")


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "target"), [("fp8", "SM89"), ("int8", "SM80")])
def test_export_in_eight_bits_builds_what_was_calibrated(
    one_block: tuple[Path, Path], tmp_path: Path, precision: EightBits, target: str
) -> None:
    pytest.importorskip("tensorrt_rtx")
    pytest.importorskip("onnxruntime")
    onnx = pytest.importorskip("onnx")
    base, lora = one_block
    kept: list[bytes] = []
    limits = Limits(batch=2, tokens=64, text_buckets=(32, 64))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("clora.export.build.engine_limits", lambda _: limits)
        patch.setattr("clora.jobs.export._prove_twin", lambda *_: None)  # test_tensorrt has it
        patch.setattr("clora.jobs.export.MOST_IMAGES", 2)
        original = quantize_graph

        def keep(folder: Path, choice: Choice) -> int:
            before = (folder / WEIGHTS).stat().st_size
            done = original(folder, choice)
            assert (folder / WEIGHTS).stat().st_size < before
            kept.append((folder / GRAPH).read_bytes())
            return done

        patch.setattr("clora.export.build.quantize_graph", keep)
        request = ExportRequest(
            tmp_path / "a", "tensorrt", str(base), lora, precision, 1, engine=EngineOptions(target), seed=2
        )
        export(request)
    manifest = read_manifest(tmp_path / "a")
    assert manifest.engine is not None and manifest.engine.attention == "fused"
    own = manifest.quantization
    assert own is not None and own.images == 2 and 0 < own.cost <= own.cost_of_all * 1.05 and len(own.kept) == 1
    graph = onnx.load_from_string(kept[0]).graph
    stored = onnx.TensorProto.FLOAT8E4M3FN if precision == "fp8" else onnx.TensorProto.INT8
    assert sum(tensor.data_type == stored and len(tensor.dims) == 2 for tensor in graph.initializer) == own.layers
    products = {module_of(node): node for node in graph.node if node.op_type == "MatMul"}
    made_by = {name: node.op_type for node in graph.node for name in node.output}
    for name, node in products.items():
        if name is not None and name.startswith("blocks.") and "attn.to_" in name:
            wanted = name not in own.kept
            assert [made_by.get(operand) == "DequantizeLinear" for operand in node.input] == [wanted, wanted]

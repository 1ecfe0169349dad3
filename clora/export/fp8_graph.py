"""FP8 in an ONNX graph: weights stored in e4m3, and inputs rounded before their products (explicit Q/DQ).

A TensorRT engine of such a graph multiplies in FP8 where both operands were dequantized from it.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from clora.export.fp8 import Scale, to_fp8
from clora.export.onnx_graph import GRAPH, WEIGHTS

SCOPES = "pkg.torch.onnx.name_scopes"  # where torch writes which module a node is of


def quantize_graph(folder: Path, scales: Mapping[str, Scale]) -> int:
    """Rewrite a bf16 graph so that the products of the named linears are in FP8; returns how many were.

    Raises ValueError where the graph has a product for none of them, or a scale that names no product at all.
    """
    import onnx

    model = onnx.load(str(folder / GRAPH))
    graph, weights = model.graph, {tensor.name: tensor for tensor in model.graph.initializer}
    shared: dict[tuple[str, float], str] = {}
    nodes: list[Any] = []
    done = 0
    for node in graph.node:
        name = module_of(node)
        if node.op_type == "MatMul" and name is not None and name in scales and node.input[1] in weights:
            scale = scales[name]
            node.input[0] = _round_input(graph, nodes, shared, node.input[0], scale.activation)
            node.input[1] = _store_weight(graph, nodes, weights[node.input[1]], scale.weight)
            done += 1
        nodes.append(node)
    if done == 0:
        raise ValueError("no product of the graph is one of the linears that have scales")
    del graph.node[:]
    graph.node.extend(nodes)
    (folder / WEIGHTS).unlink()
    onnx.save(model, str(folder / GRAPH), save_as_external_data=True, location=WEIGHTS, size_threshold=1024)
    onnx.checker.check_model(str(folder / GRAPH))
    return done


def module_of(node: Any) -> str | None:
    """The name of the module that a node was traced in."""
    for entry in node.metadata_props:
        if entry.key == SCOPES:
            scopes = ast.literal_eval(entry.value)
            return str(scopes[-2]) if len(scopes) > 1 else None
    return None


def _round_input(graph: Any, nodes: list[Any], shared: dict[tuple[str, float], str], name: str, scale: float) -> str:
    """The name of a tensor rounded with a scale; linears with the same input share it."""
    if (name, scale) not in shared:
        stem = f"{name}_fp8_{len(shared)}"
        by, zero = _scalar(graph, f"{stem}_scale", scale), _zero(graph, f"{stem}_zero")
        nodes += _q_dq(name, stem, by, zero)
        shared[name, scale] = f"{stem}_back"
    return shared[name, scale]


def _q_dq(name: str, stem: str, by: str, zero: str) -> list[Any]:
    from onnx import helper

    return [
        helper.make_node("QuantizeLinear", [name, by, zero], [stem], name=f"{stem}_q"),
        helper.make_node("DequantizeLinear", [stem, by, zero], [f"{stem}_back"], name=f"{stem}_dq"),
    ]


def _store_weight(graph: Any, nodes: list[Any], tensor: Any, scale: float) -> str:
    """The name of a weight that is stored in e4m3 and dequantized; its tensor is changed in place."""
    from onnx import TensorProto, helper

    back = f"{tensor.name}_back"
    if tensor.data_type != TensorProto.FLOAT8E4M3FN:
        value = torch.frombuffer(bytearray(tensor.raw_data), dtype=torch.bfloat16)
        stored = to_fp8(value, scale).view(torch.uint8).numpy().tobytes()
        tensor.data_type, tensor.raw_data = TensorProto.FLOAT8E4M3FN, stored
        name, zero = _scalar(graph, f"{tensor.name}_scale", scale), _zero(graph, f"{tensor.name}_zero")
        nodes.append(helper.make_node("DequantizeLinear", [tensor.name, name, zero], [back], name=f"{tensor.name}_dq"))
    return back


def _scalar(graph: Any, name: str, value: float) -> str:
    from onnx import TensorProto, helper

    raw = torch.tensor(value, dtype=torch.bfloat16).view(torch.int16).numpy().tobytes()
    graph.initializer.append(helper.make_tensor(name, TensorProto.BFLOAT16, [], raw, raw=True))
    return name


def _zero(graph: Any, name: str) -> str:
    from onnx import TensorProto, helper

    graph.initializer.append(helper.make_tensor(name, TensorProto.FLOAT8E4M3FN, [], b"\0", raw=True))
    return name

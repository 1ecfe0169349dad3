"""Numbers of eight bits in an ONNX graph: weights stored in them, and inputs rounded before their products (explicit
Q/DQ).

A TensorRT engine of such a graph multiplies in eight bits where both operands were dequantized from them.
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clora.export.onnx_graph import GRAPH, WEIGHTS
from clora.export.quantize import Choice, Numbers, Scale, to_eight_bits

SCOPES = "pkg.torch.onnx.name_scopes"  # where torch writes which module a node is of
OUTPUTS = 1  # the axis of a product's weight (K, N) that its outputs lie along


def quantize_graph(folder: Path, choice: Choice) -> int:
    """Rewrite a bf16 graph so that the products of the chosen linears are in eight bits; returns how many were.

    Raises ValueError where the graph has a product for none of them.
    """
    import onnx

    model = onnx.load(str(folder / GRAPH))
    graph, weights = model.graph, {tensor.name: tensor for tensor in model.graph.initializer}
    rewriting = _Rewriting(graph, choice.numbers)
    done = 0
    for node in graph.node:
        scale = choice.rounded.get(module_of(node) or "")
        if node.op_type == "MatMul" and scale is not None and node.input[1] in weights:
            node.input[0] = rewriting.round_input(node.input[0], scale)
            node.input[1] = rewriting.store_weight(weights[node.input[1]], scale)
            done += 1
        rewriting.nodes.append(node)
    if done == 0:
        raise ValueError("no product of the graph is one of the linears that have scales")
    del graph.node[:]
    graph.node.extend(rewriting.nodes)
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


class _Rewriting:
    """A graph's new `nodes`, so far in its order; `shared`: inputs that were rounded with a scale."""

    def __init__(self, graph: Any, numbers: Numbers) -> None:
        from onnx import TensorProto

        self.graph, self.numbers = graph, numbers
        self.type = TensorProto.INT8 if numbers.dtype == torch.int8 else TensorProto.FLOAT8E4M3FN
        self.nodes: list[Any] = []
        self.shared: dict[tuple[str, float], str] = {}

    def round_input(self, name: str, scale: Scale) -> str:
        """The name of a tensor rounded with a linear's scale; linears with the same input share it."""
        from onnx import helper

        key = name, scale.activation
        if key not in self.shared:
            stem = f"{name}_rounded_{len(self.shared)}"
            by, zero = self._scales(stem, torch.tensor(scale.activation))
            quantize = helper.make_node("QuantizeLinear", [name, by, zero], [stem], name=f"{stem}_q")
            self.nodes += [quantize, self._back([stem, by, zero], stem)]
            self.shared[key] = f"{stem}_back"
        return self.shared[key]

    def store_weight(self, tensor: Any, scale: Scale) -> str:
        """The name of a weight (K, N) that is stored in eight bits and dequantized; its tensor is changed in place."""
        name = str(tensor.name)
        if tensor.data_type != self.type:
            weight_KN = torch.frombuffer(bytearray(tensor.raw_data), dtype=torch.bfloat16).view(*tensor.dims)
            stored = to_eight_bits(weight_KN, scale.weight.mT, self.numbers).contiguous()
            tensor.data_type, tensor.raw_data = self.type, stored.view(torch.uint8).numpy().tobytes()
            by, zero = self._scales(name, scale.weight.flatten() if self.numbers.per_output else scale.weight.squeeze())
            self.nodes.append(self._back([tensor.name, by, zero], name))
        return f"{name}_back"

    def _back(self, inputs: list[str], stem: str) -> Any:
        from onnx import helper

        return helper.make_node("DequantizeLinear", inputs, [f"{stem}_back"], name=f"{stem}_dq", axis=OUTPUTS)

    def _scales(self, stem: str, values: Tensor) -> tuple[str, str]:
        """The names of new constants: scales, one or a vector of them, and as many zero points, which are 0."""
        from onnx import TensorProto, helper

        by, zero = f"{stem}_scale", f"{stem}_zero"
        raw = values.to(torch.bfloat16).view(torch.int16).numpy().tobytes()
        zeros = helper.make_tensor(zero, self.type, values.shape, bytes(values.numel()), raw=True)
        self.graph.initializer.extend(
            [helper.make_tensor(by, TensorProto.BFLOAT16, values.shape, raw, raw=True), zeros]
        )
        return by, zero

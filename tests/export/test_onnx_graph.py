"""The places that an ONNX graph names for its weights: all of them are looked at, wherever in the graph they stand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from clora.errors import InputError
from clora.export.graph import Part
from clora.export.onnx_graph import check_weights_place

onnx = pytest.importorskip("onnx")
PART = Part("m", ("x",), "y", lambda limits: ())


def outside(location: str) -> Any:
    """A tensor `k` of four numbers, to be read from that file."""
    tensor = onnx.TensorProto(name="k", data_type=1, dims=[4], data_location=onnx.TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value=location)
    return tensor


def attribute(**given: Any) -> Any:
    """A node of one attribute."""
    node = onnx.NodeProto(op_type="Constant", output=["k"])
    node.attribute.add(name="value", **given)
    return node


def sparse(tensor: Any) -> Any:
    return onnx.SparseTensorProto(values=tensor, dims=[4])


def graph(*nodes: Any, initializer: Any = (), sparse_initializer: Any = ()) -> Any:
    return onnx.GraphProto(node=nodes, initializer=initializer, sparse_initializer=sparse_initializer)


def function(tensor: Any) -> Any:
    return onnx.ModelProto(graph=graph(), functions=[onnx.FunctionProto(name="f", node=[attribute(t=tensor)])])


def training(tensor: Any) -> Any:
    return onnx.ModelProto(graph=graph(), training_info=[onnx.TrainingInfoProto(algorithm=graph(initializer=[tensor]))])


def model(made: Any) -> Any:
    return onnx.ModelProto(graph=made)


PLACES: dict[str, Callable[[Any], Any]] = {
    "an initializer": lambda one: model(graph(initializer=[one])),
    "a sparse initializer": lambda one: model(graph(sparse_initializer=[sparse(one)])),
    "a constant": lambda one: model(graph(attribute(t=one))),
    "one of several": lambda one: model(graph(attribute(tensors=[one]))),
    "a sparse constant": lambda one: model(graph(attribute(sparse_tensor=sparse(one)))),
    "a branch": lambda one: model(graph(attribute(g=graph(initializer=[one])))),
    "a branch of a branch": lambda one: model(graph(attribute(graphs=[graph(attribute(g=graph(attribute(t=one))))]))),
    "a function": function,
    "training": training,
}


@pytest.mark.parametrize("where", PLACES)
def test_check_weights_place_looks_at_every_tensor(where: str, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(PLACES[where](outside("m.onnx.data")).SerializeToString())
    check_weights_place(tmp_path, PART)
    for location in ("../secret.bin", "/etc/passwd", "inside.bin"):
        path.write_bytes(PLACES[where](outside(location)).SerializeToString())
        with pytest.raises(InputError, match=f"k is to be read from '{location}', not m.onnx.data; export again"):
            check_weights_place(tmp_path, PART)

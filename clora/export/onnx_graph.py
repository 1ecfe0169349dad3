"""ONNX: the served network in opset 23, with the native Attention, RMSNormalization and RotaryEmbedding.

The weights lie beside the graph in one file. The graph says where: what any tensor of it says is checked to be that
file before a runtime opens it.
"""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clora.errors import InputError
from clora.export.graph import NETWORK, Part, Run
from clora.export.manifest import Limits

GRAPH, WEIGHTS = "model.onnx", "model.onnx.data"  # of the network; other parts have their own names
OPSET = 23


def check_onnx() -> None:
    """Raise `InputError` where the packages that writing ONNX takes are not installed."""
    _require("onnx", "onnxscript")


def has_runtime() -> bool:
    """Whether onnxruntime is installed, without which a graph can be written and checked, but not compared."""
    return importlib.util.find_spec("onnxruntime") is not None


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`backbones.load.Rotate` as ONNX's own operator, in fp32 whatever x is in: its angles are of x's dtype."""
    B = x.shape[0]
    turned: Tensor = torch.onnx.ops.rotary_embedding(
        x.float(), cos[None].expand(B, -1, -1), sin[None].expand(B, -1, -1), interleaved=True
    )
    return turned.to(x.dtype)


def build_onnx(
    network: nn.Module, inputs: tuple[Tensor, ...], limits: Limits, folder: Path, part: Part = NETWORK
) -> None:
    """Write graph and weights of a part (the network's made with `rotate`) into `folder`, checked by onnx itself.

    Raises ValueError where the graph leaves an input unused: padding would then be attended without any sign.
    """
    import onnx

    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it tells of every operator of torchvision's that it lacks
    path = folder / graph_name(part)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of torch about its own internals
        torch.onnx.export(
            network,
            inputs,
            path,
            dynamo=True,
            opset_version=OPSET,
            dynamic_shapes=part.sizes(limits),
            input_names=part.inputs,
            output_names=(part.output,),
            external_data=True,
            verbose=False,
        )
    onnx.checker.check_model(str(path))
    graph = onnx.load(str(path), load_external_data=False).graph
    used = {name for node in graph.node for name in node.input}
    if unused := [name for name in part.inputs if name not in used]:
        raise ValueError(f"the exported graph does not use {', '.join(unused)}")


def outline(folder: Path) -> tuple[tuple[str, ...], tuple[tuple[str, tuple[int, ...]], ...]]:
    """What graphs of one network in two precisions share: its operators in order but for casts, and the name and shape
    of every weight."""
    import onnx

    graph = onnx.load(str(folder / GRAPH), load_external_data=False).graph
    weights = sorted((tensor.name, tuple(tensor.dims)) for tensor in graph.initializer)
    return tuple(node.op_type for node in graph.node if node.op_type != "Cast"), tuple(weights)


def graph_name(part: Part) -> str:
    """The file of a part's graph; its weights are in the file of that name and `.data`."""
    return f"{part.file}.onnx"


def open_onnx(folder: Path, part: Part = NETWORK) -> Run:
    """The part's graph in a checked folder, run by onnxruntime on the CPU."""
    _require("onnx", "onnxruntime")
    check_weights_place(folder, part)
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(folder / graph_name(part)), options, providers=["CPUExecutionProvider"])

    def run(*inputs: Tensor) -> Tensor:
        feed = {name: value.contiguous().numpy() for name, value in zip(part.inputs, inputs, strict=True)}
        return torch.from_numpy(session.run([part.output], feed)[0])

    return run


def check_weights_place(folder: Path, part: Part = NETWORK) -> None:
    """Raise `InputError` where the graph's weights are to be read from anywhere but the file beside it."""
    import onnx

    place = folder / graph_name(part)
    try:
        model = onnx.load(str(place), load_external_data=False)
    except Exception as error:  # protobuf's own
        raise InputError(f"{place}: is no ONNX graph ({error}); export again") from error
    for tensor in _tensors(model):
        for entry in tensor.external_data:
            if entry.key == "location" and entry.value != f"{place.name}.data":
                name = tensor.name or "a tensor"
                raise InputError(
                    f"{place}: {name} is to be read from {entry.value!r}, not {place.name}.data; export again"
                )


def _tensors(model: Any) -> Iterator[Any]:
    """Every tensor of a model, wherever one may be: a runtime follows the places of all of them."""
    for graph in (
        model.graph,
        *(graph for one in model.training_info for graph in (one.initialization, one.algorithm)),
    ):
        yield from _tensors_of_graph(graph)
    for function in model.functions:
        yield from _tensors_of_nodes(function.node)
        yield from _tensors_of_attributes(function.attribute_proto)


def _tensors_of_graph(graph: Any) -> Iterator[Any]:
    yield from graph.initializer
    yield from (part for sparse in graph.sparse_initializer for part in (sparse.values, sparse.indices))
    yield from _tensors_of_nodes(graph.node)


def _tensors_of_nodes(nodes: Iterable[Any]) -> Iterator[Any]:
    for node in nodes:
        yield from _tensors_of_attributes(node.attribute)


def _tensors_of_attributes(attributes: Iterable[Any]) -> Iterator[Any]:
    for one in attributes:
        yield from (one.t, *one.tensors)
        yield from (
            part for sparse in (one.sparse_tensor, *one.sparse_tensors) for part in (sparse.values, sparse.indices)
        )
        for graph in (one.g, *one.graphs) if one.HasField("g") else one.graphs:
            yield from _tensors_of_graph(graph)


def _require(*packages: str) -> None:
    if missing := [name for name in packages if importlib.util.find_spec(name) is None]:
        raise InputError(f"format onnx: needs {', '.join(missing)}; run pip install 'clora[export]'")

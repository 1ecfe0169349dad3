"""tensorrt: engines built ahead of time from strongly typed graphs; what no CPU can know is said to be unknown.

One folder of graphs serves all builds. An engine is built here and never run: without a driver none loads.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from clora.backbones.load import load_backbone, served_network
from clora.errors import InputError
from clora.export import artefact as opening
from clora.export import tensorrt_engine as engines
from clora.export.artefact import open_artefact
from clora.export.graph import example_inputs
from clora.export.manifest import COLLECTION, Engine, Limits, read_manifest
from clora.export.onnx_graph import GRAPH, build_onnx, outline, rotate
from clora.export.tensorrt_engine import (
    ENGINE,
    EngineOptions,
    build_engine,
    check_engine,
    engine_limits,
    engine_profiles,
    fitting_profile,
    input_shape,
    why_not_here,
)
from clora.export.tensorrt_library import import_library, known_targets
from clora.jobs.export import ExportRequest, export
from clora.jobs.verify import verify_artefact
from clora.method.flow import few_step_sigmas

trt = pytest.importorskip("tensorrt_rtx")
onnx = pytest.importorskip("onnx")

SMALL = Limits(batch=2, tokens=64, text_buckets=(32,))
PROFILES = engine_profiles(SMALL, 64)


@pytest.fixture(scope="module")
def graph_in(tmp_path_factory: pytest.TempPathFactory, one_block: tuple[Path, Path]) -> Callable[[str], Path]:
    """Makes the folder with the graph, in a precision, of a base of one block."""

    @cache
    def make(precision: str) -> Path:
        dtype = getattr(torch, precision)
        folder = tmp_path_factory.mktemp(precision)
        backbone = load_backbone(one_block[0], "cpu", dtype, ("transformer",))
        network = served_network(backbone, few_step_sigmas(4, 3.0), rotate)
        build_onnx(network, example_inputs(64, 32, 16, dtype), SMALL, folder)
        return folder

    return make


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "target", "attention"),
    [
        ("bfloat16", "SM120", "fused"),
        ("float16", "SM80", "fused"),
        ("float32", "SM89", "decomposed"),
    ],
)
def test_build_engine_builds_without_a_gpu(
    graph_in: Callable[[str], Path], tmp_path: Path, precision: str, target: str, attention: str
) -> None:
    """Where attention is fused nothing may decompose it: a build that cannot keep it whole fails."""
    made = build_engine(graph_in(precision) / GRAPH, PROFILES, EngineOptions(target), tmp_path)
    assert (made.attention, made.attentions, made.target) == (attention, 1, target)
    assert (made.library, made.version) == ("tensorrt_rtx", trt.__version__)
    size = (tmp_path / ENGINE).stat().st_size
    weights = (graph_in(precision) / f"{GRAPH}.data").stat().st_size
    assert size > weights and [path.name for path in tmp_path.iterdir()] == [ENGINE]


@pytest.mark.slow
def test_attention_layers_of_a_bf16_graph_are_whole(graph_in: Callable[[str], Path]) -> None:
    """The parsed network asks for one kernel, and its mask is an operand of it."""
    log = engines.BuildLog(trt)
    builder = trt.Builder(log.logger)
    network = engines.parse_graph(trt, builder, log, graph_in("bfloat16") / GRAPH)
    (attention,) = engines.attention_layers(trt, network)
    assert attention.decomposable is False and attention.mask is not None
    engines.check_inputs_used(network)


@pytest.mark.slow
def test_outline_of_two_precisions_is_one_and_of_another_network_is_not(
    graph_in: Callable[[str], Path], tmp_path: Path
) -> None:
    wanted = outline(graph_in("bfloat16"))
    assert outline(graph_in("float32")) == wanted
    model = onnx.load(graph_in("bfloat16") / GRAPH, load_external_data=False)
    assert [node.op_type for node in model.graph.node].count("Attention") == 1
    attention = next(node for node in model.graph.node if node.op_type == "Attention")
    del attention.input[3:]  # its mask
    mask = next(node for node in model.graph.node if node.op_type == "Less")
    mask.op_type = "Greater"
    onnx.save(model, tmp_path / GRAPH)
    assert outline(tmp_path) != wanted


def lengths_graph(path: Path) -> None:
    """Attention whose keys are counted by opset 24's `nonpad_kv_seqlen`, which TensorRT parses and ignores."""
    make = onnx.helper.make_tensor_value_info
    heads, half = [1, 2, "J", 16], onnx.TensorProto.BFLOAT16
    inputs = [make(name, half, heads) for name in "qkv"] + [make("text_len", onnx.TensorProto.INT64, [1])]
    node = onnx.helper.make_node("Attention", ["q", "k", "v", "", "", "", "text_len"], ["y"])
    graph = onnx.helper.make_graph([node], "g", inputs, [make("y", half, heads)])
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 24)], ir_version=11), path)


def test_build_engine_refuses_a_graph_whose_input_it_ignores(tmp_path: Path) -> None:
    lengths_graph(tmp_path / "lengths.onnx")
    with pytest.raises(ValueError, match="takes no notice of the graph's text_len"):
        build_engine(tmp_path / "lengths.onnx", PROFILES, EngineOptions("SM89"), tmp_path)
    assert not (tmp_path / ENGINE).exists()


def test_build_engine_tells_what_the_parser_refuses(tmp_path: Path) -> None:
    make = onnx.helper.make_tensor_value_info
    x = make("x", onnx.TensorProto.FLOAT, [2])
    nodes = [onnx.helper.make_node("Nonsense", ["x"], ["y"], name="odd", domain="com.example")]
    graph = onnx.helper.make_graph(nodes, "g", [x], [make("y", onnx.TensorProto.FLOAT, [2])])
    opsets = [onnx.helper.make_opsetid("", 23), onnx.helper.make_opsetid("com.example", 1)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=11), tmp_path / "odd.onnx")
    with pytest.raises(InputError, match=r"odd.onnx: TensorRT does not take it \(.*Nonsense") as error:
        build_engine(tmp_path / "odd.onnx", PROFILES, EngineOptions("SM89"), tmp_path)
    assert "\n" not in str(error.value)
    (tmp_path / "no.onnx").write_bytes(b"\xff" * 40)
    with pytest.raises(InputError, match="TensorRT does not take it"):
        build_engine(tmp_path / "no.onnx", PROFILES, EngineOptions("SM89"), tmp_path)


def test_check_engine_names_targets_and_missing_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    assert known_targets(trt)[:2] == ["SM80", "SM86"]
    check_engine(EngineOptions("SM89"))
    with pytest.raises(InputError, match="target SM90: TensorRT for RTX builds for SM80, .*; name one of them"):
        check_engine(EngineOptions("SM90"))
    with pytest.raises(InputError, match="needs tensorrt, which does not load .*--target to build ahead") as error:
        check_engine(EngineOptions())
    assert "\n" not in str(error.value)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(InputError, match=r"needs tensorrt_rtx, .*; run pip install 'clora\[tensorrt\]'"):
        import_library("tensorrt_rtx")


def test_engine_profiles_hold_the_limits_and_prefer_one_reference() -> None:
    limits = engine_limits(4096)
    assert limits.tokens == 12288 and limits.batch == 8
    one, several = engine_profiles(limits, 4096)
    assert (one.tokens, one.ref_tokens) == ((2, 4096, 5120), (2, 4096, 5120))
    assert (several.tokens, several.ref_tokens) == ((2, 4096, 12288), (2, 8192, 12288))
    profiles = (one, several)
    assert fitting_profile(profiles, (1, 4096, 4096, 300)) == 0
    assert fitting_profile(profiles, (8, 4096, 8192, 1024)) == 1
    assert fitting_profile(profiles, (9, 4096, 4096, 300)) is None
    assert fitting_profile(profiles, (1, 4096, 4096, 1025)) is None
    assert input_shape("cos", (-1, 64), one, 1) == (4096 + 4096 + 256, 64)
    assert input_shape("x", (-1, -1, 64), several, 2) == (8, 12288, 64)
    assert input_shape("step", (-1,), one, 2) == (8,)


def told(**values: Any) -> Engine:
    settings = {"library": "tensorrt_rtx", "version": str(trt.__version__), "target": "SM89", "attention": "fused"}
    return Engine.model_validate(
        {**settings, "attentions": 1, "weight_streaming": False, "profiles": PROFILES, **values}
    )


def test_why_not_here_tells_library_release_and_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "this_target", lambda *_: None)
    assert "tensorrt 11.0 is not installed here" in str(why_not_here(told(library="tensorrt", version="11.0")))
    assert "it runs in tensorrt_rtx 0.1 alone, this is" in str(why_not_here(told(version="0.1")))
    assert "built for a GPU (SM89), and this machine has none with a driver" in str(why_not_here(told()))
    monkeypatch.setattr(engines, "this_target", lambda *_: "SM120")
    assert "it was built for SM89, this GPU is SM120" in str(why_not_here(told()))
    monkeypatch.setattr(engines, "this_target", lambda *_: "SM89")
    assert why_not_here(told()) is None


@pytest.fixture(scope="module")
def artefact(one_block: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An engine for SM89, whose fp32 twin was compared here."""
    folder = tmp_path_factory.mktemp("engine") / "artefact"
    base, lora = one_block
    options = EngineOptions("SM89", weight_streaming=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("clora.export.build.engine_limits", lambda _: SMALL)
        export(ExportRequest(folder, "tensorrt", str(base), lora, "bfloat16", 1, engine=options))
    yield folder


@pytest.mark.slow
def test_export_of_an_engine_proves_its_fp32_twin_and_says_what_it_did_not(
    artefact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = read_manifest(artefact)
    assert set(manifest.files) == {COLLECTION, ENGINE}
    assert {path.name for path in artefact.iterdir()} == {"manifest.json", COLLECTION, ENGINE}
    engine = manifest.engine
    assert engine is not None and engine.weight_streaming
    assert (engine.target, engine.attention, engine.attentions) == ("SM89", "fused", 1)
    assert manifest.parity["ok"] is None and "has none with a driver" in manifest.parity["unmeasured"]
    twin = manifest.parity["twin"]
    assert twin["ok"] and 0 < twin["velocity"] <= 3e-6 and twin["padding"] == 0
    assert "has none with a driver" in str(verify_artefact(artefact, num_edits=1))
    with pytest.raises(InputError, match="engine does not load here, it was built for a GPU .SM89.") as error:
        open_artefact(artefact)
    assert "\n" not in str(error.value)
    # With a GPU of its kind it would be read, and only then.
    monkeypatch.setattr(engines, "this_target", lambda *_: "SM89")
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    with pytest.raises(InputError, match=r"its engine does not load \(.*\); export again on this machine"):
        open_artefact(artefact)


@pytest.mark.slow
def test_open_artefact_refuses_a_tampered_engine_before_it_is_read(
    artefact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other"
    shutil.copytree(artefact, other)
    raw = bytearray((other / ENGINE).read_bytes())
    raw[len(raw) // 2] ^= 1
    (other / ENGINE).write_bytes(raw)

    def read(*_: object) -> None:
        raise AssertionError("the engine was read")

    monkeypatch.setattr(opening, "open_engine", read)
    monkeypatch.setattr(engines, "this_target", lambda *_: "SM89")
    with pytest.raises(InputError, match="model.engine is not what was exported"):
        open_artefact(other)
    with pytest.raises(InputError, match="model.engine is not what was exported"):
        verify_artefact(other)
    with pytest.raises(AssertionError, match="the engine was read"):
        open_artefact(artefact)


def test_export_refuses_float16_where_it_overflows(
    monkeypatch: pytest.MonkeyPatch, one_block: tuple[Path, Path]
) -> None:
    from clora.backbones.load import read_footprint
    from clora.export.build import check_precision, find_source

    source = find_source(str(one_block[0]), one_block[1])
    check_precision(source, "float16")
    name = "Qwen/Qwen-Image-Edit-2509"
    real = replace(source, base=name, footprint=read_footprint(name))
    with pytest.raises(InputError, match=r"precision: Qwen/.* \(width 3072\) overflows in float16; leave it out"):
        check_precision(real, "float16")
    check_precision(real, "bfloat16")


def test_outline_counts_weights_wherever_they_are_stored(tmp_path: Path) -> None:
    """A small weight lies beside the graph in fp32 and inside it in bf16, whose bytes are below torch's threshold."""
    found = []
    for external in (True, False):
        folder = tmp_path / str(external)
        folder.mkdir()
        tensor = onnx.helper.make_tensor("bias", onnx.TensorProto.FLOAT, [128], [0.5] * 128)
        x = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [128])
        y = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [128])
        nodes = [onnx.helper.make_node("Add", ["x", "bias"], ["y"])]
        model = onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", [x], [y], [tensor]))
        onnx.save(model, folder / GRAPH, save_as_external_data=external, location="w", size_threshold=0)
        found.append(outline(folder))
    assert found[0] == found[1] == (("Add",), (("bias", (128,)),))

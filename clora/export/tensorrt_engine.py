"""TensorRT: the served network as an engine, built from its ONNX graph, strongly typed.

Precision is therefore that of the graph, and nothing is decided while building. Attention must become one kernel: a
build that cannot do so fails, but for fp32, which has no such kernel. An engine is native code that loading runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clora.errors import InputError
from clora.export.graph import INPUTS, OUTPUT, Run
from clora.export.manifest import Engine, Limits, Profile
from clora.export.tensorrt_library import check_target, import_library, library_for, set_target, this_target

ENGINE = "model.engine"
USUAL_TEXT = 256  # tokens of a prompt with one reference, about
WORKSPACE = 1 << 33


@dataclass(frozen=True)
class EngineOptions:
    """`target`: a compute capability, None for this machine's GPU. `timing_cache`: a file of measured kernels that
    classic TensorRT reads and writes. `weight_streaming`: weights may stay in CPU memory, as far as a budget says."""

    target: str | None = None
    weight_streaming: bool = False
    timing_cache: Path | None = None


def check_engine(options: EngineOptions) -> None:
    """Raise `InputError` where this machine cannot build such an engine."""
    check_target(options.target)


def engine_limits(reference_tokens: int, batch: int = 8) -> Limits:
    """What an engine for a base takes, whose pictures have `reference_tokens`: results and references of three times as
    many, and prompts of three references."""
    return Limits(batch=batch, tokens=max(64, 3 * reference_tokens), text_buckets=(32, 64, 128, 256, 512, 1024))


def engine_profiles(limits: Limits, reference_tokens: int) -> tuple[Profile, ...]:
    """What kernels are chosen for: one reference, as most edits have, and several. A picture's tokens vary a little
    with its shape."""
    usual = min(reference_tokens, limits.tokens)
    one, most = min(usual + usual // 4, limits.tokens), limits.tokens
    texts = limits.text_buckets
    text = (2, min(USUAL_TEXT, texts[-1]), texts[-1])
    batch = (1, 1, limits.batch)
    several = Profile(batch=batch, tokens=(2, usual, most), ref_tokens=(2, min(2 * usual, most), most), text=text)
    if one == most:
        return (several,)
    return Profile(batch=batch, tokens=(2, usual, one), ref_tokens=(2, usual, one), text=text), several


def build_engine(graph: Path, profiles: tuple[Profile, ...], options: EngineOptions, folder: Path) -> Engine:
    """Build the engine of an ONNX graph into `folder`; returns how it was built.

    Raises `InputError` for a graph that TensorRT does not take, and ValueError for one of whose inputs it takes no
    notice: padding would then be attended without any sign.
    """
    trt = import_library(library := library_for(options.target))
    log = BuildLog(trt)
    builder = trt.Builder(log.logger)
    network = parse_graph(trt, builder, log, graph)
    check_inputs_used(network)
    attentions = list(attention_layers(trt, network))
    fused = all(network.get_input(i).dtype != trt.float32 for i in range(3))
    for attention in attentions:
        attention.decomposable = not fused
    config = builder.create_builder_config()
    set_target(trt, config, options.target)
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, WORKSPACE)
    if options.weight_streaming:
        config.set_flag(trt.BuilderFlag.WEIGHT_STREAMING)
    for profile in profiles:
        config.add_optimization_profile(_shapes(builder, network, profile))
    cache = _timing_cache(config, options.timing_cache)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise InputError(
            f"format tensorrt: the engine does not build ({log.faults()}); choose another target or format"
        )
    (folder / ENGINE).write_bytes(plan)
    if cache is not None and options.timing_cache is not None:
        options.timing_cache.write_bytes(cache.serialize())
    return Engine(
        library=library,
        version=str(trt.__version__),
        target=options.target or this_target() or "SM0",
        attention="fused" if fused else "decomposed",
        attentions=len(attentions),
        weight_streaming=options.weight_streaming,
        profiles=profiles,
    )


class BuildLog:
    """A logger that keeps what TensorRT says is wrong, and is silent else."""

    def __init__(self, trt: Any) -> None:
        said: list[str] = []

        class Keeper(trt.ILogger):  # type: ignore[misc]
            def log(self, severity: Any, message: str) -> None:
                if severity <= trt.ILogger.ERROR:
                    said.append(_one_line(message))

        self.logger, self.said = Keeper(), said

    def faults(self) -> str:
        return "; ".join(dict.fromkeys(self.said)) or "it does not say why"


def parse_graph(trt: Any, builder: Any, log: BuildLog, graph: Path) -> Any:
    """The network of an ONNX file. Raises `InputError` with all that the parser refuses, in one sentence."""
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log.logger)
    if not parser.parse_from_file(str(graph)):
        errors = [parser.get_error(index) for index in range(parser.num_errors)]
        refused = dict.fromkeys(f"{e.node_operator() or 'file'} {e.node_name()}: {_one_line(e.desc())}" for e in errors)
        raise InputError(f"{graph}: TensorRT does not take it ({'; '.join(refused)}); export it as onnx")
    return network


def _one_line(text: str) -> str:
    return " ".join(text.split())


def check_inputs_used(network: Any) -> None:
    """Raise ValueError where no output of a parsed network depends on one of its inputs.

    The parser only warns of operands that it does not know, such as the lengths of attention's keys.
    """
    made_by: dict[str, Any] = {}
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        made_by |= {layer.get_output(i).name: layer for i in range(layer.num_outputs)}
    waiting = [network.get_output(i).name for i in range(network.num_outputs)]
    seen: set[str] = set()
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen.add(name)
            layer = made_by.get(name)
            operands = [] if layer is None else [layer.get_input(i) for i in range(layer.num_inputs)]
            waiting += [tensor.name for tensor in operands if tensor is not None]
    names = [network.get_input(i).name for i in range(network.num_inputs)]
    if unused := [name for name in names if name not in seen]:
        raise ValueError(f"TensorRT takes no notice of the graph's {', '.join(unused)}")


def attention_layers(trt: Any, network: Any) -> Iterator[Any]:
    """The IAttention of every attention in a network; bindings hand their input layers out as plain ILayer."""
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            layer.__class__ = trt.IAttentionInputLayer
            yield layer.attention


def _shapes(builder: Any, network: Any, profile: Profile) -> Any:
    """An optimization profile with the shape of every input."""
    made = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        made.set_shape(tensor.name, *(input_shape(tensor.name, tensor.shape, profile, which) for which in range(3)))
    return made


def input_shape(name: str, declared: Any, profile: Profile, which: int) -> tuple[int, ...]:
    """The shape of an input at a profile's least (0), usual (1) or most (2) sizes; `declared` has -1 where it may
    change."""
    B, T, R, M = (sizes[which] for sizes in (profile.batch, profile.tokens, profile.ref_tokens, profile.text))
    dynamic = {"x": (B, T), "refs": (B, R), "text": (B, M), "cos": (T + R + M,), "sin": (T + R + M,)}
    sizes = dynamic.get(name, (B,))
    return (*sizes, *(int(size) for size in tuple(declared)[len(sizes) :]))


def _timing_cache(config: Any, path: Path | None) -> Any:
    """The configuration's cache of measured kernels, filled from a file where there is one."""
    if path is None:
        return None
    cache = config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
    config.set_timing_cache(cache, False)
    return cache


def why_not_here(engine: Engine, device: torch.device | None = None) -> str | None:
    """Why this machine's GPU `device` (None: the first) cannot load an engine, in half a sentence; None where it
    should."""
    try:
        trt = import_library(engine.library)
    except InputError:
        return f"{engine.library} {engine.version} is not installed here"
    if str(trt.__version__) != engine.version:
        return f"it runs in {engine.library} {engine.version} alone, this is {trt.__version__}"
    here = this_target(device)
    if here is None:
        return f"it was built for a GPU ({engine.target}), and this machine has none with a driver"
    if here != engine.target:
        return f"it was built for {engine.target}, this GPU is {here}"
    return None


def open_engine(folder: Path, engine: Engine, device: torch.device, budget: int | None = None) -> Run:
    """The engine in a checked folder, on a GPU: this runs its code.

    `budget`: bytes of weights that stay in GPU memory, of an engine with weight streaming. Raises `InputError` where
    it does not load.
    """
    if why := why_not_here(engine, device):
        raise InputError(f"{folder}: its engine does not load here, {why}; use it where it fits, or export again")
    trt = import_library(engine.library)
    log = BuildLog(trt)
    with torch.cuda.device(device):
        loaded = trt.Runtime(log.logger).deserialize_cuda_engine((folder / ENGINE).read_bytes())
        if loaded is None:
            raise InputError(f"{folder}: its engine does not load ({log.faults()}); export again on this machine")
        if engine.weight_streaming and budget is not None:
            loaded.weight_streaming_budget_v2 = budget
        return EngineRun(folder, engine, loaded, device)


class EngineRun:
    """An engine on `device` as a `Run`, in a stream of its own: with inputs of the CPU, as the batcher's are, it waits
    for nothing that encoders do on the GPU meanwhile. One call at a time."""

    def __init__(self, folder: Path, engine: Engine, loaded: Any, device: torch.device) -> None:
        self.folder, self.engine, self.device = folder, engine, device
        self.loaded, self.context = loaded, loaded.create_execution_context()
        self.stream = torch.cuda.Stream(device)
        self.profile = 0

    def __call__(self, *inputs: Tensor) -> Tensor:
        x, refs, text = inputs[:3]
        profile = fitting_profile(self.engine.profiles, (len(x), x.shape[1], refs.shape[1], text.shape[1]))
        if profile is None:
            raise InputError(f"{self.folder}: sizes beyond its engine's profiles; make batch or images smaller")
        with torch.cuda.device(self.device):
            callers = torch.cuda.current_stream()
            on_gpu = x.device.type == self.device.type
            if on_gpu:
                self.stream.wait_stream(callers)  # which may still be making the inputs
            with torch.cuda.stream(self.stream):
                velocity = self._run(profile, inputs)
                if not on_gpu:
                    return velocity.to(x.device)
            callers.wait_stream(self.stream)
            velocity.record_stream(callers)
            return velocity

    def _run(self, profile: int, inputs: tuple[Tensor, ...]) -> Tensor:
        handle = self.stream.cuda_stream
        if profile != self.profile:
            self.context.set_optimization_profile_async(profile, handle)
            self.profile = profile
        on_gpu = [value.contiguous().to(self.device, non_blocking=True) for value in inputs]
        for name, value in zip(INPUTS, on_gpu, strict=True):
            self.context.set_input_shape(name, tuple(value.shape))
            self.context.set_tensor_address(name, value.data_ptr())
        velocity = torch.empty_like(on_gpu[0])
        self.context.set_tensor_address(OUTPUT, velocity.data_ptr())
        if not self.context.execute_async_v3(handle):
            raise RuntimeError(f"{self.folder}: its engine failed")
        return velocity


def fitting_profile(profiles: tuple[Profile, ...], sizes: tuple[int, int, int, int]) -> int | None:
    """The first profile that takes these sizes (batch, tokens, tokens of references, tokens of text)."""
    for number, profile in enumerate(profiles):
        ranges = (profile.batch, profile.tokens, profile.ref_tokens, profile.text)
        if all(least <= size <= most for size, (least, _, most) in zip(sizes, ranges, strict=True)):
            return number
    return None

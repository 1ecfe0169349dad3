"""Base and collection into the files of an artefact; whoever calls it makes the folder whole and verifies it."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from clora.backbones import COMPONENTS
from clora.backbones.counts import Footprint
from clora.backbones.hub import hub_folder
from clora.backbones.load import linear_shapes, load_backbone, read_footprint, served_network, served_vae
from clora.config import base_identity, read_sidecar, resolve_base
from clora.errors import InputError, WriteError
from clora.export.aoti import build_aoti, check_compiler
from clora.export.artefact import library_versions, machine
from clora.export.calibration import calibrate
from clora.export.graph import example_inputs
from clora.export.manifest import COLLECTION, LIMITS, Format, Limits, Manifest, Precision, Quantization, list_files
from clora.export.merged import set_schedule, write_merged
from clora.export.onnx_graph import GRAPH, build_onnx, check_onnx, outline, rotate
from clora.export.quantize import NUMBERS, EightBits
from clora.export.quantize_graph import quantize_graph
from clora.export.snippet import write_snippet
from clora.export.tensorrt_engine import EngineOptions, build_engine, check_engine, engine_limits, engine_profiles
from clora.export.vae_graphs import build_vae
from clora.lora.catalogue import Catalogue, read_catalogue
from clora.lora.files import read_lora
from clora.method.flow import few_step_sigmas

log = logging.getLogger(__name__)

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "fp8": 2, "int8": 2}
COPIES = {"merged": 1, "aoti": 2, "onnx": 2, "tensorrt": 3}  # of the weights on the disk, at the fullest moment
WIDEST_FP16 = 1024  # of a transformer: values of wider ones leave float16's range, and pictures are black
WORK = "work"  # a folder in the new artefact, gone before it is whole
Outline = tuple[tuple[str, ...], tuple[tuple[str, tuple[int, ...]], ...]]


@dataclass(frozen=True)
class Source:
    """What is exported: a base, named as everywhere and by folder, and a collection with its catalogue."""

    base: str
    folder: Path
    lora: Path
    catalogue: Catalogue
    footprint: Footprint


def find_source(base: str | None, lora: Path) -> Source:
    """Base and collection, known to fit by their headers; base None is the catalogue's. No weight is read.

    Raises `InputErrors` for a LoRA without a catalogue or for another model, and for a base that is not there.
    """
    catalogue = read_catalogue(lora)
    base = base or catalogue.base
    resolved = resolve_base(base)
    if catalogue.base != base:
        log.warning("%s was distilled on base %s, and is now merged into %s", lora, catalogue.base, base)
    folder = resolved if isinstance(resolved, Path) else hub_folder(resolved, None, COMPONENTS)
    return Source(base, folder, lora, catalogue, read_footprint(base))


def check_format(form: Format, precision: Precision, options: EngineOptions | None = None) -> None:
    """Raise `InputError` where this machine lacks what a format needs, or a format the precision."""
    if form != "tensorrt" and precision in ("float16", *NUMBERS):
        raise InputError(f"precision: {form} has float32 and bfloat16, not {precision}; choose one, or format tensorrt")
    if form == "aoti":
        check_compiler()
    elif form in ("onnx", "tensorrt"):
        check_onnx()
    if form == "onnx" and precision != "float32":
        raise InputError(f"precision: an onnx graph in {precision} cannot be verified on a CPU; leave it out")
    if form == "tensorrt":
        check_engine(options or EngineOptions())


def check_precision(source: Source, precision: Precision) -> None:
    """Raise `InputError` for float16 and a base whose values would leave its range."""
    width = max(K for _, K in dict(source.footprint.linears).values()) // 4  # of the second linear of an MLP
    if precision == "float16" and width > WIDEST_FP16:
        raise InputError(f"precision: {source.base} (width {width}) overflows in float16; leave it out for bfloat16")


def check_room(source: Source, form: Format, precision: Precision, place: Path) -> None:
    """Raise `WriteError` where the disk at `place` has too little room."""
    parameters = sum(N * K for N, K in dict(source.footprint.linears).values())
    per_parameter = BYTES[precision] * COPIES[form]
    if form == "tensorrt":  # before the engine its fp32 twin, which is gone by then
        per_parameter = max(per_parameter, BYTES["float32"] * COPIES["onnx"])
    needed = parameters * per_parameter + source.lora.stat().st_size
    above = next(parent for parent in (place, *place.parents) if parent.exists())
    if (free := shutil.disk_usage(above).free) < needed:
        raise WriteError(f"output: {place} needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} are free; make room")


def build(
    source: Source,
    form: Format,
    precision: Precision,
    folder: Path,
    on_part: Callable[[str], None] = lambda what: None,
    options: EngineOptions | None = None,
    twin: Outline | None = None,
    with_vae: bool = True,
    images: Sequence[Image.Image] = (),
) -> Manifest:
    """Fill `folder` with an artefact's files; returns its manifest, which is not written yet.

    `on_part` is told what is done next. `options` are an engine's, `twin` the outline of the fp32 graph that its own
    must be like: ValueError where it is not. `with_vae`: as graphs beside the network, in formats that have them.
    `images` (RGB): what numbers of eight bits are calibrated on.
    """
    catalogue, schedule = source.catalogue, source.catalogue.schedule
    dtype = torch.bfloat16 if precision in NUMBERS else getattr(torch, precision)
    engine, quantization, limits = None, None, LIMITS
    on_part("reading the collection")
    modules = read_lora(source.lora, linear_shapes(source.base)).modules
    base = folder if form == "merged" else folder / WORK
    base.mkdir(exist_ok=True)
    components = COMPONENTS if form == "merged" else ("transformer",)
    merge = write_merged(source.folder, base, modules, dtype, components, lambda name: on_part(f"merging {name}"))
    del modules
    if form == "merged":
        set_schedule(folder, schedule.shift, catalogue.sampler)
        sizes, prompts = read_sidecar(source.folder), {effect.name: effect.prompt for effect in catalogue.effects}
        areas = (sizes.vae_image_area, sizes.condition_image_area)
        write_snippet(folder, prompts, schedule.num_steps, precision, *areas)
    else:
        place = base if form == "tensorrt" else folder
        sigmas = few_step_sigmas(schedule.num_steps, schedule.shift)
        network = write_graph(base, form, dtype, sigmas, place, on_part)
        if form == "tensorrt":
            if twin is not None and outline(base) != twin:
                raise ValueError(f"the graph in {precision} is another network than its fp32 twin")
            limits = engine_limits(source.footprint.reference_tokens)
            if precision == "fp8" or precision == "int8":
                on_part(f"calibrating {precision}")
                quantization = quantize(network, base, source, images, limits, precision)
            del network  # a base of weights, which the builder needs the room of
            on_part("building the engine")
            profiles = engine_profiles(limits, source.footprint.reference_tokens)
            engine = build_engine(base / GRAPH, profiles, options or EngineOptions(), folder)
        shutil.rmtree(base)
    own_vae = form == "merged" or (with_vae and form in ("aoti", "onnx"))
    if own_vae and form != "merged":
        write_vae(source, form, dtype, folder, on_part)
    shutil.copyfile(source.lora, folder / COLLECTION)
    on_part("hashing")
    return Manifest(
        format=form,
        precision=precision,
        base=source.base,
        base_identity=base_identity(source.base, None),
        catalogue=catalogue.model_dump(),
        num_steps=schedule.num_steps,
        shift=schedule.shift,
        sampler=catalogue.sampler,
        limits=limits,
        versions=library_versions(),
        platform=machine(),
        rounding=merge.rounding,
        engine=engine,
        quantization=quantization,
        components={
            "transformer": "artefact",
            "vae": "artefact" if own_vae else "base",
            "text_encoder": "artefact" if form == "merged" else "base",
        },
        files=list_files(folder),
    )


def write_graph(
    base: Path, form: Format, dtype: torch.dtype, sigmas: torch.Tensor, folder: Path, on_part: Callable[[str], None]
) -> nn.Module:
    """The merged transformer of the folder `base` as a graph in `folder`; returns the network."""
    on_part("tabulating the modulation")
    backbone = load_backbone(base, "cpu", dtype, ("transformer",))
    config: Any = backbone.transformer.config
    inputs = example_inputs(
        backbone.token_channels, int(config["joint_attention_dim"]), int(config["attention_head_dim"]), dtype
    )
    network = served_network(backbone, sigmas, None if form == "aoti" else rotate)
    del backbone  # and with it the linears of modulation
    on_part("exporting the graph")
    build_graph = build_aoti if form == "aoti" else build_onnx
    build_graph(network, inputs, LIMITS, folder)
    return network


def quantize(
    network: nn.Module,
    graph: Path,
    source: Source,
    images: Sequence[Image.Image],
    limits: Limits,
    precision: EightBits,
) -> Quantization:
    """Calibrate a bf16 network on edits of `images`, and rewrite its graph in the folder `graph` in eight bits."""
    choice = calibrate(
        network, str(source.folder), source.catalogue, images, limits, torch.bfloat16, NUMBERS[precision]
    )
    layers = quantize_graph(graph, choice)
    costs = {"cost": choice.cost, "cost_of_all": choice.cost_of_all, "worst": choice.worst}
    return Quantization(layers=layers, kept=choice.kept, images=len(images), **costs)


def write_vae(source: Source, form: Format, dtype: torch.dtype, folder: Path, on_part: Callable[[str], None]) -> None:
    """The base's VAE as two graphs in `folder`."""
    on_part("exporting the VAE")
    backbone = load_backbone(source.folder, "cpu", dtype, ("vae",))
    build_vae(served_vae(backbone), backbone.token_channels // 4, form, dtype, LIMITS, folder)


def check_new(output: Path) -> None:
    """Raise `InputError` where something is at `output` already."""
    if output.is_symlink() or output.exists():
        raise InputError(f"output: {output} is there already; name a new folder, or remove it")

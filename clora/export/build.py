"""Base and collection into the files of an artefact; whoever calls it makes the folder whole and verifies it."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from clora.backbones import COMPONENTS
from clora.backbones.counts import Footprint
from clora.backbones.hub import hub_folder
from clora.backbones.load import linear_shapes, load_backbone, read_footprint, served_network
from clora.config import base_identity, resolve_base
from clora.errors import InputError, WriteError
from clora.export.aoti import build_aoti, check_compiler
from clora.export.artefact import library_versions, machine
from clora.export.graph import example_inputs
from clora.export.manifest import COLLECTION, LIMITS, Format, Manifest, Precision, list_files
from clora.export.merged import set_schedule, write_merged
from clora.export.onnx_graph import build_onnx, check_onnx, rotate
from clora.lora.catalogue import Catalogue, read_catalogue
from clora.lora.files import read_lora
from clora.method.flow import few_step_sigmas

log = logging.getLogger(__name__)

BYTES = {"float32": 4, "bfloat16": 2}
WORK = "work"  # a folder in the new artefact, gone before it is whole


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


def check_format(form: Format, precision: Precision) -> None:
    """Raise `InputError` where this machine lacks what a format needs, or a format the precision."""
    if form == "aoti":
        check_compiler()
    elif form == "onnx":
        check_onnx()
        if precision != "float32":
            raise InputError(f"precision: an onnx graph in {precision} cannot be verified on a CPU; leave it out")


def check_room(source: Source, form: Format, precision: Precision, place: Path) -> None:
    """Raise `WriteError` where the disk at `place` has too little room."""
    parameters = sum(N * K for N, K in dict(source.footprint.linears).values())
    copies = 1 if form == "merged" else 2
    needed = parameters * BYTES[precision] * copies + source.lora.stat().st_size
    above = next(parent for parent in (place, *place.parents) if parent.exists())
    if (free := shutil.disk_usage(above).free) < needed:
        raise WriteError(f"output: {place} needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} are free; make room")


def build(
    source: Source,
    form: Format,
    precision: Precision,
    folder: Path,
    on_part: Callable[[str], None] = lambda what: None,
) -> Manifest:
    """Fill `folder` with an artefact's files; returns its manifest, which is not written yet.

    `on_part` is told what is done next.
    """
    catalogue, schedule = source.catalogue, source.catalogue.schedule
    dtype = getattr(torch, precision)
    on_part("reading the collection")
    modules = read_lora(source.lora, linear_shapes(source.base)).modules
    base = folder if form == "merged" else folder / WORK
    base.mkdir(exist_ok=True)
    components = COMPONENTS if form == "merged" else ("transformer",)
    merge = write_merged(source.folder, base, modules, dtype, components, lambda name: on_part(f"merging {name}"))
    del modules
    if form == "merged":
        set_schedule(folder, schedule.shift, catalogue.sampler)
    else:
        write_graph(base, form, dtype, few_step_sigmas(schedule.num_steps, schedule.shift), folder, on_part)
        shutil.rmtree(base)
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
        limits=LIMITS,
        versions=library_versions(),
        platform=machine(),
        rounding=merge.rounding,
        files=list_files(folder),
    )


def write_graph(
    base: Path, form: Format, dtype: torch.dtype, sigmas: torch.Tensor, folder: Path, on_part: Callable[[str], None]
) -> None:
    """The merged transformer of the folder `base` as a graph in `folder`."""
    on_part("tabulating the modulation")
    backbone = load_backbone(base, "cpu", dtype, ("transformer",))
    config: Any = backbone.transformer.config
    inputs = example_inputs(
        backbone.token_channels, int(config["joint_attention_dim"]), int(config["attention_head_dim"]), dtype
    )
    network = served_network(backbone, sigmas, rotate if form == "onnx" else None)
    del backbone  # and with it the linears of modulation
    on_part("exporting the graph")
    build_graph = build_onnx if form == "onnx" else build_aoti
    build_graph(network, inputs, LIMITS, folder)


def check_new(output: Path) -> None:
    """Raise `InputError` where something is at `output` already."""
    if output.is_symlink() or output.exists():
        raise InputError(f"output: {output} is there already; name a new folder, or remove it")

"""`clora export`: base + collection -> an artefact that has proved itself equal to the eager model."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import Console

from clora.config import collection_lora
from clora.data.images import SUFFIXES, load_image
from clora.errors import InputError
from clora.export.artefact import why_unmeasured
from clora.export.build import Outline, Source, build, check_format, check_new, check_precision, check_room, find_source
from clora.export.manifest import Format, Manifest, Precision, write_manifest
from clora.export.onnx_graph import has_runtime, outline
from clora.export.quantize import NUMBERS
from clora.export.signature import private_key
from clora.export.tensorrt_engine import EngineOptions
from clora.export.verify import check_parity, compare, picture
from clora.io.atomic import new_folder
from clora.io.output import check_output, output_error
from clora.serve.triton_repository import check_model, model_folder, write_model

WITH_VAE = ("aoti", "onnx")  # formats that may have the VAE as graphs, or not
MOST_IMAGES = 16  # that numbers of eight bits are calibrated on
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ExportRequest:
    """What `clora export` is asked for. base None: the catalogue's; lora None: the base's own collection. key:
    a private key to sign with. calibration: a folder of images for fp8 and int8; None: random pictures. triton: a
    model for NVIDIA Triton beside the artefact, in `serve.triton_repository.model_folder(output)`."""

    output: Path
    format: Format
    base: str | None = None
    lora: Path | None = None
    precision: Precision = "float32"
    num_edits: int = 3
    seed: int = 0
    engine: EngineOptions = field(default_factory=EngineOptions)
    key: Path | None = None
    with_vae: bool = True
    calibration: Path | None = None
    triton: bool = False


def export(request: ExportRequest, console: Console | None = None) -> Manifest:
    """Do what `request` says; returns the manifest of the artefact in `request.output`.

    All that can be checked is checked before a weight is read: `InputError`. Raises `ParityError` where the artefact is
    not equal enough to the eager model, `WriteError` for a disk without room. In every case nothing is left behind.
    """
    output = request.output
    check_new(output)
    check_output(output)
    if request.triton:
        check_model(output)
        check_output(model_folder(output))
    if request.key is not None:
        private_key(request.key)
    check_format(request.format, request.precision, request.engine)
    _check_used(request)
    source = find_source(request.base, _lora_of(request))
    check_precision(source, request.precision)
    images = _calibration(request) if request.precision in NUMBERS else []
    check_room(source, request.format, request.precision, output)
    console = console or Console(stderr=True)
    with console.status("exporting") as status:

        def show(what: str) -> None:
            status.update(f"{request.format}: {what}")

        try:
            # What `beside` holds gets its name after the artefact, but is written before it: a full disk is no half.
            with ExitStack() as beside, new_folder(output) as folder:
                twin = _prove_twin(request, source, folder, show) if request.format == "tensorrt" else None
                shape = None if twin is None else twin.outline
                settings = (request.engine, shape, request.with_vae, images)
                manifest = build(source, request.format, request.precision, folder, show, *settings)
                parity = _measure(request, folder, manifest, source.base, show)
                if twin is not None:
                    parity["twin"] = twin.parity
                manifest = manifest.model_copy(update={"parity": parity})
                write_manifest(folder, manifest, request.key)  # last: without it the folder is no artefact
                if request.triton:
                    model = beside.enter_context(new_folder(model_folder(output)))
                    write_model(model, output, [entry.name for entry in source.catalogue.effects])
        except OSError as error:
            raise output_error(output, error) from error
    return manifest


def _check_used(request: ExportRequest) -> None:
    """Raise `InputError` for a setting that this format or precision would leave unused."""
    if request.calibration is not None and request.precision not in NUMBERS:
        raise InputError(f"calibration: {request.precision} is not calibrated, fp8 and int8 are; leave it out")
    if not request.with_vae and request.format not in WITH_VAE:
        whose = "always a part of a merged folder" if request.format == "merged" else "the base's beside an engine"
        raise InputError(f"no-vae: is for {' and '.join(WITH_VAE)}, the VAE is {whose}; leave it out")


def _measure(
    request: ExportRequest, folder: Path, manifest: Manifest, base: str, show: Callable[[str], None]
) -> dict[str, Any]:
    """The manifest's `parity`; raises `ParityError` where a bar is missed."""
    if why := why_unmeasured(manifest):
        log.warning("%s: not compared with the eager model, %s; run clora verify where it is", request.output, why)
        return {"ok": None, "unmeasured": why}
    parity = compare(folder, manifest, base, request.num_edits, request.seed, show)
    check_parity(request.output, parity)
    return parity.to_json()


@dataclass(frozen=True)
class Twin:
    """The fp32 graph of an engine's network: what it measured, and its outline."""

    parity: dict[str, Any]
    outline: Outline


def _prove_twin(request: ExportRequest, source: Source, folder: Path, show: Callable[[str], None]) -> Twin | None:
    """Build the fp32 graph that an engine's is like, compare it with the eager model, and remove it.

    It is what a machine without the engine's GPU can prove. None where onnxruntime is not installed. Raises
    `ParityError` where a bar is missed.
    """
    if not has_runtime():
        return None
    place = folder / "twin"
    place.mkdir()
    manifest = build(source, "onnx", "float32", place, lambda what: show(f"fp32 twin: {what}"), with_vae=False)
    parity = _measure(request, place, manifest, source.base, show)
    found = Twin(parity, outline(place))
    shutil.rmtree(place)
    return found


def _calibration(request: ExportRequest) -> list[Image.Image]:
    """The images (RGB) that numbers of eight bits are calibrated on."""
    folder = request.calibration
    if folder is None:
        log.warning("eight bits: calibrated on random pictures; give a folder of your own with --calibration")
        return [picture(request.seed + number) for number in range(MOST_IMAGES)]
    if not folder.is_dir():
        raise InputError(f"calibration: {folder} is no folder; give one with images")
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)[:MOST_IMAGES]
    if not paths:
        raise InputError(f"calibration: {folder} has no image in it; give a folder with some")
    return [load_image(path) for path in paths]


def _lora_of(request: ExportRequest) -> Path:
    if request.lora is not None:
        return request.lora
    found = None if request.base is None else collection_lora(request.base)
    if found is None:
        raise InputError("lora: no collection is given, and the base brings none along; give one with --lora")
    return found

"""The commands on artefacts: make one, and prove one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from clora.cli.app import FAILED, say
from clora.cli.output import Json, print_json, print_report
from clora.errors import InputError

Base = Annotated[str | None, typer.Option(help="'tiny', a hub id or a folder; default: the collection's.")]
Edits = Annotated[int, typer.Option(min=0, max=1000, help="Seeded edits to compare; 0: velocities alone.")]
Public = Annotated[Path | None, typer.Option(metavar="PUB", help="Public key in PEM, which must have signed it.")]
Seed = Annotated[int, typer.Option(min=0, help="Of the edits and of all random inputs.")]


def export(
    output: Annotated[Path, typer.Option(help="Folder to write; it must not be there yet.")],
    format: Annotated[
        Literal["merged", "aoti", "onnx", "tensorrt"],
        typer.Option(
            help="merged: a folder for diffusers; aoti: native code for this CPU; onnx: a graph; tensorrt: an engine."
        ),
    ],
    base: Base = None,
    lora: Annotated[Path | None, typer.Option(help="Collection; default: the base's own.")] = None,
    precision: Annotated[
        Literal["float32", "bfloat16", "float16", "fp8", "int8"] | None,
        typer.Option(help="Of the weights; all sums are made in fp32. Default: float32, of an engine bfloat16."),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(metavar="SM89", help="GPU of an engine that is built ahead of time; default: this machine's."),
    ] = None,
    weight_streaming: Annotated[
        bool, typer.Option("--weight-streaming", help="An engine's weights may stay in CPU memory.")
    ] = False,
    timing_cache: Annotated[
        Path | None, typer.Option(help="File of an engine's measured kernels: read where it is there, and written.")
    ] = None,
    key: Annotated[Path | None, typer.Option(metavar="PEM", help="Private ed25519 key to sign it with.")] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="Folder of images that fp8 and int8 are calibrated on.")
    ] = None,
    with_vae: Annotated[bool, typer.Option("--vae/--no-vae", help="The VAE as graphs too, of aoti and onnx.")] = True,
    triton: Annotated[
        bool, typer.Option("--triton", help="A model for NVIDIA Triton too, in model_repository beside the output.")
    ] = False,
    edits: Edits = 3,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Merge a collection into its base, for production.

    The artefact is compared with the eager model; where it is not equal nothing is written.

    \b
    Example:
      clora export --base tiny --format merged --output artefact
      clora export --lora collection.safetensors --format aoti --output artefact
      clora export --lora collection.safetensors --format tensorrt --target SM89 --output artefact
      clora export --base tiny --format merged --output artefact --triton
    """
    from clora.export.tensorrt_engine import EngineOptions
    from clora.jobs.export import ExportRequest
    from clora.jobs.export import export as run
    from clora.serve.triton_repository import model_folder

    engine = EngineOptions(target, weight_streaming, timing_cache)
    if format != "tensorrt" and engine != EngineOptions():
        raise InputError("target, weight_streaming, timing_cache: belong to --format tensorrt; leave them out")
    chosen = precision or ("bfloat16" if format == "tensorrt" else "float32")
    settings = (engine, key, with_vae, calibration, triton)
    manifest = run(ExportRequest(output, format, base, lora, chosen, edits, seed, *settings))
    model = {"triton": str(model_folder(output))} if triton else {}
    if as_json:
        print_json({"output": str(output), **model, **manifest.model_dump()})
    else:
        print_report(manifest.parity)
        typer.echo("\n".join([str(output), *model.values()]))


def verify(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder that `clora export` wrote.")],
    base: Annotated[str | None, typer.Option(help="The base, where it lies elsewhere than when exporting.")] = None,
    key: Public = None,
    edits: Edits = 3,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Check an artefact's files, and compare it with the eager model.

    The exit code is 0 where it is equal, 1 where it is not or cannot run here, 2 where a file is not as it was
    exported.

    \b
    Example:
      clora verify artefact
      clora verify artefact --edits 20 --seed 1 --json
      clora verify artefact --key public.pem
    """
    from clora.jobs.verify import verify_artefact

    parity = verify_artefact(folder, base, edits, seed, key=key)
    if isinstance(parity, str):
        if as_json:
            print_json({"ok": None, "files": "whole", "unmeasured": parity})
        say([f"{folder}: its files are whole, but it was not compared with the eager model: {parity}"])
        raise typer.Exit(FAILED)
    if as_json:
        print_json(parity.to_json())
    else:
        print_report(parity.to_json())
    if parity.faults:
        say([f"{folder}: {fault}" for fault in parity.faults])
        raise typer.Exit(FAILED)

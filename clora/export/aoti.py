"""AOTInductor packages: the served network compiled to native code, which loading runs.

A package fits the torch version and the kind of CPU that it was compiled for; `export.artefact` refuses others before
it is opened.
"""

from __future__ import annotations

import shutil
import tempfile
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from clora import _C
from clora.errors import InputError, first_line
from clora.export.graph import NETWORK, Part, Run, trace
from clora.export.manifest import Limits

SUFFIX = ".pt2"


def check_compiler() -> None:
    """Raise `InputError` where no C++ compiler is found, which AOTInductor needs on a CPU."""
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        raise InputError("format aoti: needs a C++ compiler, none is on PATH; install g++, or choose merged or onnx")


def build_aoti(
    network: nn.Module, inputs: tuple[Tensor, ...], limits: Limits, folder: Path, part: Part = NETWORK
) -> None:
    """Compile a part's network into `folder`, for this machine's CPU and every size within `limits`."""
    program = trace(network, inputs, limits, part)
    settings = {"aot_inductor.metadata": shapes_taken(inputs, limits) if part is NETWORK else {}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch about its own internals
        torch._inductor.aoti_compile_and_package(
            program, package_path=str(folder / (part.file + SUFFIX)), inductor_configs=settings
        )


def shapes_taken(inputs: tuple[Tensor, ...], limits: Limits) -> dict[str, str]:
    """What the network's package says it takes: widths and type as its example inputs have them, numbers up to the
    limits. `csrc/aoti.cpp` holds inputs against it, because the compiled code would read others beyond their ends."""
    x, _, text, cos = inputs[:4]
    numbers = {
        "batch": limits.batch,
        "tokens": limits.tokens,
        "text": limits.text_buckets[-1],
        "channels": x.shape[-1],
        "text_width": text.shape[-1],
        "angles": cos.shape[-1],
    }
    dtype = str(x.dtype).removeprefix("torch.")
    return {f"clora_{name}": str(number) for name, number in numbers.items()} | {"clora_dtype": dtype}


def open_aoti(folder: Path) -> Run:
    """The network's package in a folder, which must have been checked: this runs its code. Raises `InputError` where
    torch cannot load it."""
    package = folder / (NETWORK.file + SUFFIX)
    try:
        return _C.AotiEngine(str(package))
    except RuntimeError as error:  # such as "failed to map segment from shared object", with a backtrace
        raise InputError(
            f"{package}: cannot be loaded from {tempfile.gettempdir()}, where it is unpacked ({first_line(error)});"
            " let TMPDIR have room for it and allow programs (no noexec), or export again"
        ) from error


def open_aoti_part(folder: Path, part: Part) -> Run:
    """`open_aoti` for a part that takes one tensor."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        package = torch._inductor.aoti_load_package(str(folder / (part.file + SUFFIX)), run_single_threaded=True)

    def run(*inputs: Tensor) -> Tensor:
        # The compiled code reads by the strides that it was traced with; pixels of a picture have their channels last.
        made: Tensor = package(*(one.contiguous() for one in inputs))
        return made

    return run

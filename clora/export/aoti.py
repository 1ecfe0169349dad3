"""AOTInductor packages: the served network compiled to native code, which loading runs.

A package fits the torch version and the kind of CPU that it was compiled for; `export.artefact` refuses others before
it is opened.
"""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from clora import _C
from clora.errors import InputError
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
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch about its own internals
        torch._inductor.aoti_compile_and_package(program, package_path=str(folder / (part.file + SUFFIX)))


def open_aoti(folder: Path) -> Run:
    """The network's package in a folder, which must have been checked: this runs its code."""
    return _C.AotiEngine(str(folder / (NETWORK.file + SUFFIX)))


def open_aoti_part(folder: Path, part: Part) -> Run:
    """`open_aoti` for a part that takes one tensor."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        package = torch._inductor.aoti_load_package(str(folder / (part.file + SUFFIX)), run_single_threaded=True)

    def run(*inputs: Tensor) -> Tensor:
        made: Tensor = package(*inputs)
        return made

    return run

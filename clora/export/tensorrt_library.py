"""What differs between TensorRT and TensorRT for RTX; all else of their interfaces is the same.

TensorRT builds for the GPU of this machine. TensorRT for RTX builds ahead of time, on a machine that needs no GPU, for
the compute capabilities that it knows.
"""

from __future__ import annotations

import importlib
from typing import Any, Literal

import torch

from clora.errors import InputError, first_line

Library = Literal["tensorrt", "tensorrt_rtx"]
CLASSIC: Library = "tensorrt"
AHEAD: Library = "tensorrt_rtx"
INSTALL = {
    CLASSIC: "run it in NVIDIA's container, or give --target to build ahead of time",
    AHEAD: "run pip install 'clora[tensorrt]'",
}
NO_FP32 = "SM75"  # known to TensorRT for RTX, which has no fp32 product for it and fails the whole build


def library_for(target: str | None) -> Library:
    """The library that builds for a compute capability; None is the GPU of this machine."""
    return CLASSIC if target is None else AHEAD


def import_library(name: Library) -> Any:
    """The module. Raises `InputError` where it, or the native libraries behind it, are not there."""
    try:
        return importlib.import_module(name)
    except (ImportError, OSError) as error:
        reason = first_line(error)
        raise InputError(
            f"format tensorrt: needs {name}, which does not load here ({reason}); {INSTALL[name]}"
        ) from error


def known_targets(trt: Any) -> list[str]:
    """The compute capabilities that TensorRT for RTX builds for."""
    found = [name for name in trt.ComputeCapability.__members__ if name.startswith("SM") and name != NO_FP32]
    return sorted(found, key=lambda name: int(name[2:]))


def check_target(target: str | None) -> None:
    """Raise `InputError` where an engine for `target` (None: this machine's GPU) cannot be built here."""
    trt = import_library(library_for(target))
    if target is None:
        if this_target() is None:
            raise InputError("target: this machine has no NVIDIA GPU; name the one to build for, as in --target SM89")
    elif target not in (known := known_targets(trt)):
        raise InputError(f"target {target}: TensorRT for RTX builds for {', '.join(known)}; name one of them")


def this_target(device: torch.device | None = None) -> str | None:
    """The compute capability of this machine's GPU `device` (None: the first), as in SM90; None without one."""
    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return f"SM{major}{minor}"


def set_target(trt: Any, config: Any, target: str | None) -> None:
    """Tell a builder's configuration the compute capability; None is the one that it finds."""
    if target is not None:
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, target), 0)

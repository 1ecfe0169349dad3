"""Device, number types, determinism, and who prints."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from rich.console import Console

from clora.training import distributed

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def quiet_console() -> Console:
    """Progress on stderr, of the first process alone."""
    return Console(stderr=True, quiet=not distributed.is_main())


@contextmanager
def determinism(wanted: bool) -> Iterator[None]:
    """Inside, every operation gives the same bits each time or raises; nothing changes when not `wanted`."""
    if not wanted:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA's linear algebra is first used
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]


def pick_device() -> torch.device:
    """The GPU where there is one (this process's, under torchrun), else the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def base_dtype(name: str, device: torch.device) -> torch.dtype:
    """The type behind `base.dtype`; "auto" is bfloat16 on a GPU and on a CPU with AVX512-BF16, else float32."""
    if name != "auto":
        return DTYPES[name]
    fast = device.type != "cpu" or torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if fast else torch.float32

"""What the tests of the Triton kernels run under: a device, poisoned buffers, and right bf16 in the interpreter."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter

convert_float = interpreter._convert_float


def right_convert_float(data: np.ndarray, source: Any, target: Any, rounding: Any) -> np.ndarray:
    """Triton's conversion, but fp32 to bf16 rounds to the nearest, ties to even, as a GPU does: Triton truncates."""
    if (source, target) != (tl.float32, tl.bfloat16):
        return convert_float(data, source, target, rounding)
    bits = np.ascontiguousarray(data, dtype=np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(data), 0x7FC0, rounded).astype(np.uint16)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interpreter, "_convert_float", right_convert_float)


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Every empty float tensor is filled with NaN, so that no output that is not fully written passes a test."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.zeros(1).new_empty(2).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Where the kernels run: interpreted on the CPU, or on the GPU where there is one."""
    if request.param == "cpu" and torch.cuda.is_available():
        pytest.skip("with a GPU the kernels are compiled for it")
    return str(request.param)

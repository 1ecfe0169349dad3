"""What the tests of the Triton kernels run under: a device, poisoned buffers, right bf16 in the interpreter."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from typing import Any

# torch asks for it where it is to be deterministic (`poisoned`), before the first product on a GPU.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

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


def fp32_values(operand: interpreter.TensorHandle) -> np.ndarray:
    if operand.dtype.scalar == tl.bfloat16:  # held as its bits
        return (operand.data.astype(np.uint32) << 16).view(np.float32)
    return operand.data.astype(np.float32)


def right_dot(_: Any, a: Any, b: Any, acc: Any, *__: object) -> interpreter.TensorHandle:
    """A product summed in fp32, as a GPU does: Triton multiplies the raw bits of bf16."""
    return interpreter.TensorHandle(np.matmul(fp32_values(a), fp32_values(b)) + acc.data, acc.dtype.scalar)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def right_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interpreter, "_convert_float", right_convert_float)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", right_dot)
    # No GPU looks whether each sum of integers overflows, which is an eighth of the interpreter's time.
    options = dataclasses.replace(interpreter.interpreter_builder.options, sanitize_overflow=False)
    monkeypatch.setattr(interpreter.interpreter_builder, "options", options)


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

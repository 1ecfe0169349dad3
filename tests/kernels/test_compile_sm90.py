"""Every kernel compiled for an H100 or H200, which needs none, and what it takes of it."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.kernels.sm90 import CASES, DTYPES, MAX_SHARED_BYTES

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    """`bench.kernels.sm90.measure()` in a process of its own, for here the kernels are interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench.kernels.sm90", "--json"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)["rows"]
    return found


def kernels_in_sources() -> dict[str, str]:
    """The bodies of all `@triton.jit` functions by name; those that are launched have names that end in `_kernel`."""
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in (ROOT / "kernels").glob("*.py")]
    functions = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    jitted = [node for node in functions if any("triton.jit" in ast.unparse(d) for d in node.decorator_list)]
    return {node.name: ast.unparse(node) for node in jitted}


def test_sm90_compiles_every_kernel_in_every_dtype(rows: list[dict[str, Any]]) -> None:
    launched = {name for name in kernels_in_sources() if name.endswith("_kernel")}
    called = {"gelu_tanh", "rms_norm_gradient", "rotate_pairs", "store_block"}  # by kernels
    assert kernels_in_sources().keys() - launched == called
    expected = {(kernel, dtype) for kernel in launched for dtype in DTYPES} - {("gemm_kernel", "fp32")}
    assert {(row["kernel"], row["dtype"]) for row in rows} == expected
    assert {(row["op"], row["case"]) for row in rows} == {(op, case) for op, cases in CASES.items() for case in cases}


def test_sm90_kernels_do_not_spill(rows: list[dict[str, Any]]) -> None:
    assert [row for row in rows if row["spill_stores"] or row["spill_loads"]] == []


def test_sm90_kernels_fit_into_shared_memory(rows: list[dict[str, Any]]) -> None:
    assert [row for row in rows if not 0 <= row["shared_bytes"] < MAX_SHARED_BYTES] == []


def test_sm90_kernels_multiply_matrices_on_the_tensor_cores(rows: list[dict[str, Any]]) -> None:
    """But for fp32, whose products are exact to fp32, as torch's are, and which no tensor core does."""
    products = {name for name, body in kernels_in_sources().items() if "tl.dot(" in body}
    assert products == {"down_kernel", "gemm_kernel", "gradient_kernel", "up_kernel"}
    multiplied = {(row["kernel"], row["dtype"]) for row in rows if row["wgmma"]}
    assert multiplied == {(kernel, dtype) for kernel in products for dtype in ("bf16", "fp16")}
    assert [row for row in rows if row["kernel"] in products and row["wgmma"] != (row["dtype"] != "fp32")] == []


def test_sm90_gemm_kernel_copies_tiles_by_tma(rows: list[dict[str, Any]]) -> None:
    assert {row["kernel"] for row in rows if row["tma"]} == {"gemm_kernel"}
    assert all(row["tma"] for row in rows if row["kernel"] == "gemm_kernel")


def test_sm90_results_name_every_row(rows: list[dict[str, Any]]) -> None:
    """The file of results was made from these ops, cases and kernels: `python -m bench.kernels.sm90 --json`."""
    kept = json.loads((ROOT / "bench" / "results" / "sm90.json").read_text(encoding="utf-8"))["rows"]
    names = ("op", "case", "dtype", "kernel")
    assert [[row[name] for name in names] for row in kept] == [[row[name] for name in names] for row in rows]

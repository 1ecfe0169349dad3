"""What the Triton kernels become on an H100 or H200, compiled without one: `python -m bench.kernels.sm90 [--json]`.

Every op is launched on tensors of the sizes it meets that hold no data, and each kernel that would run is compiled
for sm_90 instead. The bundled ptxas then counts its registers, spilled bytes and shared memory; "wgmma" says whether
the kernel multiplies matrices on the tensor cores, "tma" whether it copies tiles by TMA. One row a kernel and case, in
each dtype.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from clora.kernels import adaln, dmd_score, lora_linear, lora_qkv, qk_norm_rope, renoise

MAX_SHARED_BYTES = 227 * 1024  # of one block on sm_90
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Sm90Driver:
    """The little that a launch asks of the GPU's driver before it compiles."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def compile_instead_of_launching() -> Iterator[list[tuple[str, Any]]]:
    """Within it every launch compiles its kernel for sm_90; the list gets (kernel's name, compiled kernel)."""
    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set, so kernels are not compiled: unset it")
    compiled: list[tuple[str, Any]] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        compiled.append((self.fn.__name__, run(self, *args, grid=grid, warmup=True, **kwargs)))

    with (
        mock.patch.object(triton.runtime.driver, "_active", Sm90Driver()),
        mock.patch.object(JITFunction, "run", compile_only),
    ):
        yield compiled


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def launch_adaln(dtype: torch.dtype, D: int, gated: bool, indexed: bool) -> None:
    """Forward and backward for 8192 tokens."""
    B, L = 1, 8192
    x, r = empty(B, L, D, dtype=dtype), empty(B, L, D, dtype=dtype)
    y = empty(B, L, D, dtype=dtype) if gated else None
    parameters = empty(2 * B if indexed else B, 3 * D, dtype=dtype)
    scale, shift, gate = parameters.chunk(3, -1)
    index = empty(B, L, dtype=torch.int64) if indexed else None
    adaln.launch_forward(x, y, gate if gated else None, scale, shift, index)
    adaln.launch_backward(r if gated else None, r, x, y, gate if gated else None, scale, index)


def launch_renoise(dtype: torch.dtype) -> None:
    """Forward and backward for the latents of a 1024x1024 image."""
    x, sigma = empty(1, 4096, 64, dtype=dtype), empty(1)
    renoise.launch_forward(x, x, sigma, sigma, x)
    grad = empty(1, 4096, 64)
    renoise.launch_backward(grad, grad, sigma, sigma, (dtype, dtype))


def launch_dmd_score(dtype: torch.dtype, C: int, guided: bool) -> None:
    x, sigma = empty(2, 4096, C, dtype=dtype), empty(2)
    dmd_score.launch(x, sigma, x, x, x, x if guided else None, 4.0 if guided else 1.0, "norm", 1e-3)


def launch_lora_linear(
    dtype: torch.dtype, K: int, N: int, epilogue: str = "none", rank: int = 128, way: str | None = None
) -> None:
    """Forward and backward for 8192 tokens and three slots, as the rule says or one way; h is kept."""
    L, S = 8192, 3
    x, weight, bias = empty(1, L, K, dtype=dtype), empty(N, K, dtype=dtype), empty(N, dtype=dtype)
    A, B, scale, slot = empty(S, rank, K, dtype=dtype), empty(S, N, rank, dtype=dtype), empty(S), empty(1).long()
    y, down, h = lora_linear.launch_forward(x, weight, bias, A, B, scale, slot, epilogue, keep_h=True, way=way)
    wanted = (True, True, True)
    lora_linear.launch_backward(y, x, weight, A, B, scale, slot, down, h, epilogue, wanted, way)


def launch_lora_qkv(dtype: torch.dtype, D: int, rank: int) -> None:
    """Forward and backward for 8192 tokens and three slots."""
    L, S = 8192, 3
    x, weights, biases = empty(1, L, D, dtype=dtype), [empty(D, D, dtype=dtype)] * 3, [empty(D, dtype=dtype)] * 3
    A, B, scale = [empty(S, rank, D, dtype=dtype)] * 3, [empty(S, D, rank, dtype=dtype)] * 3, [empty(S)] * 3
    slot = empty(1).long()
    *projections, down = lora_qkv.launch_forward(x, weights, biases, A, B, scale, slot)
    lora_qkv.launch_backward(projections, x, weights, A, B, scale, slot, down, (True, True, True))


def launch_qk_norm_rope(dtype: torch.dtype, H: int, D: int) -> None:
    """Forward and backward for 8192 tokens of the image and 512 of the text, whose projections are parts of one row."""
    B, L_img, L_txt = 1, 8192, 512
    q_img, k_img, v_img = empty(B, L_img, 3 * H * D, dtype=dtype).chunk(3, -1)
    q_txt, k_txt, v_txt = empty(B, L_txt, 3 * H * D, dtype=dtype).chunk(3, -1)
    cos = empty(L_txt + L_img, D // 2)
    frozen = (*empty(4, D, dtype=dtype), cos, cos)
    out_q, out_k, _ = qk_norm_rope.launch_forward(q_img, k_img, v_img, q_txt, k_txt, v_txt, *frozen)
    qk_norm_rope.launch_backward(out_q, out_k, q_img, k_img, q_txt, k_txt, *frozen)


CASES: dict[str, dict[str, Callable[[torch.dtype], None]]] = {
    "adaln": {
        "D=3072": partial(launch_adaln, D=3072, gated=False, indexed=False),
        "D=8192 index": partial(launch_adaln, D=8192, gated=False, indexed=True),
    },
    "gated_residual_adaln": {
        "D=3072": partial(launch_adaln, D=3072, gated=True, indexed=False),
        "D=3072 index": partial(launch_adaln, D=3072, gated=True, indexed=True),
        "D=8192 index": partial(launch_adaln, D=8192, gated=True, indexed=True),
    },
    "renoise": {"4096x64": launch_renoise},
    "dmd_score": {
        "C=64": partial(launch_dmd_score, C=64, guided=False),
        "C=64 guided": partial(launch_dmd_score, C=64, guided=True),
        "C=4096 guided": partial(launch_dmd_score, C=4096, guided=True),
    },
    "lora_linear": {
        "3072x3072": partial(launch_lora_linear, K=3072, N=3072),
        "3072x3072 r256": partial(launch_lora_linear, K=3072, N=3072, rank=256),
        "3072x12288 gelu": partial(launch_lora_linear, K=3072, N=12288, epilogue="gelu_tanh"),
        "in place gelu": partial(launch_lora_linear, K=3072, N=12288, epilogue="gelu_tanh", way="in_place"),
    },
    "lora_qkv": {
        "D=3072": partial(launch_lora_qkv, D=3072, rank=128),
        "D=3072 r256": partial(launch_lora_qkv, D=3072, rank=256),
    },
    "qk_norm_rope": {
        "24x128": partial(launch_qk_norm_rope, H=24, D=128),
        "4x256": partial(launch_qk_norm_rope, H=4, D=256),
        "24x48": partial(launch_qk_norm_rope, H=24, D=48),
    },
}


@cache  # cases may come to the same kernel
def resources(ptx: str) -> dict[str, int]:
    """Registers a thread, spilled bytes and stack bytes, as the bundled ptxas reports them for sm_90a."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        command = [triton.knobs.nvidia.ptxas.path, "-v", "--gpu-name=sm_90a", str(source), "-o", f"{folder}/out"]
        report = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    patterns = {
        "registers": r"Used (\d+) registers",
        "spill_stores": r"(\d+) bytes spill stores",
        "spill_loads": r"(\d+) bytes spill loads",
        "stack": r"(\d+) bytes stack frame",
    }
    found = {name: re.search(pattern, report) for name, pattern in patterns.items()}
    if None in found.values():
        raise RuntimeError(f"ptxas reported no resources: {report}")
    return {name: int(match.group(1)) for name, match in found.items() if match}


def measure() -> list[dict[str, Any]]:
    """One row for each op, case, dtype and kernel."""
    rows = []
    for op, cases in CASES.items():
        for case, launch in cases.items():
            for dtype_name, dtype in DTYPES.items():
                with compile_instead_of_launching() as compiled:
                    launch(dtype)
                for kernel_name, kernel in compiled:
                    row = {"op": op, "case": case, "dtype": dtype_name, "kernel": kernel_name}
                    figures = {**resources(kernel.asm["ptx"]), "shared_bytes": kernel.metadata.shared}
                    figures["wgmma"] = "wgmma.mma_async" in kernel.asm["ptx"]
                    figures["tma"] = "cp.async.bulk.tensor" in kernel.asm["ptx"]
                    row |= {**figures, "warps": kernel.metadata.num_warps}
                    if row not in rows:  # one launch for the text and one for the image give the same kernel
                        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout instead of a table")
    options = parser.parse_args()
    rows = measure()
    if options.json:
        about = {"bench": "sm90", "torch": torch.__version__, "triton": triton.__version__}
        # A row a line: the file is read by people, and in diffs.
        print(json.dumps(about)[:-1] + ', "rows": [\n ' + ",\n ".join(map(json.dumps, rows)) + "\n]}")
        return
    for row in rows:
        what = "{op:21s} {case:15s} {dtype} {kernel:28s}".format(**row)
        print(
            what + " {registers:4d} registers, {spill_stores:3d} bytes spilled, {shared_bytes:5d} shared".format(**row)
        )


if __name__ == "__main__":
    main()

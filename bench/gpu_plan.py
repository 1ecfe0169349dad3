"""What `bench/gpu.sh` runs: its parts with their seconds, the order of both quarters of an hour, and the bars.

Planned seconds are guesses for one Hopper GPU with 16 cores, to be put right by the first `summary.json`; limits end a
part that takes much longer. `dry` is the same part at a small size on a CPU.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

FIRST_SECONDS, SECOND_SECONDS = 420, 330  # of each list; of a quarter of an hour the machine's start takes the rest
Document = Mapping[str, Any]


@dataclass(frozen=True)
class Part:
    """One command, after `python -m`. With `result` it is given `--out NAME.json`."""

    name: str
    command: tuple[str, ...]
    seconds: int  # planned
    limit: int  # at most
    dry: tuple[str, ...]  # the command on a CPU; none where another part's is the same
    result: bool = True
    beside: bool = False  # runs while the next ones do: it needs no GPU
    needs: tuple[str, ...] = ()  # programs and packages without any of which the part is left out
    after: str | None = None  # the part that must have ended before, here the one that makes clora._C


def bench(
    name: str,
    module: str,
    *arguments: str,
    seconds: int,
    limit: int,
    dry: tuple[str, ...] = ("--rounds", "2"),
    needs: tuple[str, ...] = (),
    after: str | None = None,
) -> Part:
    """A module of bench/: its dry run is the same at `--size small` with the arguments `dry`, where there are any."""
    rehearsed = (f"bench.{module}", "--size", "small", *dry) if dry else ()
    return Part(name, (f"bench.{module}", *arguments), seconds, limit, rehearsed, needs=needs, after=after)


# One shape and dtype of every op, by file: on a GPU the size of the real model, on a CPU in Triton's interpreter.
_CHECKED = {
    "adaln": ("mixed-torch.bfloat16", "cpu-gated-(2, 5, 48)-torch.bfloat16"),
    "dmd_score": ("(4.0, 'norm')-torch.bfloat16", "cpu-(2, 5, 48)-(4.0, 'norm')-torch.bfloat16"),
    "lora_linear": ("104-fused-torch.bfloat16-none", "cpu-fused-torch.bfloat16-0"),
    "lora_qkv": ("fused-torch.bfloat16", "cpu-fused-torch.bfloat16"),
    "qk_norm_rope": ("torch.bfloat16", "cpu-(2, 1, 2, 3, 48)-torch.bfloat16-True"),
    "renoise": ("torch.bfloat16", "cpu-(2, 5, 48)-torch.bfloat16"),
}
ON_GPU = tuple(
    f"tests/kernels/test_{op}.py::test_{op}_equals_fp64_reference_at_full_size[{case}]"
    for op, (case, _) in _CHECKED.items()
)
ON_CPU = tuple(
    f"tests/kernels/test_{op}.py::test_{op}_equals_fp64_reference[{case}]" for op, (_, case) in _CHECKED.items()
)
_PYTEST = ("pytest", "-q", "-p", "no:cacheprovider", "-rf")
# Only files that hold tests of a GPU: the others may import packages that the machine lacks.
_HOLDING = (
    "tests/kernels", "tests/backbones", "tests/lora", "tests/method", "tests/training", "tests/test_second_device.py",
)  # fmt: skip
_SANITIZED = ("-o", "timeout=0", "-m", "gpu", "-k", "many_tiles or repeats_bit_for_bit or layouts_and_dtypes")
_BUILD = ("bench.gpu_session", "--build")
_LINEAR = ("--rounds", "30", "--ways", "fused", "in_place", "wide", "gemm", "eager", "addmm")

PARTS = {
    part.name: part
    for part in (
        Part("build", _BUILD, 45, 150, (*_BUILD, "--configure-only"), result=False, beside=True),
        # On a CPU those of the GPU are collected and skipped, so that a new name would show.
        Part("tests", (*_PYTEST, *ON_GPU), 60, 110, (*_PYTEST, *ON_GPU, *ON_CPU), result=False),
        bench("lora_linear", "kernels.lora_linear", "--cases", "1x8192", *_LINEAR, seconds=45, limit=80,
              dry=("--rounds", "2", "--cases", "1x256")),
        bench("forward", "kernels.forward", "--size", "full-20", "--rounds", "15", seconds=75, limit=120),
        bench("block", "kernels.block", "--rounds", "30", "--ways", "eager", "compiled", seconds=65, limit=110),
        bench(
            "train_cycle", "training.train_cycle", "--size", "full-width-4", "--runs", "exact", "authors",
            seconds=75, limit=130, dry=("--rounds", "2", "--runs", "exact", "authors"),
        ),  # fmt: skip
        bench("adaln", "kernels.adaln", "--rounds", "30", "--ways", "eager", seconds=25, limit=50),
        bench("renoise", "kernels.renoise", "--rounds", "30", "--ways", "eager", seconds=15, limit=40),
        bench(
            "lora_linear_mixed", "kernels.lora_linear", "--cases", "3x8192", "--rounds", "30", "--ways", "eager",
            seconds=30, limit=60, dry=("--rounds", "2", "--cases", "3x256 slots 0,1,2"),
        ),  # fmt: skip
        bench("forward_60", "kernels.forward", "--size", "full", "--rounds", "8", seconds=100, limit=150, dry=()),
        bench("lora_qkv", "kernels.lora_qkv", "--rounds", "30", seconds=60, limit=100),
        Part(
            "tests_all", (*_PYTEST, "-m", "gpu", "--continue-on-collection-errors", *_HOLDING), 150, 240,
            (*_PYTEST, "--collect-only", "-m", "gpu", "--continue-on-collection-errors", *_HOLDING), result=False,
            after="build",
        ),
        bench(
            "train_cycle_20", "training.train_cycle", "--size", "full-width-20", "--rounds", "3",
            seconds=170, limit=260, dry=(),
        ),
        bench(
            "train_cycle_lean", "training.train_cycle", "--size", "full-width-20", "--rounds", "3", "--runs", "lean",
            seconds=130, limit=220, dry=("--rounds", "2", "--runs", "lean"),
        ),
        bench("sampler", "serving.sampler", "--rounds", "50", seconds=20, limit=40, after="build"),
        bench(
            "tensorrt", "serving.tensorrt", "--size", "full", "--rounds", "20", seconds=100, limit=240,
            needs=("tensorrt", "onnx", "onnxscript"), after="build",
        ),
        bench("dmd_score", "kernels.dmd_score", "--rounds", "30", seconds=20, limit=40),
        bench("tiny_step", "training.tiny_step", seconds=25, limit=50),
        bench(
            "train_cycle_60", "training.train_cycle", "--size", "full-width-60", "--runs", "exact",
            seconds=260, limit=400, dry=(),
        ),
        Part(
            "sanitizer", ("bench.gpu_session", "--sanitizer", *_SANITIZED, "tests/kernels"), 300, 500, (),
            result=False, needs=("compute-sanitizer",),
        ),
    )
}  # fmt: skip
LISTS = {
    "first": ("build", "tests", "lora_linear", "forward", "block", "train_cycle", "adaln", "renoise"),
    "second": (
        "build", "lora_linear_mixed", "forward_60", "lora_qkv", "tests_all", "train_cycle_20", "train_cycle_lean",
        "sampler", "dmd_score", "tiny_step", "tensorrt", "train_cycle_60", "sanitizer",
    ),
}  # fmt: skip
BUDGETS = {"first": FIRST_SECONDS, "second": SECOND_SECONDS}


def planned_seconds(parts: tuple[str, ...]) -> int:
    """Of the parts one after the other; those beside others take no time of their own."""
    return sum(PARTS[name].seconds for name in parts if not PARTS[name].beside)


def command_line(part: Part, out: str | None, dry: bool) -> list[str]:
    """The part's command with this interpreter."""
    module, *arguments = part.dry if dry else part.command
    return [sys.executable, "-m", module, *arguments, *(["--out", out] if part.result and out is not None else [])]


@dataclass(frozen=True)
class Bar:
    """A figure that a GPU must show (docs/BENCHMARKS.md): at most, or at least, `limit`."""

    part: str
    what: str
    limit: float
    at_most: bool
    value: Callable[[Document], float | None]  # None where the document has no such figure

    def met(self, document: Document) -> bool | None:
        value = self.value(document)
        return None if value is None else (value <= self.limit if self.at_most else value >= self.limit)


Case = tuple[str, str]  # how its name begins and ends


def median_us(document: Document, case: Case, way: str) -> float | None:
    """Median microseconds of a way of the first such case."""
    for row in document["rows"]:
        if row["case"].startswith(case[0]) and row["case"].endswith(case[1]) and way in row:
            return float(row[way]["median_us"])
    return None


def ratio(over: tuple[Case, str], under: tuple[Case, str]) -> Callable[[Document], float | None]:
    """The time of one (case, way) over that of another."""

    def value(document: Document) -> float | None:
        above, below = median_us(document, *over), median_us(document, *under)
        return None if above is None or below is None else above / below

    return value


def least_share(of: str) -> Callable[[Document], float | None]:
    """The smallest share of a ceiling among all rows."""
    return lambda document: min((row[of] for row in document["rows"] if of in row), default=None)


def seconds_of(case: Case) -> Callable[[Document], float | None]:
    """Seconds of ours."""

    def value(document: Document) -> float | None:
        us = median_us(document, case, "ours")
        return None if us is None else us / 1e6

    return value


def _over_gemm(K: int, N: int, limit: float) -> Bar:
    case = (f"{K}->{N} r128 1x8192", " forward")
    what = f"lora_linear {K} to {N}, over the bare product"
    return Bar("lora_linear", what, limit, True, ratio((case, "ours"), (case, "gemm")))


_BLOCK = ("", " forward and backward")
_MIXED, _ONE = (("3072->3072 r128 3x8192 slots " + slots, " forward") for slots in ("0,1,2", "0,0,0"))
BARS = (
    _over_gemm(3072, 3072, 1.10),
    _over_gemm(3072, 12288, 1.06),
    _over_gemm(12288, 3072, 1.07),
    Bar("lora_linear_mixed", "three adapters in a batch of three, over one", 1.03, True,
        ratio((_MIXED, "ours"), (_ONE, "ours"))),
    Bar("adaln", "adaln, least share of the copy ceiling", 0.85, False, least_share("share_of_copy")),
    Bar("renoise", "renoise, least share of the copy ceiling", 0.85, False, least_share("share_of_copy")),
    Bar("block", "block, PEFT and diffusers over ours", 1.30, False, ratio((_BLOCK, "eager"), (_BLOCK, "ours"))),
    Bar("block", "block, the same compiled over ours", 1.05, False, ratio((_BLOCK, "compiled"), (_BLOCK, "ours"))),
    Bar("forward", "20 layers merged, seconds (a third of 60's)", 0.28 / 3, True, seconds_of(("20 layers", " merged"))),
    Bar("forward_60", "60 layers merged, seconds", 0.28, True, seconds_of(("60 layers", " merged"))),
)  # fmt: skip

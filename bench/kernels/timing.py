"""What the benches of the Triton ops share: the gate of correctness, timing in turns, the ceilings, the report.

On a GPU all ways are timed, and a row says what share it reaches of two ceilings that are measured with it: torch's
copy of 1 GiB, and cuBLAS's bf16 product of matrices of 8192. On a CPU kernels cannot run: there the public function,
which takes the reference, and the eager way are timed, so that the code is proved and the counts are given. `--size
small` is for a CPU, and the default there.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clora.io.atomic import write_text

WARM_UP_ROUNDS = 3
FLUSH_BYTES = 256 * 2**20  # more than any GPU's L2 cache
MATMUL_SIZE = 8192
ON_CPU = ("ours", "eager")


@dataclass(frozen=True)
class Case:
    """One measurement: the same work by the op and by its reference."""

    name: str
    gate: Callable[[], None]  # raises AssertionError where the op is wrong
    variants: dict[str, Callable[[], object]]  # "ours", "eager", "compiled" and others; on a CPU ON_CPU are run
    bytes: int  # that must be read and written, each tensor once
    flops: int


def check_accuracy(name: str, ours: Tensor, same_dtype: Tensor, exact: Tensor, floor: float = 1.0) -> None:
    """Raise AssertionError unless the greatest error of `ours` is at most twice that of `same_dtype`.

    `same_dtype` is the reference's result in the dtypes of `ours`, `exact` its result in fp64. To this are
    added `floor` units in the last place of the greatest value, for references that happen to be exact.
    """
    if ours.dtype != same_dtype.dtype or ours.shape != exact.shape:
        raise AssertionError(f"{name} is {ours.dtype} {tuple(ours.shape)}, not {same_dtype.dtype} {exact.shape}")
    if ours.numel() == 0:
        return
    error, reference_error = ((result.double() - exact).abs().max().item() for result in (ours, same_dtype))
    bound = 2 * reference_error + floor * torch.finfo(ours.dtype).eps * exact.abs().max().item()
    if not error <= bound:
        raise AssertionError(f"{name}: error {error:.3g}, above {bound:.3g}; the reference's is {reference_error:.3g}")


def time_in_turns(runs: dict[str, Callable[[], object]], rounds: int, device: str) -> dict[str, dict[str, float]]:
    """Median, 20th and 80th percentile of each run's microseconds; the runs take turns round by round.

    On a GPU its own clock is read, and the cache is overwritten before each run.
    """
    flush = torch.empty(FLUSH_BYTES if device == "cuda" else 0, dtype=torch.int8, device=device)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for index in range(rounds + WARM_UP_ROUNDS):
        for name, run in runs.items():
            flush.zero_()
            elapsed = _gpu_microseconds(run) if device == "cuda" else _cpu_microseconds(run)
            if index >= WARM_UP_ROUNDS:
                times[name].append(elapsed)
    return {name: _summary(values) for name, values in times.items()}


def _gpu_microseconds(run: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3


def _cpu_microseconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) * 1e6


def _summary(values: list[float]) -> dict[str, float]:
    fifths = statistics.quantiles(values, n=5)
    return {
        "median_us": round(statistics.median(values), 2),
        "p20_us": round(fifths[0], 2),
        "p80_us": round(fifths[3], 2),
    }


def copy_gb_per_s(rounds: int) -> float:
    """Bytes read and written in a second by torch's copy of 1 GiB on the GPU, in 10^9."""
    source = torch.zeros(2**30, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    median_us = time_in_turns({"copy": lambda: target.copy_(source)}, rounds, "cuda")["copy"]["median_us"]
    return 2 * source.numel() / median_us / 1e3


def matmul_tflop_per_s(rounds: int) -> float:
    """Operations in a second of cuBLAS's bf16 product of two square matrices on the GPU, in 10^12."""
    left, right = torch.randn(2, MATMUL_SIZE, MATMUL_SIZE, device="cuda").bfloat16()
    out = torch.empty_like(left)
    runs = {"matmul": lambda: torch.mm(left, right, out=out)}
    return 2 * MATMUL_SIZE**3 / time_in_turns(runs, rounds, "cuda")["matmul"]["median_us"] / 1e6


def measure(
    bench: str, cases: Sequence[Case], rounds: int, keep: Callable[[dict[str, Any]], None] = lambda document: None
) -> dict[str, Any]:
    """The bench's document: a row a case, with the shares of the ceilings on a GPU. `keep` is given what there is of it
    after each row."""
    on_gpu = torch.cuda.is_available()
    document: dict[str, Any] = {
        "bench": bench,
        "device": torch.cuda.get_device_name() if on_gpu else f"{platform.machine()}, reference only",
        "torch": torch.__version__,
        "rounds": rounds,
        "rows": [],
    }
    if on_gpu:
        document["copy_gb_per_s"] = round(copy_gb_per_s(rounds), 1)
        document["matmul_tflop_per_s"] = round(matmul_tflop_per_s(rounds), 1)
    for case in cases:
        case.gate()
        variants = case.variants if on_gpu else {name: case.variants[name] for name in ON_CPU}
        times = time_in_turns(variants, rounds, "cuda" if on_gpu else "cpu")
        ours = times["ours"]["median_us"]
        row = {"case": case.name, "bytes": case.bytes, "flops": case.flops, **times}
        row |= {f"{way}_over_ours": round(t["median_us"] / ours, 2) for way, t in times.items() if way != "ours"}
        if on_gpu:
            row["share_of_copy"] = round(case.bytes / ours / 1e3 / document["copy_gb_per_s"], 3)
            row["share_of_matmul"] = round(case.flops / ours / 1e6 / document["matmul_tflop_per_s"], 3)
        document["rows"].append(row)
        keep(document)
    return document


def run(
    bench: str,
    description: str,
    make_cases: Callable[[str, str], list[Case]],
    sizes: Sequence[str] = ("small", "full"),
) -> None:
    """A bench's command line: measure the cases of `make_cases(device, size)` and print them. The first of the sizes is
    for a CPU, the last is a GPU's unless another is chosen."""
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout instead of a table")
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--size", choices=sizes, default=sizes[-1] if on_gpu else sizes[0])
    parser.add_argument("--cases", default="", help="those with this text in their names alone")
    parser.add_argument("--ways", nargs="+", help="these alone, and ours")
    parser.add_argument("--out", type=Path, help="JSON file, written anew after each case")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    made = make_cases("cuda" if on_gpu else "cpu", options.size)
    cases = chosen(made, options.cases, options.ways)
    if not cases:
        parser.error(f"--cases: no name has {options.cases!r}; there are: {'; '.join(case.name for case in made)}")

    def keep(document: dict[str, Any]) -> None:
        if options.out is not None:
            write_text(options.out, json.dumps(document, indent=1) + "\n")

    document = measure(bench, cases, options.rounds, keep) | {"complete": True}
    keep(document)
    report(document, options.json)


def chosen(cases: Sequence[Case], text: str, ways: Sequence[str] | None) -> list[Case]:
    """The cases with `text` in their names, with "ours", what a CPU needs and the ways named; all where None is."""
    kept = [case for case in cases if text in case.name]
    if ways is None:
        return kept
    wanted = {"ours", *ways, *(ON_CPU if not torch.cuda.is_available() else ())}
    return [replace(case, variants={w: run for w, run in case.variants.items() if w in wanted}) for case in kept]


def report(document: dict[str, Any], as_json: bool) -> None:
    """Print the document, or a table of it."""
    if as_json:
        print(json.dumps(document, indent=1))
        return
    ceilings = ""
    if "copy_gb_per_s" in document:
        ceilings = "; copy {copy_gb_per_s} GB/s, matmul {matmul_tflop_per_s} TFLOP/s".format(**document)
    print(f"{document['bench']} on {document['device']}{ceilings}; microseconds: median (20 to 80 %)")
    for row in document["rows"]:
        times = {name: figure for name, figure in row.items() if isinstance(figure, dict)}
        cells = [f"{row['case']:34s} {row['bytes'] / 1e6:.1f} MB {row['flops'] / 1e6:.1f} MFLOP"]
        cells += [f"{name} {t['median_us']} ({t['p20_us']} to {t['p80_us']})" for name, t in times.items()]
        cells += [f"{name.replace('_', ' ')} {row[name]}" for name in row if name.endswith("_over_ours")]
        cells += [f"{row[f'share_of_{ceiling}']:.0%} of {ceiling}" for ceiling in ("copy", "matmul") if ceilings]
        print("  ".join(cells))

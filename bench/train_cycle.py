"""One generator and five critic updates against the authors' schedule: `python -m bench.train_cycle [--json]`.

Ours is `clora.distill.Distiller` with the preset `authors`, theirs `bench.authors_schedule`: the same random
transformer, adapters and data, at batch size 1, both checkpointing their blocks. No quality is claimed. In this order:

1. counts: both run on a transformer of one narrow layer, with hooks that count samples going forward and gradients
   coming back, until every exit step has been drawn. "mean" is over the exit steps, which are equally likely.
   Draws do not depend on the transformer, so this also tells which steps have cycles of average length.
2. peak memory: each schedule alone in a process of its own. On a CPU it is the growth of the resident set over what
   libraries and data take (the kernel's high-water mark), on a GPU the allocator's peak.
3. time: cycles of average length, the schedules in turns, effect and general stream in turn. On a CPU processor
   time of one thread, on a GPU wall time between synchronisations. `ratio.time` is of one cycle of each stream.

Encoding, which the authors repeat at every update, is left out of theirs on a CPU: at these sizes no encoder would be
of the right cost beside the transformer. On a GPU it is a random text encoder of Qwen2.5-VL's width, as deep beside
the transformer as the real one, without its vision tower and without the VAE.

Model FLOPs are those of a schedule's own forwards and backwards, without adapters and without recomputation.
`tokens_per_s` counts the sequence once for each of the six updates, whatever a schedule spends on it.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import psutil
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.cycle_counts import CRITIC_UPDATES, STREAMS, Schedule, Work, rehearse
from bench.cycle_models import (
    CHANNELS,
    SIZES,
    Data,
    Size,
    authors_cycle,
    make_authors,
    make_data,
    make_ours,
    make_source,
    random_transformer,
    steps_of,
)
from clora.distill import Distiller
from clora.routing import Stream

Figures = dict[str, Any]


def make_cycle(schedule: Schedule, data: Data, source: Distiller, device: str) -> Callable[[int], Callable[[], object]]:
    """A function from a step to its cycle, ready to run; `source` deals the batches of the authors' schedule."""
    if schedule == "ours":
        ours = make_ours(data, device)
        return lambda step: partial(ours.full_step, step)
    authors = make_authors(data, device)
    return lambda step: authors_cycle(authors, source, step)


def peak_memory(schedule: Schedule, size: Size, device: str) -> int:
    """Peak bytes of one schedule alone."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        peak: int = pool.submit(_peak_memory, schedule, size, device).result()
    return peak


def _peak_memory(schedule: Schedule, size: Size, device: str) -> int:
    torch.set_num_threads(1)
    # One critic update: more of them repeat the same. Two cycles: in the first, Adam's state is not there yet.
    data, source = make_data(size, 1), make_source(size, 1, device)
    before: int = psutil.Process().memory_info().rss
    cycle = make_cycle(schedule, data, source, device)
    for step in islice(steps_of(source, "effect"), 2):
        cycle(step)()
    if device == "cuda":
        return int(torch.cuda.max_memory_allocated())
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024 - before


def time_cycles(
    size: Size, schedules: Sequence[Schedule], steps: dict[Stream, list[int]], rounds: int, device: str
) -> dict[Schedule, dict[Stream, list[float]]]:
    """Seconds of each timed cycle by schedule and stream. The order of the schedules alternates."""
    data, source = make_data(size, CRITIC_UPDATES), make_source(size, CRITIC_UPDATES, device)
    cycles = {schedule: make_cycle(schedule, data, source, device) for schedule in schedules}
    seconds: dict[Schedule, dict[Stream, list[float]]] = {
        schedule: {stream: [] for stream in STREAMS} for schedule in schedules
    }
    for index in range(rounds + 1):  # the first warms up, for which one stream is enough
        for stream in STREAMS if index else STREAMS[:1]:
            for schedule in schedules if index % 2 else reversed(schedules):
                run = cycles[schedule](steps[stream][index])
                started = clock(device)
                run()
                if index:
                    seconds[schedule][stream].append(clock(device) - started)
    return seconds


def clock(device: str) -> float:
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def flops(size: Size) -> Work:
    """FLOPs of one sample's forward, and of the backward to its input, counted on a model without data."""
    transformer = random_transformer(size, "meta")
    tokens = torch.empty(1, size.sequence - size.text_tokens, CHANNELS, dtype=size.dtype, device="meta")
    text = torch.empty(1, size.text_tokens, size.text_width, dtype=size.dtype, device="meta")
    with FlopCounterMode(display=False) as forward:
        output = transformer(
            hidden_states=tokens.requires_grad_(),
            timestep=torch.empty(1, dtype=size.dtype, device="meta"),
            encoder_hidden_states=text,
            img_shapes=[[(1, *size.grid)] * 2],
            return_dict=False,
        )[0]
    with FlopCounterMode(display=False) as backward:
        output.sum().backward()
    return Work(forward.get_total_flops(), backward.get_total_flops())


def matmul_ceiling(size: Size, device: str) -> float:
    """FLOP/s of the transformer's widest product, median of ten."""
    # Fewer rows than these would measure the reading of the weight.
    rows, width = max(size.sequence, 512), size.width
    a = torch.randn(rows, width, dtype=size.dtype, device=device)
    b = torch.randn(width, 4 * width, dtype=size.dtype, device=device)
    seconds = []
    for _ in range(11):
        started = clock(device)
        torch.mm(a, b)
        seconds.append(clock(device) - started)
    return 2 * rows * width * 4 * width / statistics.median(seconds[1:])


def measure(size: Size, device: str, rounds: int) -> Figures:
    """Everything but the heading of the bench's document."""
    rehearsal = rehearse(size, device)
    schedules: list[Schedule] = ["ours", "authors"] if size.authors_fit else ["ours"]
    peaks = {schedule: peak_memory(schedule, size, device) for schedule in schedules}
    ceiling, flops_of = matmul_ceiling(size, device), flops(size)
    seconds = time_cycles(size, schedules, rehearsal.steps, rounds, device)
    rows = [
        row(size, rehearsal.cycle(schedule, stream), seconds[schedule][stream], flops_of, ceiling)
        | {"schedule": schedule, "stream": stream}
        for schedule in schedules
        for stream in STREAMS
    ]
    ratio: dict[str, float | None] = {"time": None, "peak_memory": None}
    if size.authors_fit:
        medians = {(one["schedule"], one["stream"]): one["median_s"] for one in rows}
        ours, authors = (sum(medians[schedule, stream] for stream in STREAMS) for schedule in schedules)
        ratio = {"time": round(ours / authors, 3), "peak_memory": round(peaks["ours"] / peaks["authors"], 3)}
        for stream in STREAMS:
            ratio[f"time_{stream}"] = round(medians["ours", stream] / medians["authors", stream], 3)
    return {
        "counts": {
            schedule: {kind: asdict(work) for kind, work in kinds.items()}
            for schedule, kinds in rehearsal.counts.items()
        },
        "ratio": ratio,
        "peak_memory_mb": {schedule: round(peak / 1e6) for schedule, peak in peaks.items()},
        "matmul_tflops": round(ceiling / 1e12, 3),
        "cycles": rows,
    }


def row(size: Size, work: Work, seconds: Sequence[float], flops_of: Work, ceiling: float) -> Figures:
    median = statistics.median(seconds)
    fifths = statistics.quantiles(seconds, n=5, method="inclusive")
    model_flops = work.forwards * flops_of.forwards + work.backwards * flops_of.backwards
    return {
        "median_s": round(median, 3),
        "p20_s": round(fifths[0], 3),
        "p80_s": round(fifths[3], 3),
        **asdict(work),
        "tokens_per_s": round((CRITIC_UPDATES + 1) * size.sequence / median, 1),
        "model_tflop": round(model_flops / 1e12, 3),
        "utilisation": round(model_flops / median / ceiling, 3),
    }


def report(document: Figures) -> None:
    print("{bench}, {size}, on {device}; matmul ceiling {matmul_tflops} TFLOP/s".format(**document))
    for schedule, kinds in document["counts"].items():
        cells = [f"{kind} {work['forwards']:g} F + {work['backwards']:g} B" for kind, work in kinds.items()]
        print(f"{schedule:8s} {', '.join(cells)}")
    for one in document["cycles"]:
        print(
            "{schedule:8s} {stream:8s} {median_s} s ({p20_s} to {p80_s})  {tokens_per_s} tokens/s"
            "  utilisation {utilisation:.0%}".format(**one)
        )
    peaks = [f"{schedule} {peak} MB" for schedule, peak in document["peak_memory_mb"].items()]
    print(f"peak memory: {', '.join(peaks)}")
    print(f"ours over the authors': {', '.join(f'{name} {value}' for name, value in document['ratio'].items())}")


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout instead of a table")
    parser.add_argument("--size", choices=SIZES, default="full-width-20" if device == "cuda" else "full-width-2")
    parser.add_argument("--rank", type=int, help="of all adapters, in place of the size's own")
    parser.add_argument("--quantize", choices=("none", "int8"), default="none", help="of our base")
    parser.add_argument("--rounds", type=int, help="timed cycles of each schedule and stream, at least 2")
    options = parser.parse_args()
    torch.set_num_threads(1)
    size = SIZES[options.size]
    size = replace(size, rank=options.rank or size.rank, quantize=options.quantize)
    rounds = max(2, options.rounds or size.rounds)
    document = {
        "bench": "train_cycle",
        "size": options.size,
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.machine(),
        "torch": torch.__version__,
        "dtype": str(size.dtype).removeprefix("torch."),
        "rank": size.rank,
        "quantize": size.quantize,
        "sequence": size.sequence,
        "rounds": rounds,
        **measure(size, device, rounds),
    }
    if options.json:
        print(json.dumps(document, indent=1))
    else:
        report(document)


if __name__ == "__main__":
    main()

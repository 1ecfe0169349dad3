"""One generator and five critic updates against the authors' schedule: `python -m bench.training.train_cycle [--json]`.

Ours is `clora.distill.step.full_step` with the preset `authors`, theirs `bench.training.authors_schedule`: the same
random transformer, adapters and data, at batch size 1, both checkpointing their blocks. No quality is claimed. Ours
runs twice: `exact` with a base of the same dtype and fp32 moments, and `lean` with `base.quantize: int8` and
`train.adam_moments: bfloat16`. Masters and gradients are fp32 in both; theirs are, with the moments, in the base's
dtype. `ratio` is the lean one's where it runs, `ratios` has both. In this order:

1. counts: both schedules on a transformer of one narrow layer, with hooks that count samples going forward and
   gradients coming back, until every exit step has been drawn. "mean" is over the exit steps, which are equally
   likely. Draws do not depend on the transformer, so this also tells which steps have cycles of average length.
2. peak memory: each run alone in a process of its own. On a CPU it is the growth of the resident set
   over what libraries and data take (the kernel's high-water mark; freed tensors are given back at once), on a GPU
   the allocator's peak.
3. time: cycles of average length, the runs in turns, effect and general stream in turn. On a CPU processor time of one
   thread, on a GPU wall time between synchronisations. `time` is of one cycle of each stream.

Encoding, which the authors repeat at every update, is left out of theirs on a CPU: at these sizes no encoder would be
of the right cost beside the transformer. On a GPU it is a random text encoder of Qwen2.5-VL's width, as deep beside
the transformer as the real one, without its vision tower and without the VAE.

Model FLOPs are those of a schedule's own forwards and backwards, without adapters and without recomputation.
`tokens_per_s` counts the sequence once for each of the six updates, whatever a schedule spends on it.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.training.cycle_counts import CRITIC_UPDATES, STREAMS, Schedule, Work, rehearse
from bench.training.cycle_models import (
    CHANNELS,
    LEAN,
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
from clora.distill.batches import Batches
from clora.distill.step import full_step
from clora.io.atomic import write_text
from clora.method.routing import Stream

Figures = dict[str, Any]
Run = Literal["lean", "exact", "authors"]
RUNS: tuple[Run, ...] = ("lean", "exact", "authors")


def size_of(run: Run, size: Size) -> Size:
    return replace(size, **LEAN) if run == "lean" else size


def make_cycle(run: Run, data: Data, source: Batches, device: str) -> Callable[[int], Callable[[], object]]:
    """A function from a step to its cycle, ready to run; `source` deals the batches of the authors' schedule."""
    if run != "authors":
        ours = make_ours(data, device)
        return lambda step: partial(full_step, ours, step)
    authors = make_authors(data, device)
    return lambda step: authors_cycle(authors, source, step)


def peak_memories(runs: Sequence[Run], size: Size, device: str) -> dict[Run, int]:
    """Peak bytes of each run alone; on a CPU two at a time."""
    workers = 2 if device == "cpu" else 1
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        # The largest first: the others share what time it takes.
        waiting = {run: pool.submit(_peak_memory, run, size, device) for run in reversed(runs)}
        return {run: waiting[run].result() for run in runs}


def _peak_memory(run: Run, size: Size, device: str) -> int:
    torch.set_num_threads(1)
    if device == "cpu":
        give_back_freed_memory()
    # One critic update of theirs: more of them repeat the same, while ours share a rollout. Two cycles of theirs: in
    # the first, torch's Adam has no state yet.
    updates, cycles = (1, 2) if run == "authors" else (CRITIC_UPDATES, 1)
    data, source = make_data(size_of(run, size), updates), make_source(size, updates, device)
    steps = list(islice(steps_of(source.batches, "effect"), cycles))
    full_step(source, steps[0])  # what libraries take when they are used
    before: int = psutil.Process().memory_info().rss
    cycle = make_cycle(run, data, source.batches, device)
    forget_peak(device)  # of loading: weights that are to be quantized would wait in CPU memory for a GPU
    for step in steps:
        cycle(step)()
    if device == "cuda":
        return int(torch.cuda.max_memory_allocated())
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024 - before


def give_back_freed_memory(at_least: int = 1 << 20) -> None:
    """Have glibc return what is freed to the system at once, from this size on, so that the resident set is that of
    live tensors, as a GPU allocator counts them, and not of holes between them."""
    M_MMAP_THRESHOLD = -3  # malloc.h; set by hand it no longer grows with what was freed
    if not ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, at_least):
        raise RuntimeError("glibc's mallopt does not take the threshold")


def forget_peak(device: str) -> None:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark; proc(5)


def time_cycles(
    size: Size, runs: Sequence[Run], steps: dict[Stream, list[int]], rounds: int, device: str
) -> dict[Run, dict[Stream, list[float]]]:
    """Seconds of each timed cycle by run and stream. The order of the runs alternates."""
    source = make_source(size, CRITIC_UPDATES, device).batches
    cycles = {run: make_cycle(run, make_data(size_of(run, size), CRITIC_UPDATES), source, device) for run in runs}
    seconds: dict[Run, dict[Stream, list[float]]] = {run: {stream: [] for stream in STREAMS} for run in runs}
    warm_up = device == "cuda"  # compiles and tunes; on a CPU a first cycle takes no longer than a second
    for index in range(rounds + warm_up):
        warm = warm_up and index == 0  # for which one stream is enough
        for stream in STREAMS[:1] if warm else STREAMS:
            for run in runs if index % 2 else reversed(runs):
                cycle = cycles[run](steps[stream][index])
                started = clock(device)
                cycle()
                if not warm:
                    seconds[run][stream].append(clock(device) - started)
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


def measure(size: Size, runs: Sequence[Run], device: str, rounds: int, keep: Callable[[Figures], None]) -> Figures:
    """Everything but the heading of the bench's document; `keep` is given what there is of it after each phase."""
    rehearsal = rehearse(size, device)
    found: Figures = {
        "counts": {
            schedule: {kind: asdict(work) for kind, work in kinds.items()}
            for schedule, kinds in rehearsal.counts.items()
        }
    }
    keep(found)
    peaks = peak_memories(runs, size, device)
    found["peak_memory_mb"] = {run: round(peak / 1e6) for run, peak in peaks.items()}
    keep(found)
    ceiling, flops_of = matmul_ceiling(size, device), flops(size)
    seconds = time_cycles(size, runs, rehearsal.steps, rounds, device)
    rows = [
        {"run": run, "stream": stream}
        | row(size, rehearsal.cycle(schedule_of(run), stream), seconds[run][stream], flops_of, ceiling)
        for run in runs
        for stream in STREAMS
    ]
    ratios = {run: ratio(run, rows, peaks) for run in runs if run != "authors"} if "authors" in runs else {}
    return {
        "counts": found["counts"],
        "ratio": ratios.get("lean", ratios.get("exact")),
        "ratios": ratios,
        "peak_memory_mb": found["peak_memory_mb"],
        "matmul_tflops": round(ceiling / 1e12, 3),
        "cycles": rows,
    }


def schedule_of(run: Run) -> Schedule:
    return "authors" if run == "authors" else "ours"


def ratio(run: Run, rows: Sequence[Figures], peaks: Mapping[Run, int]) -> dict[str, float]:
    """Time and peak memory of a run over the authors'."""
    medians = {(one["run"], one["stream"]): one["median_s"] for one in rows}
    ours, authors = (sum(medians[who, stream] for stream in STREAMS) for who in (run, "authors"))
    by_stream = {f"time_{stream}": medians[run, stream] / medians["authors", stream] for stream in STREAMS}
    found = {"time": ours / authors, "peak_memory": peaks[run] / peaks["authors"], **by_stream}
    return {name: round(value, 3) for name, value in found.items()}


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
            "{run:8s} {stream:8s} {median_s} s ({p20_s} to {p80_s})  {tokens_per_s} tokens/s"
            "  utilisation {utilisation:.0%}".format(**one)
        )
    peaks = [f"{run} {peak} MB" for run, peak in document["peak_memory_mb"].items()]
    print(f"peak memory: {', '.join(peaks)}")
    for run, figures in document["ratios"].items():
        print(f"{run} over the authors': {', '.join(f'{name} {value}' for name, value in figures.items())}")


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout instead of a table")
    parser.add_argument("--size", choices=SIZES, default="full-width-20" if device == "cuda" else "full-width-2")
    parser.add_argument("--rank", type=int, help="of all adapters, in place of the size's own")
    parser.add_argument(
        "--runs", nargs="+", choices=RUNS, help="all, on a GPU all but lean: what fits beside each other"
    )
    parser.add_argument("--rounds", type=int, help="timed cycles of each run and stream, at least 2")
    parser.add_argument("--out", type=Path, help="JSON file, written anew after each phase")
    options = parser.parse_args()
    torch.set_num_threads(1)
    size = SIZES[options.size]
    size = replace(size, rank=options.rank or size.rank)
    fitting = RUNS if size.authors_fit else RUNS[:2]
    if set(options.runs or ()) - set(fitting):
        parser.error(f"--runs: {options.size} has no authors' run; its three copies of the transformer fit nowhere")
    wanted = options.runs or (RUNS if device == "cpu" else RUNS[1:])
    runs = [run for run in fitting if run in wanted]
    rounds = max(2, options.rounds or size.rounds)
    started = time.perf_counter()
    heading = {
        "bench": "train_cycle",
        "size": options.size,
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.machine(),
        "torch": torch.__version__,
        "dtype": str(size.dtype).removeprefix("torch."),
        "rank": size.rank,
        "sequence": size.sequence,
        "rounds": rounds,
    }

    def keep(figures: Figures) -> None:
        if options.out is not None:
            write_text(options.out, json.dumps(heading | figures, indent=1) + "\n")

    document = heading | measure(size, runs, device, rounds, keep)
    document |= {"seconds": round(time.perf_counter() - started), "complete": True}
    keep(document)
    if options.json:
        print(json.dumps(document, indent=1))
    else:
        report(document)


if __name__ == "__main__":
    main()

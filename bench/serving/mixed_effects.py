"""Requests of 50 effects: one LoRA an effect, swapped, against one collection, alone and in step batches.

    python -m bench.serving.mixed_effects [--requests N] [--loads R ...] [--seeds 0 1] [--artefacts DIR] [--out FILE]

Every arm serves the same requests in their order. `saturated`: all are there from the start; arms take turns, `rounds`
times, so that a change of the machine's speed meets all; throughput by the clock, and CPU seconds of the process a
request, which other programs disturb less. `paced`: they arrive at random (Poisson) whether or not the ones before are
done, at each of `--loads`, a share of what `aoti` alone answers, and only for arms that answer more than arrive;
milliseconds from arrival to answer. `end_to_end`: saturated, with the encoding of image and prompt and the decoding:
one by one, or the images of eight requests at a time. One thread.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, closing
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from bench.serving.networks import (
    Request,
    make_requests,
    merged_loop,
    open_folders,
    sampling_of,
    slots_loop,
    swapping,
    write_effect_loras,
)
from clora.backbones.base import Backbone
from clora.backbones.cond import make_cond
from clora.backbones.load import load_backbone
from clora.export.verify import picture
from clora.inference.batching import StepBatcher
from clora.io.atomic import write_text

Serve = Callable[[Sequence[Request], Sequence[float]], list[float]]
"""(requests, their arrivals in seconds from the start) -> seconds from the start at which each was answered."""

AIMS = {"hotswap": 2.5, "delete_load": 3.5, "aoti": 1.12}  # of aoti_batch8's throughput over theirs


def one_by_one(run: Callable[[Request], Tensor]) -> Serve:
    """First come, first served."""

    def serve(requests: Sequence[Request], arrivals: Sequence[float]) -> list[float]:
        start, answered = time.perf_counter(), []
        for request, arrival in zip(requests, arrivals, strict=True):
            time.sleep(max(0.0, start + arrival - time.perf_counter()))
            run(request)
            answered.append(time.perf_counter() - start)
        return answered

    return serve


def batched(batcher: StepBatcher) -> Serve:
    """All are submitted when they arrive."""

    def serve(requests: Sequence[Request], arrivals: Sequence[float]) -> list[float]:
        start, answered = time.perf_counter(), [0.0] * len(requests)
        futures: list[Future[Tensor]] = []

        def note(number: int) -> Callable[[Future[Tensor]], None]:
            def answer(_: Future[Tensor]) -> None:
                answered[number] = time.perf_counter() - start

            return answer

        for number, (request, arrival) in enumerate(zip(requests, arrivals, strict=True)):
            time.sleep(max(0.0, start + arrival - time.perf_counter()))
            futures.append(batcher.submit(request.cond, seed=request.seed, effect=request.effect))
            futures[-1].add_done_callback(note(number))
        for future in futures:
            future.result()
        return answered

    return serve


def saturated(arms: dict[str, Serve], requests: list[Request], rounds: int) -> dict[str, Any]:
    """Requests a second and CPU milliseconds a request of each arm: the median over the rounds, and all of them."""
    rates: dict[str, list[float]] = {name: [] for name in arms}
    cpu: dict[str, list[float]] = {name: [] for name in arms}
    at_once = [0.0] * len(requests)
    for index in range(rounds + 1):  # the first warms up, with a few
        some = requests[:4] if index == 0 else requests
        for name, serve in arms.items():
            before, start = time.process_time(), time.perf_counter()
            serve(some, at_once[: len(some)])
            if index > 0:
                rates[name].append(len(some) / (time.perf_counter() - start))
                cpu[name].append((time.process_time() - before) / len(some) * 1e3)
    return {
        name: {
            "requests_per_second": round(statistics.median(rates[name]), 2),
            "cpu_ms": round(statistics.median(cpu[name]), 1),
            "rounds": [round(rate, 2) for rate in rates[name]],
            "cpu_rounds": [round(one, 1) for one in cpu[name]],
        }
        for name in arms
    }


def ratios(rows: dict[str, Any], to: str = "aoti_batch8") -> dict[str, Any]:
    """How many times the throughput of each other arm `to` has: of the medians, by the clock and by CPU time."""
    best = rows[to]
    return {
        name: {
            "clock": round(best["requests_per_second"] / row["requests_per_second"], 2),
            "cpu": round(row["cpu_ms"] / best["cpu_ms"], 2),
        }
        for name, row in rows.items()
        if name != to
    }


def paced(arms: dict[str, Serve], requests: list[Request], rate: float, seeds: Sequence[int]) -> dict[str, Any]:
    """p50 and p99 of the milliseconds from arrival to answer at `rate` arrivals a second, over all seeds' arrivals."""
    waits: dict[str, list[float]] = {name: [] for name in arms}
    for seed in seeds:
        gaps = torch.empty(len(requests)).exponential_(rate, generator=torch.Generator().manual_seed(seed))
        arrivals = gaps.cumsum(0).tolist()
        for name, serve in arms.items():
            answered = serve(requests, arrivals)
            waits[name] += [(end - begin) * 1e3 for begin, end in zip(arrivals, answered, strict=True)]
    quantiles = {name: statistics.quantiles(values, n=100, method="inclusive") for name, values in waits.items()}
    return {name: {"p50_ms": round(found[49], 1), "p99_ms": round(found[98], 1)} for name, found in quantiles.items()}


def paced_at(
    load: float, arms: dict[str, Serve], rows: dict[str, Any], requests: list[Request], seeds: Sequence[int]
) -> dict[str, Any]:
    """`paced` at this share of what `aoti` alone answers, for the arms that answer more."""
    rate = load * rows["aoti"]["requests_per_second"]
    fast = {name: serve for name, serve in arms.items() if rows[name]["requests_per_second"] > rate}
    return {"load": load, "rate": round(rate, 2), "rows": paced(fast, requests, rate, seeds)}


def end_to_end(
    backbone: Backbone,
    arms: dict[str, Callable[[Request], Tensor]],
    batcher: StepBatcher,
    requests: list[Request],
    rounds: int,
) -> dict[str, Any]:
    """`saturated` with encoders and decoder: `arms` one by one; the batcher with eight images encoded and decoded
    together. A request's condition is made anew from its picture and its effect's name."""
    images = [picture(number % 8) for number in range(len(requests))]

    def encode(numbers: Sequence[int]) -> list[Request]:
        given = [images[number] for number in numbers]
        texts = backbone.encode_prompts([requests[n].effect for n in numbers], [[image] for image in given])
        refs, grid = backbone.encode_references(given)
        size = backbone.output_size(given[0])
        return [
            Request(requests[n].effect, make_cond([texts[i]], [(refs[i : i + 1], grid)], backbone.grid(size)), n)
            for i, n in enumerate(numbers)
        ]

    @torch.no_grad()
    def alone(run: Callable[[Request], Tensor], count: int) -> None:
        for number in range(count):
            [request] = encode([number])
            backbone.to_pil(backbone.decode(run(request), request.cond.grid))

    @torch.no_grad()
    def together(count: int) -> None:
        futures: list[Future[Tensor]] = []
        for first in range(0, count, 8):
            made = encode(range(first, min(first + 8, count)))
            futures += [batcher.submit(one.cond, seed=one.seed, effect=one.effect) for one in made]
        for first in range(0, count, 8):
            x0_BTC = torch.stack([future.result() for future in futures[first : first + 8]])
            backbone.to_pil(backbone.decode(x0_BTC, requests[0].cond.grid))

    def as_serve(run: Callable[[int], None]) -> Serve:
        return lambda given, arrivals: [run(len(given))] and list(arrivals)  # type: ignore[func-returns-value]

    serves = {name: as_serve(lambda count, run=run: alone(run, count)) for name, run in arms.items()}
    return saturated(serves | {"aoti_batch8": as_serve(together)}, requests, rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout instead of a table")
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--loads", type=float, nargs="*", default=[0.5, 0.85], help="of what `aoti` alone answers")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--base", default="tiny")
    parser.add_argument("--artefacts", type=Path, help="folder in which artefacts are kept; by default they are not")
    parser.add_argument("--out", type=Path, help="file for the JSON document as well")
    options = parser.parse_args()
    torch.set_num_threads(1)
    document = measure(options)
    if options.out is not None:
        write_text(options.out, json.dumps(document, indent=1) + "\n")
    print(json.dumps(document, indent=1) if options.json else table(document))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    with ExitStack() as stack:
        opened = stack.enter_context(open_folders(options.artefacts, options.base, ("aoti", "merged")))
        aoti, sampling = opened["aoti"], sampling_of(opened["aoti"])
        encoders = load_backbone(options.base, "cpu", torch.float32, ("vae", "text_encoder"))
        requests = make_requests(encoders, aoti, options.requests, options.seeds[0])
        folder = Path(stack.enter_context(TemporaryDirectory()))
        files = write_effect_loras(options.base, [effect.name for effect in aoti.catalogue.effects], folder)
        runs: dict[str, Callable[[Request], Tensor]] = {
            "hotswap": swapping(options.base, files, True, sampling),
            "delete_load": swapping(options.base, files, False, sampling),
            "slots": slots_loop(options.base, sampling),
            "merged": merged_loop(opened["merged"].folder, sampling),
        }
        count = max(64, len(requests))
        batchers = {
            name: stack.enter_context(closing(StepBatcher.over_artefact(aoti, max_batch=most, max_queue=count)))
            for name, most in (("aoti", 1), ("aoti_batch8", 8))
        }
        arms = {name: one_by_one(run) for name, run in runs.items()}
        arms |= {name: batched(batcher) for name, batcher in batchers.items()}
        rows = saturated(arms, requests, options.rounds)
        stats = batchers["aoti_batch8"].stats()
        latency = [paced_at(load, arms, rows, requests, options.seeds) for load in options.loads]
        whole_runs = {name: runs[name] for name in ("hotswap", "delete_load", "merged")}
        whole = end_to_end(encoders, whole_runs, batchers["aoti_batch8"], requests, options.rounds)
        return {
            "bench": "mixed_effects",
            "torch": torch.__version__,
            "base": options.base,
            "requests": len(requests),
            "effects": len({request.effect for request in requests}),
            "tokens": [requests[0].cond.grid, max(request.cond.text_BLD.shape[1] for request in requests)],
            "rounds": options.rounds,
            "saturated": rows,
            "aoti_batch8_over": ratios(rows),
            "aims": AIMS,
            "saturated_batch_mean": round(stats["batch_mean"], 2),
            "saturated_effects_mean": round(stats["effects_mean"], 2),
            "seeds": options.seeds,
            "paced": latency,
            "end_to_end": whole,
            "end_to_end_aoti_batch8_over": ratios(whole),
            "complete": True,
        }


def table(document: dict[str, Any]) -> str:
    one = {"clock": 1.0, "cpu": 1.0}
    lines = [f"{'arm':>14} {'req/s':>8} {'cpu ms':>8} {'batch8 over it: clock, cpu':>27}"]
    for title, rows, over in (
        ("saturated", document["saturated"], document["aoti_batch8_over"]),
        ("end to end", document["end_to_end"], document["end_to_end_aoti_batch8_over"]),
    ):
        lines.append(f"{title}:")
        for name, row in rows.items():
            times = over.get(name, one)
            lines.append(
                f"{name:>14} {row['requests_per_second']:>8} {row['cpu_ms']:>8} {times['clock']:>20} {times['cpu']:>6}"
            )
    for latency in document["paced"]:
        lines.append(f"load {latency['load']}, {latency['rate']} arrivals a second:")
        lines += [f"{name:>14} p50 {row['p50_ms']} ms, p99 {row['p99_ms']} ms" for name, row in latency["rows"].items()]
    return "\n".join(lines)


if __name__ == "__main__":
    main()

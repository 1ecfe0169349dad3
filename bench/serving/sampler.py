"""What the sampling loop itself costs, compiled against Python: `python -m bench.serving.sampler [--json]`.

The velocity is a tensor made beforehand, so everything timed is the loop: noise, arithmetic, checks. The two
loops take turns round by round, so that a change of the machine's speed meets both. On stdout: microseconds
a step (median and quartiles over the rounds), as a table or, with --json, as one JSON document. `draw` is the
part that draws the noise, which both loops do alike.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from clora.io.atomic import write_text
from clora.method.flow import few_step_sigmas
from clora.method.samplers import few_step_sample, few_step_sample_ref, sample_noise

NUM_STEPS = 8
SHAPES = [(1, 64, 64), (8, 64, 64), (1, 1024, 64), (1, 4096, 64)]  # (B, T, C); the last is a 1024x1024 image


def microseconds_a_step(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) / NUM_STEPS * 1e6


def measure(shape_BTC: tuple[int, int, int], device: str, rounds: int) -> dict[str, Any]:
    """Median and quartiles of microseconds a step for each loop at one shape, and their ratio."""
    batch, *shape = shape_BTC
    shape_TC, seeds, sigmas = (shape[0], shape[1]), list(range(batch)), few_step_sigmas(NUM_STEPS)
    v = torch.full(shape_BTC, 0.5, device=device)

    def velocity(x: torch.Tensor, sigma: torch.Tensor, cond: None) -> torch.Tensor:
        return v

    loops: dict[str, Callable[[], object]] = {
        "compiled": lambda: few_step_sample(velocity, None, shape_TC, sigmas, seeds, device).cpu(),
        "python": lambda: few_step_sample_ref(velocity, None, shape_TC, sigmas, seeds, device).cpu(),
        "draw": lambda: [None for _ in sample_noise(seeds, NUM_STEPS, shape_TC)],
    }
    times: dict[str, list[float]] = {name: [] for name in loops}
    for index in range(rounds + 3):  # the first three warm up
        for name, run in loops.items():
            elapsed = microseconds_a_step(run)
            if index >= 3:
                times[name].append(elapsed)
    row: dict[str, Any] = {"batch": batch, "tokens": shape_TC[0], "channels": shape_TC[1]}
    for name, values in times.items():
        low, middle, high = statistics.quantiles(values, n=4)
        row[name] = {"median_us": round(middle, 1), "quartiles_us": [round(low, 1), round(high, 1)]}
    row["python_over_compiled"] = round(statistics.median(times["python"]) / statistics.median(times["compiled"]), 2)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout instead of a table")
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--size", choices=("small", "full"), default="full", help="small: the first shape alone")
    parser.add_argument("--out", type=Path, help="file for the JSON document as well")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    torch.set_num_threads(1)
    shapes = SHAPES[:1] if options.size == "small" else SHAPES
    rows = [measure(shape, options.device, options.rounds) for shape in shapes]
    name = torch.cuda.get_device_name() if options.device == "cuda" else platform.machine()
    document = {"bench": "sampler", "device": name, "torch": torch.__version__, "num_steps": NUM_STEPS}
    document |= {"rounds": options.rounds, "rows": rows, "complete": True}
    if options.out is not None:
        write_text(options.out, json.dumps(document, indent=1) + "\n")
    if options.json:
        print(json.dumps(document, indent=1))
        return
    print(f"{'batch x tokens x channels':>27}  {'compiled':>10}  {'python':>10}  {'draw':>10}")
    print(f"{'':>27}  {'microseconds a step (median)':>34}")
    for row in rows:
        figures = [row[name]["median_us"] for name in ("compiled", "python", "draw")]
        size = f"{row['batch']} x {row['tokens']} x {row['channels']}"
        print(f"{size:>27}  {figures[0]:>10}  {figures[1]:>10}  {figures[2]:>10}")


if __name__ == "__main__":
    main()

"""What the sampling loop itself costs, compiled against Python, and an image by each network.

    python -m bench.serving.sampler [--json] [--artefacts DIR]

The velocity is a tensor made beforehand, so everything timed is the loop: noise, arithmetic, checks. The two
loops take turns round by round, so that a change of the machine's speed meets both. On stdout: microseconds
a step (median and quartiles over the rounds), as a table or, with --json, as one JSON document. `draw` is the
part that draws the noise, which both loops do alike.

With `--artefacts DIR` (of `clora export`'s formats aoti and merged, made there where they are missing) also one image
of the tiny base at batch 1, in CPU milliseconds: the C++ loop over the AOTInductor package, the merged weights in stock
diffusers, and the collection in unmerged slots; arms take turns. With `--full-width` an image by a package of two
layers of the real width (random weights, bf16), beside eight calls of that package and nothing else.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from bench.serving.networks import (
    inputs_of,
    make_requests,
    merged_loop,
    open_folders,
    random_network,
    sampling_of,
    slots_loop,
)
from clora import _C
from clora.backbones.load import load_backbone
from clora.export.aoti import build_aoti, open_aoti
from clora.export.graph import example_inputs
from clora.export.manifest import Limits
from clora.io.atomic import write_text
from clora.method.flow import few_step_sigmas
from clora.method.samplers import (
    draw_noise,
    few_step_sample,
    few_step_sample_ref,
    noise_generators,
    pipeline_order,
    sample_noise,
)

NUM_STEPS = 8
WIDE_TOKENS = (64, 64, 32)  # of result, references and text
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


def measure_networks(place: Path, rounds: int) -> dict[str, Any]:
    """Median and quartiles of CPU milliseconds an image at batch 1, and how many times the C++ loop's the others take:
    the median over the rounds of each round's ratio."""
    with open_folders(place, "tiny", ("aoti", "merged")) as opened:
        aoti, sampling = opened["aoti"], sampling_of(opened["aoti"])
        encoders = load_backbone("tiny", "cpu", torch.float32, ("vae", "text_encoder"))
        [request] = make_requests(encoders, aoti, 1, 0)
        served = aoti.served()
        given, (h, w) = served.conditions(request.cond), request.cond.grid
        length = torch.tensor([given.text_len])

        def compiled() -> object:
            generators = noise_generators([request.seed])
            noise_BTC = pipeline_order(draw_noise(generators, (h * w, given.refs.shape[1])), (h, w))
            text, refs = given.text[None], given.refs[None]
            return _C.sample_engine(
                served.engine, noise_BTC, refs, text, given.cos, given.sin, length, generators, served.sigmas
            )

        merged, slots = merged_loop(opened["merged"].folder, sampling), slots_loop("tiny", sampling)
        arms = {"compiled": compiled, "merged": lambda: merged(request), "slots": lambda: slots(request)}
        times: dict[str, list[float]] = {name: [] for name in arms}
        for index in range(rounds + 2):  # the first two warm up
            for name, run in arms.items():
                start = time.process_time()
                run()
                if index >= 2:
                    times[name].append((time.process_time() - start) * 1e3)
    row: dict[str, Any] = {"tokens": [h * w, given.refs.shape[0], given.text_len, given.text.shape[0]]} | spread(times)
    for name in ("merged", "slots"):
        each = [other / own for other, own in zip(times[name], times["compiled"], strict=True)]
        row[f"{name}_over_compiled"] = round(statistics.median(each), 2)
    return row


def measure_full_width(rounds: int) -> dict[str, Any]:
    """Median and quartiles of milliseconds an image at batch 1 by the C++ loop and by the package called at every step,
    and their ratio: the median over the rounds of each round's."""
    network = random_network("full")
    given = inputs_of("full", WIDE_TOKENS)
    example = example_inputs(given[0].shape[2], given[2].shape[2], 2 * given[3].shape[1], torch.bfloat16)
    limits = Limits(batch=2, tokens=max(WIDE_TOKENS), text_buckets=(WIDE_TOKENS[2],))
    with TemporaryDirectory() as folder:
        build_aoti(network, example, limits, Path(folder))
        del network
        engine = open_aoti(Path(folder))
        x, refs, text, cos, sin, _, length = given
        steps, sigmas = [torch.tensor([step]) for step in range(NUM_STEPS)], few_step_sigmas(NUM_STEPS)

        def compiled() -> object:
            generators = noise_generators([0])
            noise_BTC = draw_noise(generators, tuple(x.shape[1:]))
            return _C.sample_engine(
                engine, noise_BTC, refs, text, cos, sin, length, generators, sigmas, dtype=torch.bfloat16
            )

        arms = {"compiled": compiled, "engine": lambda: [engine(x, refs, text, cos, sin, at, length) for at in steps]}
        times: dict[str, list[float]] = {name: [] for name in arms}
        for index in range(rounds + 1):  # the first warms up
            for name, run in arms.items():
                start = time.process_time()
                run()
                if index >= 1:
                    times[name].append((time.process_time() - start) * 1e3)
    row: dict[str, Any] = {"layers": 2, "tokens": list(WIDE_TOKENS), "rounds": rounds} | spread(times)
    each = [whole / own for whole, own in zip(times["compiled"], times["engine"], strict=True)]
    return row | {"compiled_over_engine": round(statistics.median(each), 4)}


def spread(times: dict[str, list[float]]) -> dict[str, Any]:
    """Median and quartiles of every arm's milliseconds."""
    rows = {}
    for name, values in times.items():
        low, middle, high = statistics.quantiles(values, n=4)
        rows[name] = {"median_ms": round(middle, 1), "quartiles_ms": [round(low, 1), round(high, 1)]}
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout instead of a table")
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--size", choices=("small", "full"), default="full", help="small: the first shape alone")
    parser.add_argument("--out", type=Path, help="file for the JSON document as well")
    parser.add_argument("--artefacts", type=Path, help="folder of artefacts: also times an image by each network")
    parser.add_argument("--full-width", action="store_true", help="also times two layers of the real width, on a CPU")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    torch.set_num_threads(1)
    shapes = SHAPES[:1] if options.size == "small" else SHAPES
    rows = [measure(shape, options.device, options.rounds) for shape in shapes]
    name = torch.cuda.get_device_name() if options.device == "cuda" else platform.machine()
    document = {"bench": "sampler", "device": name, "torch": torch.__version__, "num_steps": NUM_STEPS}
    document |= {"rounds": options.rounds, "rows": rows}
    if options.artefacts is not None:
        document["networks"] = measure_networks(options.artefacts, options.rounds)
    if options.full_width:
        document["full width"] = measure_full_width(min(options.rounds, 15))
    document["complete"] = True
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
    if (networks := document.get("networks")) is not None:
        print("CPU milliseconds an image, batch 1:")
        for name in ("compiled", "merged", "slots"):
            print(f"{name:>27}  {networks[name]['median_ms']:>10}  x {networks.get(f'{name}_over_compiled', 1.0)}")
    if (wide := document.get("full width")) is not None:
        print("CPU milliseconds an image of two layers of the real width, batch 1:")
        for name in ("compiled", "engine"):
            print(f"{name:>27}  {wide[name]['median_ms']:>10}")
        print(f"{'compiled / engine':>27}  {wide['compiled_over_engine']:>10}")


if __name__ == "__main__":
    main()

"""A served network as a TensorRT engine, and what eight bits cost: `python -m bench.serving.tensorrt [--size full]`.

At `--size full` two layers of the real width with random weights. Without a GPU the engine is built ahead of time
(`--target`, TensorRT for RTX) and not run; on one it is built by TensorRT, compared with the network in PyTorch, and
timed in turns with it. Where the libraries are not installed, the result says so. Last, FP8 and INT8 are simulated in
torch: the relative error of a velocity with every linear of the blocks rounded, and with the costliest tenth kept.
`--out` is written whenever there is more.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.serving.networks import CONFIGS, inputs_of, random_network
from clora.errors import InputError
from clora.export import onnx_graph
from clora.export.graph import example_inputs
from clora.export.manifest import Limits
from clora.export.quantize import NUMBERS, EightBits, choose, watched
from clora.export.tensorrt_engine import (
    ENGINE,
    EngineOptions,
    build_engine,
    check_engine,
    engine_profiles,
    open_engine,
    why_not_here,
)  # fmt: skip
from clora.io.atomic import write_text

TOKENS = {"small": (64, 64, 32), "full": (4096, 4096, 512)}  # of result, references and text
EIGHT_BIT_TOKENS = (48, 48, 16)


def eight_bits_cost(size: str, precision: EightBits) -> dict[str, Any]:
    network, inputs = random_network(size), inputs_of(size, EIGHT_BIT_TOKENS)
    with torch.no_grad(), watched(network) as most:
        network(*inputs)
    found = choose(network, most, [inputs], NUMBERS[precision])
    return {"layers": len(found.costs), "kept": found.kept, "cost_of_all": found.cost_of_all, "cost": found.cost}


def engine_results(size: str, target: str | None, rounds: int) -> Iterator[dict[str, Any]]:
    """As they come: seconds to build and bytes, or why there is none; then, where it runs, error and milliseconds
    beside the network in PyTorch, or why it does not."""
    if target is None and not torch.cuda.is_available():
        target = "SM89"
    options = EngineOptions(target)
    try:
        onnx_graph.check_onnx()
        check_engine(options)
    except InputError as error:
        yield {"why_none": str(error)}
        return
    tokens = TOKENS[size]
    config = CONFIGS[size]
    widths = (64, config.get("joint_attention_dim", 3584), config.get("attention_head_dim", 128))
    traced = example_inputs(*widths, torch.bfloat16)
    limits = Limits(batch=2, tokens=tokens[0], text_buckets=(tokens[2],))
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        network = random_network(size, onnx_graph.rotate)
        onnx_graph.build_onnx(network, traced, limits, folder)
        started = time.perf_counter()
        engine = build_engine(folder / onnx_graph.GRAPH, engine_profiles(limits, tokens[0]), options, folder)
        built = {"seconds": time.perf_counter() - started, "bytes": (folder / ENGINE).stat().st_size}
        yield {"engine": engine.model_dump(), "build": built}
        if why := why_not_here(engine):
            yield {"why_not_run": why}
        else:
            yield run_beside(
                open_engine(folder, engine, torch.device("cuda")), random_network(size), inputs_of(size, tokens), rounds
            )


@torch.no_grad()
def run_beside(
    run: Callable[..., Tensor], network: nn.Module, inputs: tuple[Tensor, ...], rounds: int
) -> dict[str, Any]:
    """The engine and the network in PyTorch in turns, both on the GPU; the engine's inputs are copied there."""
    network, on_gpu = network.cuda(), tuple(value.cuda() for value in inputs)
    truth = network.float()(*(value.float() if value.is_floating_point() else value for value in on_gpu))
    network = network.bfloat16()
    ways = {"engine": lambda: run(*on_gpu), "torch": lambda: network(*on_gpu)}
    errors = {name: ((way().float() - truth).abs().max() / truth.abs().max()).item() for name, way in ways.items()}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            torch.cuda.synchronize()
            started = time.perf_counter()
            way()
            torch.cuda.synchronize()
            times[name].append(1e3 * (time.perf_counter() - started))
    return {"errors": errors, "median_ms": {name: statistics.median(taken) for name, taken in times.items()}}


def phases(size: str, target: str | None, rounds: int) -> Iterator[dict[str, Any]]:
    """What the result gains, in order of value: a machine's time may end before the simulations do."""
    yield from engine_results(size, target, rounds)
    simulated: dict[str, Any] = {}
    for precision in NUMBERS:
        simulated[precision] = eight_bits_cost(size, precision)
        yield {"simulated": simulated}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=[*CONFIGS], default="small")
    parser.add_argument("--target", help="compute capability to build ahead of time for, as in SM89")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    document: dict[str, Any] = {"size": options.size}
    for found in phases(options.size, options.target, options.rounds):
        document |= found
        if options.out:
            write_text(options.out, json.dumps(document, indent=1) + "\n")
    print(json.dumps(document, indent=1))
    errors = document.get("errors")
    if errors and not errors["engine"] <= 2 * errors["torch"]:
        raise SystemExit("the engine is more than twice as far from fp32 as PyTorch in bf16")


if __name__ == "__main__":
    main()

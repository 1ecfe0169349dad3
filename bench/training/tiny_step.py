"""What a training step of the tiny base costs by number type and attention.

`python -m bench.training.tiny_step [--json]`.

Forward, and forward with backward, of one batch of 24 samples through an adapter of rank 32; the variants take turns
round by round. Figures are milliseconds of processor time a sample (median) on one thread, or of the GPU's time.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from clora.backbones.base import Backbone
from clora.backbones.cond import Cond, make_cond
from clora.backbones.load import load_backbone
from clora.io.atomic import write_text

BATCH, GRID, WIDTH, RANK = 24, (8, 8), 96, 32
SLOT = "student"
VARIANTS = [(dtype, attention) for dtype in ("float32", "bfloat16") for attention in ("native", "_native_math")]


def make_backbone(dtype: str, attention: str, device: str) -> Backbone:
    backbone = load_backbone("tiny", device, getattr(torch, dtype), ("transformer",))
    backbone.transformer.set_attention_backend(attention)
    generator = torch.Generator().manual_seed(0)
    adapters = backbone.add_adapters()
    adapters.add_stack(SLOT, [SLOT], RANK, RANK, trainable=True, init="lora", generator=generator)
    return backbone


def make_inputs(device: str, batch: int) -> tuple[torch.Tensor, torch.Tensor, Cond]:
    """Latents, sigma and a cond of prompts of 22 to 27 tokens with one reference image."""
    texts = [torch.randn(22 + i % 6, WIDTH, device=device) for i in range(batch)]
    latents = torch.randn(2, batch, GRID[0] * GRID[1], 64, device=device)
    return latents[0], torch.rand(batch, device=device), make_cond(texts, [(latents[1], GRID)], GRID)


def clock(device: str) -> float:
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def measure(device: str, rounds: int, batch: int) -> list[dict[str, Any]]:
    """One row a variant."""
    x, sigma, cond = make_inputs(device, batch)
    backbones = {variant: make_backbone(*variant, device) for variant in VARIANTS}
    times: dict[tuple[str, str], list[tuple[float, float]]] = {variant: [] for variant in VARIANTS}
    for index in range(rounds + 1):
        for variant, backbone in backbones.items():
            started = clock(device)
            loss = backbone.velocity(x, sigma, cond, [SLOT]).square().mean()
            forward = clock(device)
            loss.backward()
            if index:  # the first warms up
                times[variant].append((forward - started, clock(device) - started))
    rows = []
    for (dtype, attention), values in times.items():
        forward_ms, both_ms = (round(statistics.median(v) / batch * 1e3, 2) for v in zip(*values, strict=True))
        rows.append({"dtype": dtype, "attention": attention, "forward_ms": forward_ms, "with_backward_ms": both_ms})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--size", choices=("small", "full"), default="full", help="small: two samples, not 24")
    parser.add_argument("--out", type=Path, help="file for the JSON document as well")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = measure(arguments.device, arguments.rounds, 2 if arguments.size == "small" else BATCH)
    name = torch.cuda.get_device_name() if arguments.device == "cuda" else platform.machine()
    document = {"bench": "tiny_step", "device": name, "torch": torch.__version__, "rows": rows, "complete": True}
    if arguments.out is not None:
        write_text(arguments.out, json.dumps(document, indent=1) + "\n")
    if arguments.json:
        print(json.dumps(document, indent=1))
        return
    for row in rows:
        print(
            "{dtype:9s} {attention:13s} forward {forward_ms:6.2f} ms, with backward {with_backward_ms:6.2f} ms".format(
                **row
            )
        )


if __name__ == "__main__":
    main()

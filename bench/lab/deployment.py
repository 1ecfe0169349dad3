"""What does it cost to keep many LoRAs ready? `python -m bench.lab.deployment [--size-gb 2.4] [--figures F]`.

The paper's Table 2, offline: 200 queries for effects drawn at random, served one after the other by a bank of one LoRA
an effect, or by collections of up to 50. A query is an effect's full prompt; the router finds its LoRA by the criteria
(`clora.evaluate.router`; the paper asks a vision model, which takes seconds). A file is loaded when it is not the one
that was used last. Loading is timed on real files of the size given, all bytes read into memory: *cold*, their pages
dropped from the cache before, and *warm*. The world has 76 effects, so that beyond them only files are counted.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from bench.lab.study import machine, write_figures
from clora.evaluate.router import route
from clora.tiny.dataset import effect_names
from clora.tiny.effects import EFFECTS

COUNTS = (10, 20, 50, 76, 100, 150)
QUERIES = 200
PER_COLLECTION = 50
TENSOR = 3072 * 128  # elements of one matrix: a linear of Qwen-Image-Edit at rank 128


def switches(files: Sequence[int]) -> int:
    """How often another file is needed than the one before; the first is one."""
    return sum(k == 0 or file != files[k - 1] for k, file in enumerate(files))


def serve(count: int, seed: int = 0) -> dict[str, Any]:
    """Queries over `count` effects: routing (None beyond the world's effects), and loads by either way of deploying."""
    asked = np.random.default_rng((seed, count)).integers(0, count, QUERIES).tolist()
    groups = 1 + (count - 1) // PER_COLLECTION
    row: dict[str, Any] = {"effects": count, "collections": groups}
    found = list(asked)
    if count <= len(EFFECTS):
        names = effect_names(count)
        bank = {name: EFFECTS[name].criteria for name in names}
        since = time.perf_counter()
        found = [names.index(route(EFFECTS[names[one]].student_prompt, bank)) for one in asked]
        row["routing_ms"] = round(1e3 * (time.perf_counter() - since) / QUERIES, 3)
        row["routed_right"] = float(np.mean([a == b for a, b in zip(asked, found, strict=True)]))
        right = [a // PER_COLLECTION == b // PER_COLLECTION for a, b in zip(asked, found, strict=True)]
        row["routed_right_collections"] = float(np.mean(right))
    row["switches"] = switches(found)
    row["switches_collections"] = 0 if groups == 1 else switches([one // PER_COLLECTION for one in found])
    return row


def write_file(path: Path, gigabytes: float, seed: int) -> None:
    """A LoRA-like safetensors file: bfloat16 matrices of a rank-128 LoRA, as many as fill it."""
    number = max(1, round(gigabytes * 1e9 / (2 * TENSOR)))
    values = torch.randn(TENSOR, generator=torch.Generator().manual_seed(seed)).bfloat16().view(128, 3072)
    save_file({f"module.{k}.lora_A.weight": values + k for k in range(number)}, path)
    with path.open("rb") as file:
        os.fsync(file.fileno())  # pages that are not on the disk yet cannot be dropped


def load_seconds(path: Path, cold: bool) -> float:
    """Seconds to have a file's tensors in memory of their own."""
    with path.open("rb") as file:
        if cold:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    since = time.perf_counter()
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    seconds = time.perf_counter() - since
    assert tensors
    return seconds


def time_loads(gigabytes: float, repeats: int = 3) -> dict[str, Any]:
    """Median seconds of a load, cold and warm, over two files in turn."""
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder:
        paths = [Path(folder) / f"{k}.safetensors" for k in range(2)]
        for k, path in enumerate(paths):
            write_file(path, gigabytes, k)
        size = paths[0].stat().st_size / 1e9
        cold = [load_seconds(path, True) for _ in range(repeats) for path in paths]
        warm = [load_seconds(path, False) for _ in range(repeats) for path in paths]
    found = {"cold_s": cold, "warm_s": warm}
    return {"file_gb": round(size, 4)} | {key: round(statistics.median(times), 4) for key, times in found.items()}


def table(gigabytes: float) -> dict[str, Any]:
    """All of it. Storage and loading are those of files of this size."""
    loads = time_loads(gigabytes)
    rows = []
    for count in COUNTS:
        row = serve(count)
        for kind in ("cold", "warm"):
            for suffix in ("", "_collections"):
                row[f"loading_{kind}_s{suffix}"] = round(row[f"switches{suffix}"] * loads[f"{kind}_s"], 1)
        row["storage_gb"] = round(count * loads["file_gb"], 2)
        row["storage_gb_collections"] = round(row["collections"] * loads["file_gb"], 2)
        rows.append(row)
    return {"queries": QUERIES, "per_collection": PER_COLLECTION, "load": loads, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size-gb", type=float, default=2.4, help="of a file; two are written and removed")
    parser.add_argument("--figures", type=Path, help="write the table as JSON")
    arguments = parser.parse_args()
    write_figures(arguments.figures, table(arguments.size_gb) | {"machine": machine()})


if __name__ == "__main__":
    main()

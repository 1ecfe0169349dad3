"""Do several processes give the rows of one? `python -m bench.lab.sharded --run DIR [--images 5000] [--figures F]`.

The tiny base's collection in one step on many scenes and seeds, once by `clora eval` in one process and once under
torchrun on two. Every picture must have the same bytes and every row the same values; only seconds may differ. Batches
are of one picture, since a larger batch's sums depend on who shares it.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

from bench.lab.study import machine, write_figures
from clora.config import collection_lora
from clora.lora.catalogue import read_catalogue
from clora.tiny.dataset import write_eval_sources

SEEDS = 10
PROCESSES = 2


def write_bench(run: Path, images: int) -> tuple[Path, Path]:
    """A benchmark of about so many results; two files that differ in where they go."""
    collection = collection_lora("tiny")
    assert collection is not None
    names = [effect.name for effect in read_catalogue(collection).effects]
    names = names[: max(1, min(len(names), images // SEEDS))]
    write_eval_sources(run / "scenes", max(1, round(images / len(names) / SEEDS)))
    bench = {
        "base": "tiny",
        "batch_size": 1,
        "seeds": list(range(SEEDS)),
        "effects": [{"name": name, "instruction": name} for name in names],
        "images": {"any": "scenes"},
        "methods": [{"name": "collection", "lora": str(collection), "steps": 1}],
    }
    paths = []
    for out in ("one", "many"):
        paths.append(run / f"{out}.yaml")
        paths[-1].write_text(yaml.safe_dump(bench | {"output_dir": out}, sort_keys=False))
    return paths[0], paths[1]


def evaluate(path: Path, processes: int) -> float:
    """Run `clora eval` on so many processes; returns seconds."""
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes)] if processes > 1 else []
    started = time.perf_counter()
    line = [sys.executable, *launcher, "-m", "clora", "eval", str(path), "--json"]
    subprocess.run(line, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def compare(one: Path, many: Path) -> dict[str, int]:
    """How many rows there are, and how many differ in a value or in their picture's bytes."""
    tables = []
    for folder in (one, many):
        with (folder / "rows.csv").open(newline="") as file:
            tables.append(
                [{key: value for key, value in row.items() if key != "seconds"} for row in csv.DictReader(file)]
            )
    if len(tables[0]) != len(tables[1]):
        raise SystemExit(f"{len(tables[0])} rows of one process, {len(tables[1])} of {PROCESSES}")
    pairs = list(zip(*tables, strict=True))
    pictures = [(one / a["path"]).read_bytes() != (many / b["path"]).read_bytes() for a, b in pairs]
    return {
        "rows": len(pairs),
        "rows that differ": sum(a != b for a, b in pairs),
        "pictures that differ": sum(pictures),
    }


def run(folder: Path, images: int) -> dict[str, Any]:
    """Both runs below `folder`, compared."""
    one, many = write_bench(folder, images)
    seconds = {"one process": evaluate(one, 1), f"{PROCESSES} processes": evaluate(many, PROCESSES)}
    figures: dict[str, Any] = compare(folder / "one", folder / "many")
    shared = [len(path.read_text().splitlines()) for path in sorted((folder / "many").glob("seconds-*.jsonl"))]
    return figures | {"made by each": shared, "seconds": {key: round(value, 1) for key, value in seconds.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--figures", type=Path, help="write the figures as JSON")
    arguments = parser.parse_args()
    figures = run(arguments.run.resolve(), arguments.images)
    write_figures(arguments.figures, figures | {"machine": machine()})
    if figures["rows that differ"] or figures["pictures that differ"]:
        raise SystemExit(json.dumps(figures))


if __name__ == "__main__":
    main()

"""A long overload: `python -m bench.serving.overload [--seconds 60] [--queue 4] [--json] [--out FILE]`.

One request at a time; then so many seconds of clients that arrive at random at three times the capacity, whatever the
answers; then one request at a time again until one takes no longer than the longest before. Claim: nothing but 200, 429
and 503, none without an answer, the memory of both processes flat, the capacity's 90 % made, and within 5 s of the last
arrival as quick as before. That last one is a matter of `max_queue`: what is in the queue is made first.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

import psutil

from bench.serving.load import prepared, row, running, settings_file
from clora.io.atomic import write_text

TIMES = 3.0
ALONE = 12
BATCH = 4
Answers = list[tuple[int, float]]  # status and seconds


def memory_mb(pid: int) -> int:
    """Resident memory of a server and its engine."""
    server = psutil.Process(pid)
    return round(sum(one.memory_info().rss for one in (server, *server.children())) / 1e6)


async def timed(work: Awaitable[Answers]) -> tuple[Answers, float]:
    """What `work` gives, and the seconds that it took."""
    started = time.perf_counter()
    found = await work
    return found, time.perf_counter() - started


async def measure(address: str, pid: int, seconds: float, seed: int) -> dict[str, Any]:
    async with prepared(address, seed) as client:
        await client.capacity(5)
        capacity = await client.capacity(20)
        alone = [(await client.edit())[1] for _ in range(ALONE)]
        sizes = [memory_mb(pid)]
        started = time.perf_counter()
        arriving = asyncio.create_task(timed(client.open_loop(TIMES * capacity, seconds)))
        while time.perf_counter() - started < seconds:
            await asyncio.sleep(1)
            sizes.append(memory_mb(pid))
        over = time.perf_counter()
        while True:
            status, took = await client.edit()
            if status == 200 and took <= max(alone):
                break
            await asyncio.sleep(0.1)
        normal = time.perf_counter() - over
        # Until the last answer: those accepted last are made after the last arrival.
        answers, in_all = await arriving
        found = row(TIMES, answers, in_all)
        await asyncio.sleep(2)
        sizes.append(memory_mb(pid))
    return {
        "capacity_per_s": round(capacity, 2),
        **{name: found[name] for name in ("requests", "made", "refused", "lost", "other", "p50_ms", "p99_ms")},
        "goodput_of_capacity": round(found["goodput_per_s"] / capacity, 3),
        "alone_ms": round(statistics.median(alone) * 1000),
        "alone_most_ms": round(max(alone) * 1000),
        "seconds_until_normal": round(normal, 2),
        "memory_mb": {"before": sizes[0], "after_10_s": sizes[10], "most": max(sizes), "after": sizes[-1]},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="*", help="of `clora serve`, with more of its options; default: the tiny base's")
    parser.add_argument("--seconds", type=float, default=60, help="of overload, 15 at least")
    parser.add_argument("--queue", type=int, default=4, help="samples that wait, at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout, in one line")
    parser.add_argument("--out", type=Path, help="file for the JSON document as well")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        config = settings_file(Path(folder), batches={"max_queue": options.queue, "denoise": BATCH})
        with running([*options.model, "--config", str(config)]) as (address, pid):
            found = asyncio.run(measure(address, pid, max(15.0, options.seconds), options.seed))
    document = {"bench": "overload", "machine": f"{platform.machine()}, {os.cpu_count()} cores"}
    document |= {"model": options.model or ["tiny"], "seconds": options.seconds, "queue": options.queue}
    document |= {"batch": BATCH, **found}
    if options.out is not None:
        write_text(options.out, json.dumps(document, indent=1) + "\n")
    print(json.dumps(document, indent=None if options.json else 1))


if __name__ == "__main__":
    main()

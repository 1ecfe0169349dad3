"""What a server does under load: `python -m bench.serving.load [ARTEFACT|COLLECTION] [--seconds S] [--json]`.

The command `clora serve` runs in a process of its own; its capacity is measured with as many clients at once as it
batches, each asking again as soon as it is answered. Then clients arrive at random (Poisson, whatever the answers), at
0.5, 0.85, 1 and 3 times that rate, each for one picture of a random effect. Claim: beyond capacity the server refuses
(429 or 503, with Retry-After), loses nothing, and goes on answering at about its capacity. Latencies hold everything:
upload, queue, encoders, sampling, decoder, base64. Client and server share the machine's cores.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import httpx
from PIL import Image

from clora.io.atomic import write_text

LOADS = (0.5, 0.85, 1.0, 3.0)
CLIENTS = 8
QUEUE = 16  # samples that wait, at most: a longer queue makes overload a matter of waiting
TIMEOUT = 120.0


@contextmanager
def running(arguments: Sequence[str]) -> Iterator[tuple[str, int]]:
    """Address and process of a `clora serve` on a free port, ended by SIGTERM; raises where it does not end with 0."""
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    settings = ["--port", "0", *arguments]
    command = [sys.executable, "-m", "clora", "serve", *settings]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stderr is not None
        lines = []
        for line in process.stderr:
            lines.append(line)
            if found := re.search(r"effects at (http://\S+)/", line):
                break
        else:
            raise SystemExit("".join(lines))
        # Read on, so that the server never waits for the pipe.
        threading.Thread(target=process.stderr.read, daemon=True).start()
        yield found[1], process.pid
        process.terminate()
        if process.wait(60) != 0:
            raise SystemExit(f"the server ended with {process.returncode}")


class Client:
    """Asks for edits of one picture and notes status and seconds of each; 0 is a request without an answer."""

    def __init__(self, http: httpx.AsyncClient, effects: Sequence[str], seed: int) -> None:
        self.http, self.effects, self.rng = http, effects, random.Random(seed)
        buffer = io.BytesIO()
        Image.effect_noise((64, 64), 64).convert("RGB").save(buffer, "PNG")
        self.image = buffer.getvalue()

    async def edit(self) -> tuple[int, float]:
        data = {"effect": self.rng.choice(self.effects), "seed": str(self.rng.randrange(2**31))}
        started = time.perf_counter()
        try:
            answer = await self.http.post("/v1/images/edits", data=data, files={"image": self.image})
        except httpx.HTTPError:
            return 0, time.perf_counter() - started
        return answer.status_code, time.perf_counter() - started

    async def capacity(self, seconds: float) -> float:
        """Edits a second with `CLIENTS` clients that never pause."""
        end, done = time.perf_counter() + seconds, 0

        async def one() -> None:
            nonlocal done
            while time.perf_counter() < end:
                status, _ = await self.edit()
                done += status == 200

        started = time.perf_counter()
        await asyncio.gather(*(one() for _ in range(CLIENTS)))
        return done / (time.perf_counter() - started)

    async def open_loop(self, rate: float, seconds: float) -> list[tuple[int, float]]:
        """The answers to clients that arrive at `rate` a second, whatever becomes of those before them."""
        started, moment, tasks = time.perf_counter(), 0.0, []
        while (moment := moment + self.rng.expovariate(rate)) < seconds:
            await asyncio.sleep(max(0.0, started + moment - time.perf_counter()))
            tasks.append(asyncio.create_task(self.edit()))
        return await asyncio.gather(*tasks)


@asynccontextmanager
async def prepared(address: str, seed: int) -> AsyncIterator[Client]:
    """A client of a server that has nothing else to do: the catalogue's pictures are made."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=address, timeout=TIMEOUT, limits=limits) as http:
        while True:
            effects = (await http.get("/v1/effects")).json()["data"]
            if all(effect["after"] for effect in effects):
                break
            await asyncio.sleep(1)
        yield Client(http, [effect["id"] for effect in effects], seed)


def settings_file(folder: Path, **settings: Any) -> Path:
    """Settings without quotas, in a file."""
    limits = {"concurrent": 10_000, "requests_per_minute": 1_000_000, "burst": 1_000_000}
    path = folder / "serve.yaml"
    path.write_text(json.dumps({"limits": limits, **settings}))  # JSON is YAML
    return path


async def measure(address: str, seconds: float, seed: int) -> tuple[float, list[dict[str, Any]]]:
    """The capacity in edits a second, and a row for each load."""
    async with prepared(address, seed) as client:
        await client.capacity(seconds / 4)
        capacity = await client.capacity(seconds)
        rows = []
        for load in LOADS:
            started = time.perf_counter()
            answers = await client.open_loop(load * capacity, seconds)
            rows.append(row(load, answers, time.perf_counter() - started))
    return capacity, rows


def row(load: float, answers: Sequence[tuple[int, float]], seconds: float) -> dict[str, Any]:
    """One load's figures; goodput counts the edits made until the last answer."""
    made = sorted(took for status, took in answers if status == 200)
    counts = Counter(status for status, _ in answers)
    found: dict[str, Any] = {"load": load, "requests": len(answers), "made": len(made)}
    found |= {"refused": counts[429] + counts[503], "lost": counts[0]}
    found["other"] = len(answers) - len(made) - found["refused"] - found["lost"]
    found["goodput_per_s"] = round(len(made) / seconds, 2)
    if len(made) > 1:
        cuts = statistics.quantiles(made, n=100, method="inclusive")
        found |= {"p50_ms": round(cuts[49] * 1000), "p99_ms": round(cuts[98] * 1000)}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="*", help="of `clora serve`, with more of its options; default: the tiny base's")
    parser.add_argument("--engine", choices=("process", "thread"), default="process")
    parser.add_argument("--seconds", type=float, default=15, help="of each load")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout instead of a table")
    parser.add_argument("--out", type=Path, help="file for the JSON document as well")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        config = settings_file(Path(folder), batches={"max_queue": QUEUE}, engine=options.engine)
        with running([*options.model, "--config", str(config)]) as (address, _):
            capacity, rows = asyncio.run(measure(address, options.seconds, options.seed))
    document = {"bench": "load", "machine": f"{platform.machine()}, {os.cpu_count()} cores", "seconds": options.seconds}
    document |= {"engine": options.engine, "model": options.model or ["tiny"]}
    document |= {"capacity_per_s": round(capacity, 2), "rows": rows}
    if options.out is not None:
        write_text(options.out, json.dumps(document, indent=1) + "\n")
    if options.json:
        print(json.dumps(document))
        return
    print(f"capacity {capacity:.2f} edits/s")
    print(" ".join(f"{name:>13}" for name in rows[0]))
    for one in rows:
        print(" ".join(f"{one.get(name, '-'):>13}" for name in rows[0]))


if __name__ == "__main__":
    main()

"""Two replicas of examples/ray under load, one of them killed: what it worked on gets 503, and all else is made."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest

from tests.serve.conftest import png
from tests.serve.test_edits import pixels
from tests.test_house import ROOT

EXAMPLE = ROOT / "examples" / "ray" / "serve_app.py"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs ray (pip install 'ray[serve]')"),
]


@pytest.fixture(scope="module")
def cluster(small_base: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, int]]:
    """The address and the process of the example."""
    base, collection = small_base
    folder = tmp_path_factory.mktemp("ray")
    limits = {"burst": 10_000, "requests_per_minute": 100_000, "concurrent": 1000}
    settings = {"base": str(base), "collection": str(collection), "dtype": "float32", "thumbnails": False}
    settings |= {"batches": {"encode": 1, "decode": 1, "max_queue": 4, "denoise": 2}, "limits": limits}
    (folder / "serve.yaml").write_text(json.dumps(settings | {"engine": "thread"}))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(EXAMPLE), "--config", str(folder / "serve.yaml")]
    command += ["--port", str(port), "--queue", "64"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0", "RAY_DEDUP_LOGS": "0"}
    environment |= {"PYTHONPATH": str(ROOT)}
    log = (folder / "log").open("w")
    process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
    address, started = f"http://127.0.0.1:{port}", [process.pid]
    try:
        began = time.monotonic()
        while not is_ready(address) or len(replicas(process.pid)) < 2:
            assert process.poll() is None and time.monotonic() - began < 200, (folder / "log").read_text()[-4000:]
            time.sleep(0.5)
        yield address, process.pid
    finally:
        with suppress(psutil.NoSuchProcess):  # it has failed to start
            started += [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
        process.send_signal(signal.SIGINT)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
        for pid in started:
            if psutil.pid_exists(pid):
                psutil.Process(pid).kill()


IN_FLIGHT = 6  # of a replica, at most: max_ongoing_requests


def replicas(pid: int) -> list[psutil.Process]:
    """The processes of replicas among those that a process started."""
    found = []
    for child in psutil.Process(pid).children(recursive=True):
        try:
            if "ray::ServeReplica" in " ".join(child.cmdline()):
                found.append(child)
        except psutil.NoSuchProcess:
            continue
    return found


def is_ready(address: str) -> bool:
    try:
        return httpx.get(f"{address}/readyz").status_code == 200
    except httpx.HTTPError:
        return False


def test_a_killed_replica_loses_what_it_worked_on_alone(cluster: tuple[str, int]) -> None:
    address, pid = cluster

    async def run() -> tuple[list[Any], httpx.Response, list[httpx.Response]]:
        async with httpx.AsyncClient(base_url=address, timeout=90) as client:

            async def edit(number: int) -> httpx.Response:
                data = {"effect": "ab"[number % 2], "seed": str(number)}
                return await client.post("/v1/images/edits", data=data, files={"image": png()})

            alone = await edit(1)
            tasks = [asyncio.create_task(edit(number)) for number in range(40)]
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            os.kill(replicas(pid)[0].pid, signal.SIGKILL)
            answers = await asyncio.gather(*tasks, return_exceptions=True)
            return answers, alone, [await edit(1) for _ in range(4)]

    answers, alone, again = asyncio.run(run())
    statuses = [0 if isinstance(answer, httpx.HTTPError) else answer.status_code for answer in answers]
    assert alone.status_code == 200 and len(statuses) == 40
    # Those that waited go to the other replica.
    assert set(statuses) == {200, 503} and statuses.count(503) <= IN_FLIGHT, statuses
    for answer in answers:
        if answer.status_code == 503:
            assert is_ours(answer)
    for answer in again:
        assert np.array_equal(pixels(answer), pixels(alone))
    began = time.monotonic()
    while len(replicas(pid)) < 2:
        assert time.monotonic() - began < 120
        time.sleep(0.5)


def is_ours(answer: httpx.Response) -> bool:
    """Whether a 503 is clora's, with a time to come back."""
    return (answer.headers.get("retry-after"), answer.json()["error"]["code"]) == ("2", "engine_down")


def test_what_ends_without_a_body_gets_503() -> None:
    """The part that Ray's proxies import, around applications that stand for a replica that died or did not."""
    spec = importlib.util.spec_from_file_location("serve_app", EXAMPLE)
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    [middleware] = example.middlewares()
    head = {"type": "http.response.start", "status": 200, "headers": [(b"x-mine", b"1")]}
    parts = [{"type": "http.response.body", "body": b"a", "more_body": True}, {"type": "http.response.body"}]

    def ask(messages: list[Any]) -> httpx.Response:
        async def app(scope: Any, receive: Any, send: Any) -> None:
            for message in messages:
                await send(message)

        transport = httpx.ASGITransport(middleware.cls(app))

        async def run() -> httpx.Response:
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
                return await client.get("/")

        return asyncio.run(run())

    for messages in ([], [head]):
        assert ask(messages).status_code == 503 and is_ours(ask(messages))
    whole = ask([head, *parts])
    assert (whole.status_code, whole.headers["x-mine"], whole.content) == (200, "1", b"a")


def test_replicas_answer_as_one_server(cluster: tuple[str, int]) -> None:
    address, _ = cluster
    answer = httpx.post(f"{address}/v1/images/edits", data={"effect": "aa"}, files={"image": png()})
    assert (answer.status_code, answer.json()["error"]["nearest"]) == (404, ["a"])
    assert [model["id"] for model in httpx.get(f"{address}/v1/models").json()["data"]] == ["clora"]

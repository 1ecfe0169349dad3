"""Clients that trickle and disks that are full: nobody else is kept waiting, and nothing is lost."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest
from PIL import Image

from clora.serve import edits
from clora.serve.limits import Room, Uploads
from clora.serve.problems import Problem
from clora.serve.service import Service
from clora.serve.uploads import Form
from tests.serve.conftest import call, encoded, listening, png, post
from tests.serve.test_edits import pixels

HEAD = (
    b"POST /v1/images/edits HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 1000000\r\n"
    b"Content-Type: multipart/form-data; boundary=xyz\r\n\r\n--xyz\r\n"
)


def test_pictures_that_wait_have_a_bound_in_memory(
    make_service: Callable[..., Service], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An upload is decoded to many times its size and waits: the next is refused by its header alone."""
    service = make_service(limits={"waiting_bytes": 1 << 20})
    big = png(size=(512, 400))  # 800 KiB decoded
    decoded: list[int] = []
    real = edits.decode_picture
    monkeypatch.setattr(edits, "decode_picture", lambda *given: decoded.append(1) or real(*given))
    go = asyncio.Event()

    async def wait(*_: object) -> list[Image.Image]:
        await go.wait()
        return [Image.new("RGB", (64, 64))]

    monkeypatch.setattr(service.engine, "edit", wait)

    async def talk(client: httpx.AsyncClient) -> list[httpx.Response]:
        async def ask(content: bytes) -> httpx.Response:
            headers = {"prefer": "respond-async"}
            return await client.post(
                "/v1/images/edits", data={"effect": "a"}, files={"image": content}, headers=headers
            )

        first, second, small = await ask(big), await ask(big), await ask(png())
        assert len(decoded) == 2 and service.pictures.held == 4 * (512 * 400 + 64 * 64)
        go.set()
        await asyncio.wait([job.task for job in service.jobs.running() if job.task])
        return [first, second, small, await ask(big)]

    first, second, small, last = call(service, talk)
    assert [one.status_code for one in (first, second, small, last)] == [202, 503, 202, 202]
    assert second.json()["error"]["code"] == "queue_full" and int(second.headers["retry-after"]) >= 1


def test_start_form_keeps_no_room_for_a_picture_that_it_refuses(service: Service) -> None:
    form = Form({"effect": ["a"]}, {"image": [png()[:-40]]})  # cut off: its size is known, its pixels are not all there

    async def run() -> None:
        with pytest.raises(Problem, match="damaged or cut off"):
            await edits.start_form(service, form, "alice", held)

    held = ExitStack()  # as of a caller who does not close it
    asyncio.run(run())
    assert service.pictures.held == 0 and service.jobs.samples_in_flight() == 0


def test_room_lets_in_what_is_alone_and_counts_down() -> None:
    room = Room(10)
    with room.hold(50, lambda: 1.0):
        with pytest.raises(Problem) as error, room.hold(1, lambda: 7.0):
            raise AssertionError
        assert (error.value.status, error.value.code, error.value.retry_after) == (503, "queue_full", 7.0)
    with room.hold(4, lambda: 1.0), room.hold(6, lambda: 1.0):
        assert room.held == 10
    assert room.held == 0


def test_fifty_slow_uploads_keep_nobody_out(make_service: Callable[..., Service]) -> None:
    service = make_service(
        limits={"uploads": 4, "upload_seconds": 20, "concurrent": 100, "burst": 1000, "requests_per_minute": 10_000}
    )

    async def trickle(address: str, statuses: list[bytes]) -> None:
        """A byte every 50 ms, until the server has had enough; then again."""
        host, port = address.removeprefix("http://").split(":")
        while True:
            reader, writer = await asyncio.open_connection(host, int(port))
            try:
                writer.write(HEAD)
                answer = asyncio.create_task(reader.readline())
                while not answer.done():
                    writer.write(b"x")
                    await writer.drain()
                    await asyncio.sleep(0.05)
                statuses.append(answer.result().split()[1])
            except (ConnectionError, IndexError):
                pass
            finally:
                writer.close()

    async def run(address: str) -> tuple[list[int], list[bytes], float]:
        statuses: list[bytes] = []
        slow = [asyncio.create_task(trickle(address, statuses)) for _ in range(50)]
        await asyncio.sleep(1.5)
        assert len([one for one in slow if not one.done()]) == 50
        began, answers = time.monotonic(), []
        async with httpx.AsyncClient(base_url=address, timeout=60) as client:
            for number in range(10):
                for _ in range(5):  # as Retry-After tells
                    data = {"effect": "a", "seed": str(number)}
                    answer = await client.post("/v1/images/edits", data=data, files={"image": png()})
                    if answer.status_code != 503:
                        break
                    await asyncio.sleep(int(answer.headers["retry-after"]))
                answers.append(answer.status_code)
        took = time.monotonic() - began
        async with asyncio.timeout(20):  # those that had to go are told, after a while in which they are heard out
            while b"408" not in statuses:
                await asyncio.sleep(0.05)
        for one in slow:
            one.cancel()
        await asyncio.gather(*slow, return_exceptions=True)
        return answers, statuses, took

    with listening(service) as address:
        answers, statuses, took = asyncio.run(run(address))
    assert answers == [200] * 10 and took < 20
    assert set(statuses) == {b"503", b"408"}
    assert service.quotas.running == 0


def test_uploads_end_the_slowest_that_had_its_second() -> None:
    async def run() -> None:
        uploads = Uploads(2)
        with uploads.one() as quick, uploads.one() as slow:
            with pytest.raises(Problem) as refused, uploads.one():
                raise AssertionError
            assert refused.value.code == "too_many_uploads"  # neither has had its second yet
            for one, received in ((quick, 10**6), (slow, 10**3)):
                one.received, one.started = received, one.started - 2
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(60) as slow.timeout, asyncio.timeout(60) as quick.timeout:
                    with uploads.one():
                        await asyncio.sleep(10)
            assert slow.had_to_go and not quick.had_to_go
            quick.timeout = None  # it has everything: its memory is needed until it is decoded
            with uploads.one(), pytest.raises(Problem), uploads.one():
                raise AssertionError

    asyncio.run(run())


def test_a_full_disk_loses_nothing(small_base: tuple[Path, Path], service: Service) -> None:
    """The log goes to a device that is full, and from when it listens not a byte can be written to any file."""
    base, collection = small_base
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (1200, 1200, 3), dtype=np.uint8))
    big = encoded(noise)
    assert len(big) > 4 << 20
    with open("/dev/full", "w") as full:
        process = subprocess.Popen(
            [sys.executable, "-m", "clora", "serve", str(collection), "--base", str(base), "--port", "0"],
            stdout=full,
            stderr=full,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    try:
        address = f"http://127.0.0.1:{port_of(process)}"
        for pid in (process.pid, *(child.pid for child in psutil.Process(process.pid).children())):
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, 0))
        with httpx.Client(base_url=address, timeout=60) as client:
            answers = [
                client.post("/v1/images/edits", data={"effect": "a", "seed": "5"}, files={"image": big})
                for _ in range(3)
            ]
            effects = client.get("/v1/effects")
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
    assert [answer.status_code for answer in answers] == [200] * 3 and effects.status_code == 200
    wanted = post(service, {"effect": "a", "seed": "5"}, {"image": big})
    assert np.abs(pixels(answers[0]) - pixels(wanted)).max() <= 1


def port_of(process: subprocess.Popen[str] | subprocess.Popen[bytes]) -> int:
    """The port that a process listens on, which it cannot tell."""
    for _ in range(1200):
        assert process.poll() is None
        for found in psutil.Process(process.pid).net_connections("tcp"):
            if found.status == psutil.CONN_LISTEN:
                port: int = found.laddr.port
                return port
        time.sleep(0.05)
    raise AssertionError("it does not listen")


def test_damaged_bodies_do_not_fill_the_log() -> None:
    code = (
        "import io, logging; from clora.serve.logs import log_json; out = io.StringIO(); log_json(out);"
        "from python_multipart.multipart import MultipartParser;"
        "parser = MultipartParser(b'xyz');"
        "\ntry: parser.write(b'--xyz\\r\\n;;;')\nexcept Exception: pass\nprint(out.getvalue(), end='')"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (found.returncode, found.stdout, found.stderr) == (0, "", "")

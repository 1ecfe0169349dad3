"""The engine in a process of its own: the pictures of the other form, and whatever kills it harms nothing for long."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.forkserver import ensure_running
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import psutil
import pytest

from clora.errors import InputError
from clora.serve.engine import EngineGone, Work
from clora.serve.pipe import Pipe
from clora.serve.process import ProcessEngine
from clora.serve.service import Service
from clora.serve.settings import Settings
from tests.serve.conftest import call, listening, picture, png, post
from tests.serve.test_edits import pixels
from tests.serve.test_process import running
from tests.support.processes import Forked
from tests.support.random_collection import write_random_collection

STALL = 3.0


def settings_of(base: Path, collection: Path) -> Settings:
    given: dict[str, Any] = {"base": str(base), "collection": collection, "dtype": "float32", "device": "cpu"}
    batches = {"encode": 1, "decode": 1}  # so that results are bit-equal whatever shares a batch
    return Settings(**given, thumbnails=False, stall_seconds=STALL, batches=batches)  # type: ignore[arg-type]


@pytest.fixture(scope="module", autouse=True)
def forked() -> Iterator[list[Forked]]:
    """The processes of this file's engines, in order. They are forked with the model libraries in them, whose import
    would be most of the file's time; tests/serve/test_process.py starts them as a server does."""
    made: list[Forked] = []

    def start(command: list[str], **more: Any) -> Forked:
        made.append(Forked(command, **more))
        return made[-1]

    ensure_running()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("clora.serve.process.subprocess", SimpleNamespace(**vars(subprocess) | {"Popen": start}))
        yield made


@pytest.fixture(scope="module")
def engine(small_base: tuple[Path, Path], forked: list[Forked]) -> Iterator[ProcessEngine]:
    """One process for the tests of this file; it is ready again after each."""
    made = ProcessEngine(settings_of(*small_base))
    yield made
    made.close()


@pytest.fixture
def remote(engine: ProcessEngine, small_base: tuple[Path, Path]) -> Service:
    return Service(settings_of(*small_base), engine)


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> float:
    """Until a condition holds; the seconds that took."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds
        time.sleep(0.01)
    return time.monotonic() - began


def revived(engine: ProcessEngine) -> bool:
    engine.restart()
    return engine.is_alive


def test_process_engine_makes_what_threads_make(remote: Service, make_service: Callable[..., Service]) -> None:
    here = make_service(batches={"encode": 1, "decode": 1})
    data = {"effect": "a,b", "seed": "3", "n": "2"}
    one, other = post(here, data), post(remote, data)
    assert (one.status_code, other.status_code) == (200, 200)
    for number in range(2):
        assert np.array_equal(pixels(one, number), pixels(other, number))
    assert {k: v for k, v in one.json().items() if k != "created"} == {
        k: v for k, v in other.json().items() if k != "created"
    }
    wide = {"image": png(size=(2000, 40))}
    one, other = post(here, data, wide), post(remote, data, wide)
    assert one.status_code == other.status_code == 400 and one.json() == other.json()


def test_process_engine_tells_steps_and_phases(remote: Service) -> None:
    async def talk(client: httpx.AsyncClient) -> tuple[int, str]:
        asked = {"effect": "a", "n": "2"}
        headers = {"prefer": "respond-async"}
        made = await client.post("/v1/images/edits", data=asked, files={"image": png()}, headers=headers)
        await client.get(f"{made.headers['location']}/events")
        steps = (await client.get(made.headers["location"])).json()["steps"]
        await asyncio.sleep(1.2)  # two beats
        return steps, (await client.get("/metrics")).text

    steps, text = call(remote, talk)
    assert steps == 8
    for phase in ("encode", "denoise", "decode", "write_picture", "edit"):
        assert f'clora_phase_seconds_count{{phase="{phase}"}}' in text
    assert 'clora_samples_total{model="clora",outcome="done"}' in text and "clora_ready 1.0" in text


def test_process_engine_cancels(engine: ProcessEngine) -> None:
    before = engine.stats()["clora"]["cancelled"]
    work = Work("clora", (picture(),), "paint it", None, tuple(range(32)), "a", 60)

    async def run() -> None:
        stepped, loop = asyncio.Event(), asyncio.get_running_loop()
        task = asyncio.create_task(engine.edit(work, lambda: loop.call_soon_threadsafe(stepped.set) and None))
        await stepped.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(run())
    wait_for(lambda: engine.stats()["clora"]["cancelled"] > before)
    wait_for(lambda: engine.stats()["clora"]["queued"] + engine.stats()["clora"]["running"] == 0)


def test_a_killed_engine_gives_503_and_comes_back(remote: Service, engine: ProcessEngine) -> None:
    """SIGKILL with twelve edits in flight."""

    async def run(address: str) -> tuple[list[httpx.Response], int, httpx.Response, httpx.Response]:
        async with httpx.AsyncClient(base_url=address, timeout=60) as client:

            async def edit(number: int, n: str = "4") -> httpx.Response:
                data = {"effect": "ab"[number % 2], "seed": str(number), "n": n}
                return await client.post("/v1/images/edits", data=data, files={"image": png()})

            alone = await edit(1, "1")
            tasks = [asyncio.create_task(edit(number)) for number in range(12)]
            while not any(job.steps for job in remote.jobs.running()):
                await asyncio.sleep(0.001)
            os.kill(engine.pid, signal.SIGKILL)
            answers = await asyncio.gather(*tasks)
            down = (await client.get("/readyz")).status_code
            while (await client.get("/readyz")).status_code != 200:
                await asyncio.sleep(0.05)
            return answers, down, alone, await edit(1, "1")

    with listening(remote) as address:
        answers, down, alone, again = asyncio.run(run(address))
    assert {answer.status_code for answer in answers} == {503}
    assert {answer.json()["error"]["code"] for answer in answers} == {"engine_down"}
    assert all(int(answer.headers["retry-after"]) >= 1 for answer in answers)
    assert down == 503
    assert np.array_equal(pixels(alone), pixels(again))
    assert b"clora_restarts_total 1.0" in remote.metrics.text()
    assert remote.jobs.samples_in_flight() == 0 and remote.quotas.running == 0


def test_a_hanging_engine_is_killed_and_comes_back(remote: Service, engine: ProcessEngine) -> None:
    stopped = psutil.Process(engine.pid)
    stopped.suspend()
    wait_for(lambda: not engine.is_alive, STALL + 5)
    assert post(remote, {"effect": "a"}).json()["error"]["code"] == "engine_down"
    wait_for(lambda: revived(engine))
    wait_for(lambda: not stopped.is_running())
    assert post(remote, {"effect": "a"}).status_code == 200


def test_process_engine_says_what_is_wrong_with_its_models(tmp_path: Path) -> None:
    (tmp_path / "not.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(InputError, match=r"not\.safetensors"):
        ProcessEngine(Settings(collection=tmp_path / "not.safetensors"))


# A far end whose models take for ever to open, or cannot be.
FAR_END = """
import sys, tempfile, time, pathlib
import clora.serve.child as child
import clora.serve.load as load

def hang(settings):
    pathlib.Path(tempfile.gettempdir(), "unpacked").write_bytes(b"x")
    time.sleep(1000)

def fail(settings):
    raise RuntimeError("failed to map segment\\nand a backtrace")

load.open_models = {how}
child.ENDING = 0.5
sys.argv = ["child", *sys.argv[-2:]]
child.main()
"""


def far_end(monkeypatch: pytest.MonkeyPatch, how: str) -> list[Forked]:
    """Let every new engine's process be one of `FAR_END`; the processes as they are started."""
    made: list[Forked] = []

    def start(command: list[str], **more: Any) -> Forked:
        made.append(Forked([command[0], "-c", FAR_END.replace("{how}", how), *command[-2:]], **more))
        return made[-1]

    monkeypatch.setattr("clora.serve.process.subprocess.Popen", start)
    return made


def test_an_engine_whose_models_cannot_be_opened_says_so_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    made = far_end(monkeypatch, "fail")
    with pytest.raises(InputError) as error:
        ProcessEngine(Settings())
    assert error.value.faults == [
        "the models could not be opened (RuntimeError: failed to map segment); clora verify checks an artefact"
    ]
    assert made[0].poll() is not None


def test_an_engine_starts_where_no_temporary_file_can_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as its models, at least: only some of them are unpacked."""

    def refuse(**_: str) -> str:
        raise FileNotFoundError(2, "No usable temporary directory")

    far_end(monkeypatch, "fail")
    monkeypatch.setattr("clora.serve.process.tempfile.mkdtemp", refuse)
    with pytest.raises(InputError, match="the models could not be opened"):
        ProcessEngine(Settings())


def test_a_start_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    made = far_end(monkeypatch, "hang")
    with pytest.raises(InputError, match="has not opened its models in 0.5 s; raise start_seconds"):
        ProcessEngine(Settings(start_seconds=0.5))
    assert made[0].poll() is not None


def test_a_start_that_hangs_later_is_tried_again(
    engine: ProcessEngine, monkeypatch: pytest.MonkeyPatch, small_base: tuple[Path, Path]
) -> None:
    own = settings_of(*small_base).model_copy(update={"start_seconds": 1.0})
    monkeypatch.setattr(engine, "_settings", own)
    with monkeypatch.context() as patched:
        made = far_end(patched, "hang")
        psutil.Process(engine.pid).kill()
        wait_for(engine.restart)
        hanging = engine.pid
        assert not engine.restart()  # it is still starting
        wait_for(engine.restart)
        assert len(made) == 2 and engine.pid != hanging
        wait_for(lambda: made[0].poll() is not None)
    monkeypatch.setattr(engine, "_settings", own.model_copy(update={"start_seconds": 60.0}))
    psutil.Process(engine.pid).kill()
    wait_for(lambda: revived(engine))


def test_a_far_end_that_hangs_ends_with_the_server_and_takes_its_files(tmp_path: Path) -> None:
    """The server is killed, so that nobody ends the process it leaves."""
    folder = tmp_path / "own"
    folder.mkdir()
    ours, theirs = socket.socketpair()
    command = [sys.executable, "-c", FAR_END.replace("{how}", "hang"), str(theirs.fileno()), str(folder)]
    process = subprocess.Popen(command, pass_fds=[theirs.fileno()], env={**os.environ, "TMPDIR": str(folder)})
    theirs.close()
    pipe = Pipe(ours, lambda _: None, lambda: None)
    try:
        pipe.post(Settings())
        wait_for((folder / "unpacked").exists)
        pipe.close()
        assert process.wait(20) == 1
        assert not folder.exists()
    finally:
        process.kill()
        process.wait()


def test_a_killed_engines_temporary_files_are_removed(engine: ProcessEngine, forked: list[Forked]) -> None:
    folder = Path(forked[-1].env["TMPDIR"])
    (folder / "unpacked").write_bytes(b"x")
    psutil.Process(engine.pid).kill()
    wait_for(lambda: not engine.is_alive)
    wait_for(lambda: revived(engine))
    wait_for(lambda: not folder.exists())


@pytest.mark.slow
def test_an_engine_does_not_come_back_with_another_model(
    small_base: tuple[Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base, collection = small_base
    own = shutil.copy(collection, tmp_path / "own.safetensors")
    engine = ProcessEngine(settings_of(base, Path(own)))
    try:
        write_random_collection(base, Path(own), num_steps=2)
        psutil.Process(engine.pid).kill()
        wait_for(lambda: not engine.is_alive)
        with pytest.raises(EngineGone):
            asyncio.run(engine.edit(Work("clora", (picture(),), "paint it", None, (0,), "a", 60), lambda: None))
        assert engine.restart()
        with caplog.at_level(logging.WARNING):
            wait_for(engine.restart)  # it opened the other model, and is started again
        assert "changed" in caplog.text and not engine.is_alive
        shutil.copy(collection, own)
        wait_for(lambda: revived(engine))
    finally:
        engine.close()


def test_the_server_itself_has_no_torch() -> None:
    """So that it is small, starts at once, and shares no lock of the interpreter with the model."""
    code = "import sys, clora.jobs.serve; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.slow
def test_the_engine_ends_with_a_server_that_is_killed(small_base: tuple[Path, Path]) -> None:
    """A real one, as `clora serve` starts it, with a folder for its temporary files."""
    base, collection = small_base
    with running(str(collection), "--base", str(base), "--dtype", "float32") as (_, process, _):
        [child] = psutil.Process(process.pid).children()
        assert "clora.serve.child" in " ".join(child.cmdline())
        folder = Path(child.environ()["TMPDIR"])
        assert folder.is_dir()
        process.kill()
        assert child.wait(20) is None or not child.is_running()
        assert not folder.exists()

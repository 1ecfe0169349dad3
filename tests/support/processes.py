"""Starting several processes that work together, as torchrun does, with a hand on each of them.

A fork server imports the package and the model libraries once; what it forks starts to work at once.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LIMIT_S = 240
# There is one server, whoever forks. A base's family is imported when the first of its bases is loaded, which would be
# in each process, and takes longer than most of them have to do.
FAMILY = "clora.backbones.qwen_image.backbone"
SERVER: Any = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    [
        "clora.jobs.train",
        "clora.jobs.teach",
        "clora.jobs.eval_bench",
        FAMILY,
        "scipy.ndimage",
        "tests.support.processes",
    ]
)


@dataclass
class Process:
    """One of them, and the file that its output goes to."""

    handle: Any
    output: Path

    @property
    def text(self) -> str:
        return self.output.read_text(errors="replace") if self.output.exists() else ""

    @property
    def code(self) -> int | None:
        """Its exit code, negative after a signal; None while it runs."""
        code: int | None = self.handle.exitcode
        return code

    def signal(self, signum: int) -> None:
        if self.code is None:
            os.kill(self.handle.pid, signum)


def start(
    world: int,
    arguments: Sequence[str],
    folder: Path,
    prepare: Callable[..., None] | None = None,
    given: Sequence[Any] = (),
) -> list[Process]:
    """Run `clora ARGUMENTS` on `world` processes; outputs go to `folder/process-RANK.txt`.

    `prepare(*given)` runs first in each of them: to break something.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    found = []
    for rank in range(world):
        env = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        output = folder / f"process-{rank}.txt"
        output.unlink(missing_ok=True)
        handle = SERVER.Process(target=_child, args=(env, output, list(arguments), prepare, tuple(given)))
        handle.start()
        found.append(Process(handle, output))
    return found


def _child(
    env: Mapping[str, str],
    output: Path,
    arguments: list[str],
    prepare: Callable[..., None] | None,
    given: tuple[Any, ...],
) -> None:
    import torch

    from clora.cli.commands import main

    gc.freeze()  # what the server imported stays, so that no collection need look through it
    os.environ.update(env)
    with output.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    if prepare is not None:
        prepare(*given)
    sys.argv = ["clora", *arguments]
    main()


def finish(processes: Sequence[Process], seconds: float = LIMIT_S) -> list[int | None]:
    """Their exit codes. When one fails the others have 20 seconds left, as under torchrun; then they are killed."""
    end = time.monotonic() + seconds
    try:
        while any(p.code is None for p in processes):
            if any(p.code for p in processes):
                end = min(end, time.monotonic() + 20)
            if time.monotonic() > end:
                break
            time.sleep(0.02)
    finally:
        kill(processes)
    return [p.code for p in processes]


def kill(processes: Sequence[Process]) -> None:
    """SIGKILL to all that still run, and wait for their end."""
    for process in processes:
        process.signal(9)
    for process in processes:
        process.handle.join()


def run(
    world: int,
    arguments: Sequence[str],
    folder: Path,
    prepare: Callable[..., None] | None = None,
    given: Sequence[Any] = (),
) -> str:
    """`start` and `finish`; the first process's output. Fails with all outputs unless every exit code is 0."""
    processes = start(world, arguments, folder, prepare, given)
    codes = finish(processes)
    outputs = "\n".join(f"--- process {rank}\n{p.text}" for rank, p in enumerate(processes))
    assert codes == [0] * world, f"exit codes {codes}\n{outputs}"
    return processes[0].text


class Forked:
    """What an engine asks of `subprocess.Popen`, of a process that is forked: `[PYTHON, -m, MODULE, FD, FOLDER]` or
    `-c CODE`, with the one socket that is passed on."""

    def __init__(self, command: Sequence[str], *, pass_fds: Sequence[int], env: Mapping[str, str], **_: object) -> None:
        [number] = pass_fds
        self.env = env
        with socket.socket(fileno=os.dup(number)) as passed:
            self._handle = SERVER.Process(target=_run_program, args=(list(command), passed, dict(env)))
            self._handle.start()

    @property
    def pid(self) -> int:
        pid: int = self._handle.pid
        return pid

    def poll(self) -> int | None:
        code: int | None = self._handle.exitcode
        return code

    def wait(self, timeout: float | None = None) -> int:
        self._handle.join(timeout)
        if (code := self.poll()) is None:
            raise subprocess.TimeoutExpired("forked", timeout or 0.0)
        return code

    def kill(self) -> None:
        self._handle.kill()


def _run_program(command: list[str], passed: socket.socket, env: Mapping[str, str]) -> None:
    gc.freeze()
    os.setsid()
    os.environ.update(env)
    tempfile.tempdir = None  # it is looked up anew
    _, how, what, _, folder = command
    sys.argv = [what, str(passed.detach()), folder]
    if how == "-c":
        exec(what, {"__name__": "__main__"})
    else:
        runpy.run_module(what, run_name="__main__")

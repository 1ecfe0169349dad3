"""The engine as a process of its own, of which this is the near end: it may crash, hang or be killed, and the server
goes on; `child` is the far end."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from itertools import count
from typing import Any

from PIL import Image

from clora.errors import InputError, InputErrors
from clora.serve.engine import EngineGone, OnPhase, Work
from clora.serve.offer import Offer
from clora.serve.pipe import Pipe
from clora.serve.settings import Settings

log = logging.getLogger("clora.serve")

ENDING = 5.0  # seconds for a process to end by itself
MOST_PAUSE = 60.0  # seconds between two tries to start one that does not start

Offers = Mapping[str, Offer]


class ProcessEngine:
    """`Engine` over a process that opens the models of `settings`."""

    def __init__(self, settings: Settings) -> None:
        """Waits until they are open; raises `InputErrors` where they cannot be, where that takes longer than
        `start_seconds` and where the process dies over it."""
        self.on_phase: OnPhase = lambda phase, seconds, number: None
        self._settings = settings
        self._child = Child(settings, self._note)
        try:
            self.offers: Offers = self._child.started.result(settings.start_seconds)
        except TimeoutError as error:
            self._child.end(0.0)
            raise InputError(
                f"the engine has not opened its models in {settings.start_seconds:g} s; raise start_seconds in the"
                " settings, or see whether their disk answers"
            ) from error
        except EngineGone as error:
            self._child.end()
            raise InputError(
                f"the engine's process did not survive opening its models ({self._child.how_it_is()}); see whether the"
                " machine has memory for them, and the lines above"
            ) from error
        except BaseException:
            self._child.end()
            raise
        self._failures, self._began = 0, time.monotonic()

    async def edit(self, work: Work, on_step: Callable[[], None]) -> list[Image.Image]:
        child = self._child
        number, future = child.ask(work, on_step)
        try:
            return await asyncio.wrap_future(future)
        finally:
            child.forget(number)

    def stats(self) -> Mapping[str, Mapping[str, float]]:
        return self._child.stats

    @property
    def pid(self) -> int:
        """Of the process that there is now."""
        return self._child.pid

    @property
    def is_alive(self) -> bool:
        return self._is_open() and self._child.is_well(self._settings.stall_seconds)

    def restart(self) -> bool:
        child = self._child
        starting = not child.started.done()
        if self.is_alive or (starting and time.monotonic() < self._began + self._settings.start_seconds):
            return False
        opened = self._is_open()
        if not (opened or starting) and time.monotonic() < self._began + min(MOST_PAUSE, 2.0**self._failures):
            return False
        self._failures = 0 if opened else self._failures + 1
        log.warning("the engine's process is started anew (the last one: %s)", child.how_it_is())
        # A process that hangs would hold whoever ends it.
        threading.Thread(target=child.end, args=(0.0,), name="ending", daemon=True).start()
        self._began = time.monotonic()  # also where it cannot be started: then it is tried again after the pause
        self._child = Child(self._settings, self._note)
        return True

    def close(self) -> None:
        self._child.end()

    def _is_open(self) -> bool:
        """Whether the process has opened the models, and those that the first one did: files may have changed since."""
        started = self._child.started
        if not started.done() or started.exception() is not None:
            return False
        return started.result() == self.offers

    def _note(self, phase: str, seconds: float, number: int | None) -> None:
        self.on_phase(phase, seconds, number)


class Child:
    """One process from its start to its end. `started` gives its offers once its models are open."""

    def __init__(self, settings: Settings, on_phase: OnPhase) -> None:
        ours, theirs = socket.socketpair()
        self.started: Future[Offers] = Future()
        self.stats: Mapping[str, Mapping[str, float]] = {}
        self._on_phase = on_phase
        self._numbers = count()
        self._work: dict[int, tuple[Future[list[Image.Image]], Callable[[], None]]] = {}
        self._changing, self._is_over = threading.Lock(), False
        self._beat = (True, time.monotonic())
        self._folder = _own_folder()
        command = [sys.executable, "-m", "clora.serve.child", str(theirs.fileno()), self._folder]
        # A session of its own: Ctrl-C is for the server, which lets requests end before the engine does.
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
                env={**os.environ, **({"TMPDIR": self._folder} if self._folder else {})},
            )
        except BaseException:
            ours.close()
            if self._folder:
                shutil.rmtree(self._folder, ignore_errors=True)
            raise
        finally:
            theirs.close()
        self._pipe = Pipe(ours, self._take, self._lose_all)
        self._pipe.post(settings)

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, work: Work, on_step: Callable[[], None]) -> tuple[int, Future[list[Image.Image]]]:
        """Send work; its number, and what becomes of it. Raises `EngineGone` where the process is over."""
        number, future = next(self._numbers), Future[list[Image.Image]]()
        with self._changing:
            if self._is_over:
                raise EngineGone("the engine's process is over")
            self._work[number] = future, on_step
        self._pipe.post(("edit", number, work))
        return number, future

    def forget(self, number: int) -> None:
        """Nobody waits for that work any more: it is cancelled, unless it is done."""
        with self._changing:
            known = self._work.pop(number, None)
        if known is not None:
            self._pipe.post(("cancel", number))

    def is_well(self, stall_seconds: float) -> bool:
        """Whether it runs, says that it is well, and has said so lately."""
        well, heard = self._beat
        return not self._is_over and well and time.monotonic() - heard < stall_seconds

    def how_it_is(self) -> str:
        """In a few words, for the log."""
        code = self._process.poll()
        return "it hangs, or its models have changed" if code is None else f"it ended with {code}"

    def end(self, patience: float = ENDING) -> None:
        """Let the process end, and kill it where it has not within `patience` seconds; its temporary files go too."""
        self._pipe.close()
        with suppress(subprocess.TimeoutExpired):
            if patience:
                self._process.wait(patience)
        self._process.kill()
        self._process.wait()
        if self._folder:
            shutil.rmtree(self._folder, ignore_errors=True)

    # In the pipe's thread

    def _take(self, message: tuple[Any, ...]) -> None:
        kind, *given = message
        if kind == "beat":
            well, self.stats = given
            self._beat = well, time.monotonic()
        elif kind == "phase":
            self._on_phase(*given)
        elif kind == "step":
            with self._changing:
                known = self._work.get(given[0])
            if known is not None:
                known[1]()
        elif kind == "ready":
            self._beat = True, time.monotonic()
            self.started.set_result(given[0])
        elif kind == "refused":
            self.started.set_exception(InputErrors(given[0]) if len(given[0]) > 1 else InputError(given[0][0]))
        else:
            self._answer(*given)

    def _answer(self, number: int, made: list[Image.Image] | BaseException) -> None:
        with self._changing:
            known = self._work.pop(number, None)
        if known is None:
            return
        with suppress(InvalidStateError):  # given up at this moment
            if isinstance(made, BaseException):
                known[0].set_exception(made)
            else:
                known[0].set_result(made)

    def _lose_all(self) -> None:
        with self._changing:
            self._is_over = True
            lost = [future for future, _ in self._work.values()]
            self._work = {}
        gone = EngineGone("the engine's process is over")
        with suppress(InvalidStateError):  # it had started
            self.started.set_exception(gone)
        for future in lost:
            with suppress(InvalidStateError):
                future.set_exception(gone)


def _own_folder() -> str:
    """A folder for one process's temporary files: an AOTInductor package is unpacked there, and a process that is
    killed leaves it. "" on a disk that takes none, which most models do without."""
    try:
        return tempfile.mkdtemp(prefix="clora-engine-")
    except OSError as error:
        log.warning("the engine has no folder of its own for temporary files: %s", error.strerror)
        return ""

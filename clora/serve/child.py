"""`python -m clora.serve.child FD FOLDER`: the engine's own process, the far end of `process`. It ends with the server,
however that ends, and so does FOLDER, which its temporary files are in (empty: they have none of their own)."""

from __future__ import annotations

import asyncio
import logging
import os
import queue
import shutil
import signal
import socket
import sys
import threading
import time
from typing import Any

from clora.errors import InputError, first_line
from clora.serve.engine import EngineGone, Full, Late, Work
from clora.serve.logs import log_json
from clora.serve.pipe import Pipe
from clora.serve.settings import Settings

log = logging.getLogger("clora.serve")

BEAT = 0.5  # seconds between signs of life
ENDING = 10.0  # seconds after the server's end in which this one may end by itself
KNOWN = (InputError, Full, Late, FloatingPointError, EngineGone)  # errors that mean something to the other end


def main() -> None:
    """Open the models of the settings that come first, then work for the other end until it is gone."""
    # A service manager signals every process; when the engine ends is the server's to say.
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, signal.SIG_IGN)
    log_json()
    inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def on_end() -> None:
        inbox.put(None)
        threading.Thread(target=_end_late, name="end", daemon=True).start()

    pipe = Pipe(socket.socket(fileno=int(sys.argv[1])), inbox.put, on_end)
    settings = inbox.get()
    try:
        if settings is not None:
            asyncio.run(_serve(pipe, inbox, settings))
    finally:
        _remove_files()


def _end_late() -> None:
    """End the process where a step, or a model that is being opened, hangs: nobody is left who would kill it."""
    time.sleep(ENDING)
    try:
        _remove_files()
    finally:
        os._exit(1)


def _remove_files() -> None:
    if sys.argv[2]:
        shutil.rmtree(sys.argv[2], ignore_errors=True)


async def _serve(pipe: Pipe, inbox: queue.SimpleQueue[Any], settings: Settings) -> None:
    from clora.serve.load import open_models
    from clora.serve.threads import ThreadEngine

    try:
        engine = ThreadEngine(open_models(settings), settings)
    except Exception as error:
        pipe.post(("refused", _faults(error)))
        await asyncio.to_thread(inbox.get)  # the other end closes when it has read that
        return
    engine.on_phase = lambda *phase: pipe.post(("phase", *phase))
    pipe.post(("ready", dict(engine.offers)))
    beating = asyncio.create_task(_beat(pipe, engine))
    tasks: dict[int, asyncio.Task[None]] = {}
    while (message := await asyncio.to_thread(inbox.get)) is not None:
        kind, number, *work = message
        if kind == "cancel":
            if number in tasks:
                tasks[number].cancel()
            continue
        tasks[number] = asyncio.create_task(_edit(pipe, engine, number, *work))
        tasks[number].add_done_callback(lambda _, number=number: tasks.pop(number))  # type: ignore[misc]
    beating.cancel()
    engine.close()


def _faults(error: Exception) -> list[str]:
    """What kept the models from being opened, a sentence each, for whoever starts the server."""
    if isinstance(error, InputError):
        return error.faults
    log.error("the models could not be opened", exc_info=error)
    return [
        f"the models could not be opened ({type(error).__name__}: {first_line(error)}); clora verify checks an artefact"
    ]


async def _beat(pipe: Pipe, engine: Any) -> None:
    while True:
        pipe.post(("beat", engine.is_alive, engine.stats()))
        await asyncio.sleep(BEAT)


async def _edit(pipe: Pipe, engine: Any, number: int, work: Work) -> None:
    """Work on one edit, and send what came of it."""
    made: Any
    try:
        made = await engine.edit(work, lambda: pipe.post(("step", number)))
    except asyncio.CancelledError:
        made = EngineGone("its samples were cancelled")
    except KNOWN as error:
        kind = next(kind for kind in KNOWN if isinstance(error, kind))
        made = kind(str(error))  # without what it came from
    except Exception as error:
        log.error("an edit failed in the engine", exc_info=error)
        made = RuntimeError(type(error).__name__)
    pipe.post(("made", number, made))


if __name__ == "__main__":
    main()

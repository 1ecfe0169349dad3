"""`python -m clora.serve.child FD`: the engine's own process, the far end of `process`. It ends with the server,
however that ends."""

from __future__ import annotations

import asyncio
import logging
import queue
import signal
import socket
import sys
from typing import Any

from clora.errors import InputError
from clora.serve.engine import EngineGone, Full, Late, Work
from clora.serve.logs import log_json
from clora.serve.pipe import Pipe
from clora.serve.settings import Settings

log = logging.getLogger("clora.serve")

BEAT = 0.5  # seconds between signs of life
KNOWN = (InputError, Full, Late, FloatingPointError, EngineGone)  # errors that mean something to the other end


def main() -> None:
    """Open the models of the settings that come first, then work for the other end until it is gone."""
    # A service manager signals every process; when the engine ends is the server's to say.
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, signal.SIG_IGN)
    log_json()
    inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
    pipe = Pipe(socket.socket(fileno=int(sys.argv[1])), inbox.put, lambda: inbox.put(None))
    settings = inbox.get()
    if settings is not None:
        asyncio.run(_serve(pipe, inbox, settings))


async def _serve(pipe: Pipe, inbox: queue.SimpleQueue[Any], settings: Settings) -> None:
    from clora.serve.load import open_models
    from clora.serve.threads import ThreadEngine

    try:
        engine = ThreadEngine(open_models(settings), settings)
    except InputError as error:
        pipe.post(("refused", error.faults))
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

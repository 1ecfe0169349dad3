"""The process: listen, serve, and end without losing a request.

SIGTERM or SIGINT: no new edits (503, and /readyz is false), those there are get `grace_seconds`, then the process ends
with code 0. A second signal ends it at once.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket as sockets
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import uvicorn
from fastapi import FastAPI

from clora.errors import InputError
from clora.serve.guard import LOOPBACK
from clora.serve.service import Service
from clora.serve.settings import Settings

log = logging.getLogger("clora.serve")

LINGER = 2.0  # seconds in which results of finished jobs can be fetched
CLOSING = 3  # seconds for connections to close
BACKLOG = 2048  # connections that wait to be taken: uvicorn's own number


def check_binding(settings: Settings) -> None:
    """Raise `InputError` where strangers could use the server without a key, and nobody has said that they may."""
    if settings.host not in LOOPBACK and settings.keys is None and not settings.open_to_all:
        raise InputError(
            f"host {settings.host}: others could reach this server, and it has no keys; give --keys FILE (made by clora"
            " serve --new-key FILE), or --open-to-all"
        )


def run_server(
    app: FastAPI, service: Service, socket: sockets.socket, on_listening: Callable[[int], None] = lambda port: None
) -> None:
    """Serve on a socket of `bind` until a signal ends it; socket and service are closed then, however it ends.
    `on_listening` is told the port once requests are taken.

    Raises `InputError` where another program has begun to listen there.
    """
    settings = service.settings
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        log_config=None,
        access_log=False,
        proxy_headers=False,  # an address that a client claims would be a quota of its own
        server_header=False,
        limit_concurrency=settings.limits.connections,
        timeout_keep_alive=15,
        timeout_graceful_shutdown=CLOSING,
        h11_max_incomplete_event_size=64 * 1024,
        ws="none",
    )
    try:
        _listen(socket, settings)
        asyncio.run(_serve(_Server(config), service, socket, on_listening))
    finally:
        socket.close()
        service.close()


def bind(settings: Settings) -> sockets.socket:
    """A socket at the settings' address, which takes no connections yet: models take minutes to load, and a port that
    is taken is known before. Raises `InputError` where the address cannot be bound."""
    family = sockets.AF_INET6 if ":" in settings.host else sockets.AF_INET
    found = sockets.socket(family, sockets.SOCK_STREAM)
    found.setsockopt(sockets.SOL_SOCKET, sockets.SO_REUSEADDR, 1)
    try:
        found.bind((settings.host, settings.port))
    except OSError as error:
        found.close()
        raise _cannot_bind(settings, error) from error
    return found


def _listen(socket: sockets.socket, settings: Settings) -> None:
    """Take connections; two programs may have bound an address, and the first to listen has it."""
    try:
        socket.listen(BACKLOG)
    except OSError as error:
        raise _cannot_bind(settings, error) from error


def _cannot_bind(settings: Settings, error: OSError) -> InputError:
    where = f"{settings.host}:{settings.port}"
    return InputError(f"{where} cannot be bound ({error.strerror}); choose another --host or --port")


class _Server(uvicorn.Server):
    """uvicorn, with signals left to us: it would hand them on, and end by them."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def _serve(
    server: _Server, service: Service, socket: sockets.socket, on_listening: Callable[[int], None]
) -> None:
    loop, stop = asyncio.get_running_loop(), asyncio.Event()

    def on_signal() -> None:
        if stop.is_set():
            server.force_exit = server.should_exit = True
        stop.set()

    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, on_signal)
    serving = asyncio.create_task(server.serve(sockets=[socket]))
    while not server.started and not serving.done():
        await asyncio.sleep(0.01)
    if server.started:
        port = server.servers[0].sockets[0].getsockname()[1]
        log.info("listening", extra={"port": port})
        on_listening(port)
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
    if not serving.done():
        await _drain(server, service)
        server.should_exit = True
    await serving


async def _drain(server: _Server, service: Service) -> None:
    """Let jobs end within the grace, cancel the rest, and give their results a moment to be fetched."""
    service.is_draining = True
    loop = asyncio.get_running_loop()
    end = loop.time() + service.settings.grace_seconds
    log.info("draining", extra={"count": len(service.jobs.running())})
    while service.jobs.running() and loop.time() < end and not server.force_exit:
        await asyncio.sleep(0.02)
    left = [job.task for job in service.jobs.running() if job.task is not None]
    for task in left:
        task.cancel()
    if left:
        await asyncio.wait(left, timeout=CLOSING)
    linger = min(LINGER, max(0.0, end - loop.time()))
    if service.jobs.unfetched() and not server.force_exit:
        await asyncio.sleep(linger)

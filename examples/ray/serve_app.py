"""`clora serve` on Ray Serve: replicas on the GPUs of a cluster, behind one address.

    pip install 'clora[serve]' 'ray[serve]>=2.60'
    python examples/ray/serve_app.py --config serve.yaml --replicas 2 [--gpus 1] [--port 8000]

Each replica is the whole of `clora serve` (docs/SERVING.md) with its own engine. What is kept in a process is a
replica's own: quotas count a key at each replica, and a job (`Prefer: respond-async`) is known to the replica that took
it alone, so ask for edits without it.

Ray holds `--queue` more requests than the replicas work on, and refuses the rest with 429 and Retry-After. What a
replica worked on when it was killed gets 503 with Retry-After, in the shape of clora's own errors; events of a job
break off. No other request is lost, and a new replica is started. An engine that dies alone (`engine: process`) is 503
and back by itself, as without Ray; a replica whose engine stays down for half a minute is replaced.

Ray itself answers 500 for a lost replica. The 503 is made by `Unanswered`, which Ray's proxies import from this file:
it has to be at the same path on every machine. Where Ray Serve runs already its proxies stay as they are.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from fastapi import FastAPI
from ray import serve
from ray.serve.config import BackpressureConfig, ControllerOptions, HTTPOptions
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from clora.jobs.serve import start_engine
from clora.serve.app import create_app
from clora.serve.guard import answer
from clora.serve.keys import read_keys
from clora.serve.problems import Problem
from clora.serve.server import check_binding
from clora.serve.service import Service
from clora.serve.settings import Settings, load_settings


@serve.ingress()
class Replica:
    """One server. `settings` come from the driver, files from the replica's own machine."""

    def __init__(self, settings: Settings) -> None:
        keys = None if settings.keys is None else read_keys(settings.keys)
        self.service = Service(settings, start_engine(settings), keys)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_app(self.service)

    def check_health(self) -> None:
        """Fails while the engine is down; a restarted one is back before Ray has asked three times."""
        if not self.service.is_ready:
            raise RuntimeError("the engine is down")

    def __del__(self) -> None:
        self.service.close()


class Unanswered:
    """Around all that a proxy of Ray does, which ends without an answer where a replica has died: this gives the 503.

    Ray may send an answer's head and its body apart, and a replica die between them, so the head waits for the first
    of the body. Bodies, events and disconnects pass as they come.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        head: Message | None = None
        has_begun = scope["type"] != "http"

        async def sent(message: Message) -> None:
            nonlocal head, has_begun
            if message["type"] == "http.response.start":
                head = message
                return
            if head is not None:
                await send(head)
            head, has_begun = None, True
            await send(message)

        await self._app(scope, receive, sent)
        if not has_begun:
            await answer(send, Problem(503, "the replica was stopped; try again", "engine_down", retry_after=2))


def middlewares() -> list[Middleware]:
    """What Ray is to put around each proxy."""
    return [Middleware(Unanswered)]


# Ray's one way to a proxy's middleware: a function to call, by the name of its module and its own.
HOOK = {"RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": f"{Path(__file__).stem}.{middlewares.__name__}"}


def build(settings: Settings, replicas: int, gpus: float, queue: int) -> serve.Application:
    """The application: `replicas` servers, each with `gpus`."""
    deployment = serve.deployment(
        Replica,
        name="clora",
        num_replicas=replicas,
        ray_actor_options={"num_gpus": gpus},
        max_ongoing_requests=settings.batches.denoise + settings.batches.max_queue,
        max_queued_requests=queue,
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=2),
        health_check_period_s=10,
        graceful_shutdown_timeout_s=settings.grace_seconds,
    )
    return deployment.bind(settings)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, help="settings of clora serve")
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--gpus", type=float, default=0, help="of a replica")
    parser.add_argument("--queue", type=int, default=64, help="requests that wait before the replicas, at most")
    parser.add_argument("--port", type=int, default=8000)
    options = parser.parse_args()
    settings = load_settings(options.config, {})
    check_binding(settings)
    serve.start(
        http_options=HTTPOptions(host=settings.host, port=options.port),
        controller_options=ControllerOptions(runtime_env={"env_vars": HOOK}),  # the proxies inherit it
    )
    serve.run(build(settings, options.replicas, options.gpus, options.queue), blocking=True)


if __name__ == "__main__":
    main()

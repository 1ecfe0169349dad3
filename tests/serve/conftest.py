"""Models that the tests of the server share, and ways to call one."""

from __future__ import annotations

import asyncio
import io
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import uvicorn
from fastapi import FastAPI
from PIL import Image

from clora.serve.app import create_app
from clora.serve.load import open_model
from clora.serve.models import Model, Parts
from clora.serve.service import Service
from clora.serve.settings import Batches, Limits, Settings
from clora.serve.threads import ThreadEngine
from tests.support.random_collection import write_random_collection

Answer = httpx.Response


@pytest.fixture(scope="session")
def small_base(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base of one random block, and a collection of the effects `a` and `b` for it: milliseconds an edit."""
    from tests.support.random_base import write_random_base

    folder = tmp_path_factory.mktemp("small")
    base = write_random_base(folder / "base", num_layers=1)
    return base, write_random_collection(base, folder / "collection.safetensors")


@pytest.fixture(scope="session")
def parts(small_base: tuple[Path, Path]) -> Parts:
    """`small_base` opened."""
    base, collection = small_base
    return open_model(Settings(base=str(base), collection=collection, dtype="float32", device="cpu"))


@pytest.fixture
def settings() -> Settings:
    """Settings without thumbnails; tests replace what they are about."""
    return Settings(thumbnails=False)


@pytest.fixture
def make_service(parts: Parts, settings: Settings) -> Iterator[Callable[..., Service]]:
    """Services over the small model, with settings of their own; closed at the end."""
    made: list[Service] = []

    def make(keys: dict[str, str] | None = None, opened: Parts = parts, **changes: Any) -> Service:
        limits = Limits(**changes.pop("limits", {}))
        batches = Batches(**changes.pop("batches", {}))
        own = settings.model_copy(update={"limits": limits, "batches": batches, **changes})
        made.append(Service(own, ThreadEngine({opened.offer.name: opened}, own), keys))
        return made[-1]

    yield make
    for service in made:
        service.close()


@pytest.fixture
def service(make_service: Callable[..., Service]) -> Service:
    """A service with the default settings."""
    return make_service()


def model_of(service: Service) -> Model:
    """The one model of a service whose engine is of threads."""
    assert isinstance(service.engine, ThreadEngine)
    [model] = service.engine.models.values()
    return model


def call(app: FastAPI | Service, talk: Callable[[httpx.AsyncClient], Awaitable[Any]], host: str = "localhost") -> Any:
    """What `talk` returns, with a client of the application in this process."""
    application = create_app(app) if isinstance(app, Service) else app

    async def run() -> Any:
        transport = httpx.ASGITransport(application)
        async with httpx.AsyncClient(transport=transport, base_url=f"http://{host}", timeout=60) as client:
            return await talk(client)

    return asyncio.run(run())


def post(app: FastAPI | Service, data: dict[str, Any], files: Any = None, **headers: str) -> Answer:
    """The answer to one edit of a small picture, or of `files`."""
    given = {"image": ("in.png", png())} if files is None else files

    async def talk(client: httpx.AsyncClient) -> Answer:
        return await client.post("/v1/images/edits", data=data, files=given, headers=headers)

    found: Answer = call(app, talk)
    return found


def png(seed: int = 0, size: tuple[int, int] = (64, 64)) -> bytes:
    """A smooth random picture as a PNG."""
    return encoded(picture(seed, size))


def picture(seed: int = 0, size: tuple[int, int] = (64, 64)) -> Image.Image:
    """A smooth random picture."""
    coarse = np.random.default_rng(seed).integers(0, 255, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


@contextmanager
def listening(service: Service) -> Iterator[str]:
    """The address of a service on a free port of this machine, in a thread of this process."""
    config = uvicorn.Config(create_app(service), port=0, log_config=None, ws="none")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)

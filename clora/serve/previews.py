"""The catalogue's pictures: one source, and what each effect makes of it, sampled by the server itself."""

from __future__ import annotations

import asyncio
import base64
import io
import logging
from pathlib import Path

from PIL import Image

from clora.config import general_data
from clora.data.images import SUFFIXES, load_image
from clora.errors import InputError
from clora.serve.engine import Work
from clora.serve.service import Service

log = logging.getLogger(__name__)

SIDE = 192  # pixels of a thumbnail, at most
SEED = 0
PAUSE = 0.05  # seconds between looks for a free engine
SECONDS = 600.0


async def make_previews(service: Service) -> None:
    """Fill `service.thumbnails`, one effect after the other, each when nothing else wants the engine.

    An effect whose picture fails is left without one.
    """
    loop = asyncio.get_running_loop()
    try:
        source = await loop.run_in_executor(service.pool, _source, service)
    except (InputError, OSError) as error:
        log.warning("no thumbnails: %s", type(error).__name__)
        return
    if source is None:
        log.warning("no thumbnails: the base brings no picture along; name one as thumbnail_image")
        return
    service.thumbnail_source = _data_url(source)
    wanted = [(offer.name, entry) for offer in service.offers.values() for entry in offer.collection.effects.values()]
    for model, entry in wanted:
        while service.jobs.running() or not service.is_ready:
            await asyncio.sleep(PAUSE)
        work = Work(model, (source,), entry.prompt, None, (SEED,), entry.name, SECONDS)
        try:
            [picture] = await service.engine.edit(work, lambda: None)
        except Exception as error:
            log.warning("no thumbnail of an effect: %s", type(error).__name__)
            continue
        service.thumbnails[model, entry.name] = _data_url(picture)


def _source(service: Service) -> Image.Image | None:
    """The picture of the settings, else the first that the base brings along."""
    settings = service.settings
    if settings.thumbnail_image is not None:
        return load_image(settings.thumbnail_image)
    base = next(iter(service.offers.values())).collection.base
    data = general_data(settings.base or base)
    folder = data if data is None or data.is_dir() else data.parent
    found = sorted(_pictures(folder)) if folder is not None else []
    return load_image(found[0]) if found else None


def _pictures(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES]


def _data_url(picture: Image.Image) -> str:
    small = picture.copy()
    small.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, "WEBP", quality=90)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"

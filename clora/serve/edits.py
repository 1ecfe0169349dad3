"""An edit from its upload to its pictures: read, check, decode, encode, denoise, decode, encode."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from urllib.parse import quote

from PIL import Image
from starlette.requests import Request

from clora.errors import InputError
from clora.serve.engine import EngineGone, Full, Late, Work
from clora.serve.jobs import Job
from clora.serve.pictures import encode_picture
from clora.serve.problems import Problem, bad
from clora.serve.requests import IMAGE_FIELDS, Edit, parse_edit
from clora.serve.service import Service
from clora.serve.uploads import Form, decode_picture, decoded_bytes, read_form

log = logging.getLogger(__name__)


async def start_edit(service: Service, request: Request, owner: str) -> Job:
    """Read and check a request, and start the job that it asks for; raises `Problem` for all that is wrong with it.

    Quotas come before the body is read, budgets and room in memory before a picture is decoded.
    """
    service.check_open()
    service.reserve(1)  # where not even one fits, without the work of reading what is sent
    with ExitStack() as held:
        held.enter_context(service.quotas.request(owner))
        with service.uploads.one() as upload:
            with _timed(service, "upload"):
                form = await read_form(request, service.settings.limits, upload)
            return await start_form(service, form, owner, held)


async def start_form(service: Service, form: Form, owner: str, held: ExitStack) -> Job:
    """Start the job that a form within its budgets asks for, however it came; `held` is closed when the job is over.

    Raises `Problem` for all that is wrong with the form, and then leaves `held` to its owner.
    """
    limits = service.settings.limits
    edit = parse_edit(form.fields, service.offers, limits, service.effects_at)
    contents = _contents(form)
    needed = await _in_pool(service, _bytes_needed, contents, limits)
    with ExitStack() as room:
        # No pause between what is looked at and what is taken, or two requests would take the same place.
        waiting = service.jobs.samples_in_flight()
        service.reserve(len(edit.seeds))
        room.enter_context(service.pictures.hold(needed, lambda: service.seconds_for(max(1, waiting))))
        num_steps = service.offers[edit.model].collection.num_steps
        job = service.jobs.add(owner, len(edit.seeds), len(edit.seeds) * num_steps)
        try:
            with _timed(service, "read_picture"):
                images = await _in_pool(service, _decode_all, contents, limits)
            service.check_open()
        except BaseException:
            service.jobs.drop(job)
            raise
        held.enter_context(room.pop_all())
    job.task = asyncio.create_task(_run(service, job, edit, images, held.pop_all()))
    return job


def _contents(form: Form) -> list[bytes]:
    """The files of the fields for pictures, in order."""
    for name in form.files:
        if name not in IMAGE_FIELDS:
            raise bad("a file is in a field that takes none; send pictures as image or image[]", name[:80])
    contents = [content for name in IMAGE_FIELDS for content in form.files.get(name, ())]
    if not contents:
        raise bad("image: there is none; send the picture to edit as a file", "image", "missing_image")
    return contents


def _bytes_needed(contents: list[bytes], limits: Any) -> int:
    """Of the pictures decoded, before anything is."""
    return sum(decoded_bytes(content, limits) for content in contents)


def _decode_all(contents: list[bytes], limits: Any) -> list[Image.Image]:
    return [decode_picture(content, number, limits) for number, content in enumerate(contents)]


async def _run(service: Service, job: Job, edit: Edit, images: list[Image.Image], held: ExitStack) -> None:
    """The job's task: it never raises, the job tells how it ended."""
    started = time.perf_counter()
    service.metrics.in_flight.inc()
    try:
        async with asyncio.timeout(service.settings.limits.queue_seconds):
            await _make(service, job, edit, images)
        service.metrics.phase.labels("edit").observe(time.perf_counter() - started)
        job.change("succeeded")
    except asyncio.CancelledError:
        if job.cancel_asked:
            job.problem = Problem(409, "the job was cancelled", "cancelled")
            job.change("cancelled")
        else:  # by the server's end, not by its owner
            job.problem = Problem(503, "the engine was stopped; try again", "engine_down", retry_after=2)
            job.change("failed")
    except Exception as error:
        job.problem = _problem_of(service, error)
        job.change("failed")
    finally:
        service.metrics.in_flight.dec()
        held.close()


async def _make(service: Service, job: Job, edit: Edit, images: list[Image.Image]) -> None:
    loop, seconds = asyncio.get_running_loop(), service.settings.limits.queue_seconds
    label = "+".join(edit.effects) or "prompt"
    work = Work(edit.model, tuple(images), edit.text, edit.size, edit.seeds, label, seconds)
    pictures = await service.engine.edit(work, lambda: job.note_step(loop))
    for name in edit.effects:
        service.metrics.effects.labels(name).inc(len(pictures))
    with _timed(service, "write_picture"):
        job.answer = await _in_pool(service, _answer, service, job, edit, pictures)
    job.headers = _headers(service, job, edit)


def _answer(service: Service, job: Job, edit: Edit, pictures: list[Image.Image]) -> dict[str, Any]:
    facts = service.facts(edit.model) | {"effect": list(edit.effects)}
    data = [
        {"b64_json": encode_picture(picture, edit.output_format, edit.quality, facts | {"seed": seed}), "seed": seed}
        for picture, seed in zip(pictures, edit.seeds, strict=True)
    ]
    width, height = pictures[0].size
    return {
        "created": int(job.created),
        "data": data,
        "output_format": edit.output_format,
        "size": f"{width}x{height}",
        **facts,
    }


def _headers(service: Service, job: Job, edit: Edit) -> dict[str, str]:
    """What made a result, as headers; names are percent-encoded, because they may hold anything."""
    facts = service.facts(edit.model)
    return {
        "x-clora-job": job.id,
        "x-clora-seed": ",".join(map(str, edit.seeds)),
        "x-clora-effect": ",".join(quote(name, safe="") for name in edit.effects),
        "x-clora-sampler": f"{facts['sampler']}; steps={facts['steps']}; shift={facts['shift']:g}",
        "x-clora-collection": facts["collection"],
    }


def _problem_of(service: Service, error: Exception) -> Problem:
    """What an error of the work means to whoever asked; no text of libraries or of files is handed on."""
    if isinstance(error, Problem):
        return error
    if isinstance(error, InputError):
        return bad(str(error))
    if isinstance(error, EngineGone):
        return Problem(503, "the engine was stopped; try again", "engine_down", retry_after=2)
    if isinstance(error, Full):
        message = "too many samples are waiting; try again"
        return Problem(503, message, "queue_full", retry_after=service.seconds_for(service.jobs.samples_in_flight()))
    if isinstance(error, Late | TimeoutError):
        seconds = service.settings.limits.queue_seconds
        return Problem(503, f"it was not done in {seconds:g} s; try again", "deadline_exceeded", retry_after=5)
    if isinstance(error, FloatingPointError):
        return Problem(500, "the model's output was not finite; try another seed or picture", "not_finite")
    log.error("an edit failed", exc_info=error)
    return Problem(503, "the engine failed; try again", "engine_failed", retry_after=2)


@contextmanager
def _timed(service: Service, phase: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    service.metrics.phase.labels(phase).observe(time.perf_counter() - started)


async def _in_pool(service: Service, work: Any, *arguments: Any) -> Any:
    """`work` in a thread, so that the event loop goes on."""
    return await asyncio.get_running_loop().run_in_executor(service.pool, work, *arguments)

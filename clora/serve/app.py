"""The routes: what is asked, by whom, and which part answers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Match

from clora import __version__
from clora.serve.edits import start_edit
from clora.serve.guard import Guard
from clora.serve.jobs import Job
from clora.serve.openapi import CATALOGUE, EDIT, EVENTS, JOB, METRICS, MODELS, describe_all, errors
from clora.serve.page_files import add_page
from clora.serve.previews import make_previews
from clora.serve.problems import Problem, bad
from clora.serve.service import Service

EXPOSED = ("x-clora-job", "x-clora-seed", "x-clora-effect", "x-clora-sampler", "x-clora-collection", "x-request-id")


def create_app(service: Service) -> FastAPI:
    """The application over a `Service`. Its lifespan watches the engine and makes the catalogue's thumbnails; requests
    need neither."""
    app = FastAPI(
        title="clora",
        version=__version__,
        summary="Many image effects from one model",
        docs_url=None,  # its page loads scripts from elsewhere
        redoc_url=None,
        lifespan=lambda app: _lifespan(service),
    )
    app.add_exception_handler(Problem, _on_problem)
    app.add_exception_handler(HTTPException, _on_http_error)
    _add_health(app, service)
    _add_catalogue(app, service)
    _add_edits(app, service)
    _add_jobs(app, service)
    if service.settings.page:
        add_page(app)
    describe_all(app, service)
    app.add_middleware(Guard, service=service)
    if service.settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=service.settings.cors_origins,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["authorization", "prefer"],
            expose_headers=EXPOSED,
        )
    return app


@asynccontextmanager
async def _lifespan(service: Service) -> AsyncIterator[None]:
    tasks = [asyncio.create_task(service.watch())]
    if service.settings.thumbnails:
        tasks.append(asyncio.create_task(make_previews(service)))
    yield
    for task in tasks:
        task.cancel()
    for task in tasks:
        with suppress(asyncio.CancelledError):
            await task


async def _on_problem(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, Problem)
    request.scope["clora.code"] = error.code
    return JSONResponse(error.to_json(), error.status, headers=error.headers())


async def _on_http_error(request: Request, error: Exception) -> JSONResponse:
    """What the router refuses, in the same shape."""
    assert isinstance(error, HTTPException)
    what = {404: "there is nothing at this address", 405: "this address does not take that method"}
    problem = bad(what.get(error.status_code, "the request is not right"), code="unknown_url", status=error.status_code)
    request.scope["clora.code"] = problem.code
    headers = dict(error.headers or {})
    if error.status_code == 405:  # the router tells the methods of the first of an address's routes alone
        routes = [route for route in request.app.routes if route.matches(request.scope)[0] is not Match.NONE]
        headers["Allow"] = ", ".join(sorted({method for route in routes for method in route.methods}))
    return JSONResponse(problem.to_json(), problem.status, headers=headers)


def _add_health(app: FastAPI, service: Service) -> None:
    @app.get("/livez", summary="Does the process answer?", tags=["health"])
    async def livez() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/readyz", summary="Are edits taken?", tags=["health"], responses=errors(503))
    async def readyz() -> JSONResponse:
        ready = service.is_ready
        return JSONResponse({"status": "ok" if ready else "not ready"}, 200 if ready else 503)

    @app.get("/metrics", summary="Counters for Prometheus", tags=["health"], responses=METRICS | errors(401))
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)


def _add_catalogue(app: FastAPI, service: Service) -> None:
    def model(name: str) -> dict[str, Any]:
        facts = service.facts(name)
        return {"id": facts.pop("model"), "object": "model", "created": 0, "owned_by": "clora", **facts}

    @app.get("/v1/models", summary="The models", tags=["catalogue"], responses=MODELS | errors(401))
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model(name) for name in service.offers]}

    @app.get("/v1/models/{name:path}", summary="One model", tags=["catalogue"], responses=errors(401, 404))
    async def one_model(name: str) -> dict[str, Any]:
        if name not in service.offers:
            raise bad("there is no such model; GET /v1/models lists them", "model", "model_not_found", 404)
        return model(name)

    @app.get("/v1/effects", summary="The effects, with pictures", tags=["catalogue"], responses=CATALOGUE | errors(401))
    async def effects() -> dict[str, Any]:
        limits, offers = service.settings.limits, service.offers.values()
        return {
            "object": "list",
            "before": service.thumbnail_source,
            "data": [
                {"id": entry.name, "object": "effect", "model": offer.name, "trigger": entry.trigger}
                | {"after": service.thumbnails.get((offer.name, entry.name))}
                for offer in offers
                for entry in offer.collection.effects.values()
            ],
            "limits": {
                "samples": limits.samples,
                "images": limits.images,
                "image_bytes": limits.image_bytes,
                "image_pixels": limits.image_pixels,
                "result_pixels": min(offer.result_pixels for offer in offers),
                "prompt_chars": limits.prompt_chars,
            },
        }


def _add_edits(app: FastAPI, service: Service) -> None:
    @app.post("/v1/images/edits", tags=["edits"], **EDIT)
    async def edit(request: Request) -> Response:
        job = await start_edit(service, request, request.scope["clora.owner"])
        request.scope["clora.job"] = job.id
        if _prefers_a_job(request):
            place = f"/v1/jobs/{job.id}"
            headers = {"location": place, "preference-applied": "respond-async"}
            return JSONResponse(service.jobs.describe(job), 202, headers=headers)
        try:
            await _finish(job, request)
            return _result(job)
        finally:
            service.jobs.drop(job)


def _prefers_a_job(request: Request) -> bool:
    """Whether `respond-async` is among the preferences (RFC 7240): a list, over several headers too, each with
    parameters."""
    given = ",".join(request.headers.getlist("prefer")).split(",")
    return "respond-async" in {one.split(";")[0].strip().lower() for one in given}


def _add_jobs(app: FastAPI, service: Service) -> None:
    @app.get("/v1/jobs/{id}", summary="Where a job stands", tags=["jobs"], responses=JOB | errors(401, 404))
    async def one_job(id: str, request: Request) -> dict[str, Any]:
        return service.jobs.describe(service.jobs.find(request.scope["clora.owner"], id))

    @app.get(
        "/v1/jobs/{id}/events", summary="Its progress as it comes", tags=["jobs"], responses=EVENTS | errors(401, 404)
    )
    async def events(id: str, request: Request) -> Response:
        job = service.jobs.find(request.scope["clora.owner"], id)
        return StreamingResponse(service.jobs.events(job), media_type="text/event-stream")

    @app.get("/v1/jobs/{id}/result", summary="Its pictures", tags=["jobs"], responses=errors(401, 404, 409, 503))
    async def result(id: str, request: Request) -> Response:
        job = service.jobs.find(request.scope["clora.owner"], id)
        if not job.is_over:
            raise Problem(409, "the job is not done yet; look at its events", "not_done", retry_after=1)
        return _result(job)

    @app.delete("/v1/jobs/{id}", summary="Cancel it", tags=["jobs"], responses=JOB | errors(401, 404))
    async def cancel(id: str, request: Request) -> dict[str, Any]:
        job = service.jobs.find(request.scope["clora.owner"], id)
        job.cancel()
        if job.task is not None:
            await asyncio.wait([job.task], timeout=5)
        return service.jobs.describe(job)


def _result(job: Job) -> Response:
    """A finished job's pictures; raises the `Problem` of one that failed."""
    job.is_fetched = True
    if job.problem is not None:
        raise job.problem
    return JSONResponse(job.answer, headers=job.headers)


async def _finish(job: Job, request: Request) -> None:
    """Wait for a job; where the client goes first, the job is cancelled."""
    assert job.task is not None
    gone = asyncio.create_task(_gone(request))
    try:
        await asyncio.wait({job.task, gone}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        gone.cancel()
        job.cancel()  # nothing, where it is over
    await asyncio.wait({job.task})


async def _gone(request: Request) -> None:
    """Until the client has disconnected; the body has been read by then."""
    while (await request.receive())["type"] != "http.disconnect":
        pass

"""The model that NVIDIA Triton runs, as its Python backend wants it; `triton_repository` says where Triton finds it.

Triton calls `execute` in a thread of its own and wants it back at once. Requests are handed to an event loop in another
thread, where they go the way of an edit over HTTP: the same fields, budgets and checks, and one engine for all of them,
so that requests of different effects share every step of the model. Each is answered once, when it is done.

The engine is in this process: Triton runs a model in a process apart from the server's.
"""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import os
import threading
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import numpy as np

from clora.errors import InputError
from clora.serve.edits import start_form
from clora.serve.jobs import Job
from clora.serve.load import open_models
from clora.serve.problems import Problem, bad
from clora.serve.service import Service
from clora.serve.settings import Settings, load_settings
from clora.serve.threads import ThreadEngine
from clora.serve.triton_repository import INPUTS
from clora.serve.uploads import Form, check_form

log = logging.getLogger("clora.serve")

CLOSING = 5.0  # seconds for answers to be sent once their work is over
LOOK = 0.2  # seconds between looks whether a request was cancelled
OWNER = "triton"  # of all jobs: who may ask, and how often, is the business of what stands before Triton
EFFECTS_AT = "the parameter effects in the model's configuration"
CODES = {404: "NOT_FOUND", 409: "CANCELLED", 500: "INTERNAL", 503: "UNAVAILABLE"}  # the others are the client's to mend

Values = dict[str, list[Any]]
"""What a request's inputs hold, by their names."""


def settings_of(args: Mapping[str, str]) -> Settings:
    """The settings that a model's configuration asks for; `args` are those of `initialize`.

    Parameters are `artefact`, a folder of `clora export`, and `settings`, a file as of `clora serve --config`: one of
    them at least. Paths start from the model's folder. Raises `InputErrors` for what cannot be served.
    """
    folder, name = Path(args["model_repository"]), args["model_name"]
    parameters = json.loads(args["model_config"]).get("parameters", {})
    given = {key: parameters[key]["string_value"] for key in ("artefact", "settings") if key in parameters}
    paths = {key: Path(os.path.abspath(folder / value)) for key, value in given.items()}
    if not paths:
        raise InputError(f"{name}: its configuration has neither artefact nor settings; give one of these parameters")
    own = {"artefact": paths.get("artefact"), "name": name, "engine": "thread"}
    settings = load_settings(paths.get("settings"), own)
    if settings.groups is not None:
        raise InputError(f"{name}: groups are several models; write one for each collection")
    return settings


def read_values(request: Any) -> Values:
    """A copy of a request's inputs, which are Triton's again once `execute` is over."""
    tensors = {port.name: _backend().get_input_tensor_by_name(request, port.name) for port in INPUTS}
    return {name: tensor.as_numpy().reshape(-1).tolist() for name, tensor in tensors.items() if tensor is not None}


def form_of(values: Values) -> Form:
    """The form that an HTTP client would have sent for these values; `Problem` for a text that is no UTF-8."""
    form = Form({}, {"image": values.get("image", [])})
    for name in values.keys() - {"image"}:
        try:
            texts = [value.decode() if isinstance(value, bytes) else str(value) for value in values[name]]
        except UnicodeDecodeError as error:
            raise bad(f"{name}: is not UTF-8; encode it so", name) from error
        form.fields[name] = texts
    return form


class TritonPythonModel:
    """What Triton makes one of, and calls: `initialize` once, `execute` for requests, `finalize` at the end."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Open the model; raises Triton's own exception, with one sentence, where it cannot be opened."""
        try:
            settings = settings_of(args)
            engine = ThreadEngine(open_models(settings), settings)
        except InputError as error:
            raise _backend().TritonModelException("; ".join(error.faults)) from None
        self.service = Service(settings, engine, effects_at=EFFECTS_AT)
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop = asyncio.new_event_loop()
        self._watching = self._loop.create_task(self.service.watch())
        self._thread = threading.Thread(target=self._loop.run_forever, name="edits", daemon=True)
        self._thread.start()

    def execute(self, requests: list[Any]) -> None:
        """Take requests; each is answered through its sender, once. Nothing is raised: Triton would fail them all."""
        for request in requests:
            sender = request.get_response_sender()
            values: Values | Problem
            try:
                values, seconds = read_values(request), request.timeout() / 1e6
            except Exception as error:
                log.error("a request could not be read", exc_info=error)
                values, seconds = Problem(500, "the request could not be read; send it again", "unreadable"), 0.0
            self._loop.call_soon_threadsafe(self._begin, values, seconds, sender)

    def finalize(self) -> None:
        """Let requests end within `grace_seconds`, refuse those that have not, and end the engine and all threads."""
        ending = asyncio.run_coroutine_threadsafe(self._drain(), self._loop)
        with suppress(TimeoutError):
            ending.result(self.service.settings.grace_seconds + 2 * CLOSING)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(CLOSING)
        if not self._thread.is_alive():
            self._loop.close()
        self.service.close()

    # In the event loop's thread

    def _begin(self, values: Values | Problem, seconds: float, sender: Any) -> None:
        task = self._loop.create_task(self._answer(values, seconds, sender))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _answer(self, values: Values | Problem, seconds: float, sender: Any) -> None:
        """Work on one request, and send what came of it."""
        try:
            response = _response(await self._edit(values, seconds, sender))
        except Problem as problem:
            response = _refusal(problem)
        except Exception as error:
            log.error("a request failed", exc_info=error)
            response = _refusal(Problem(500, "the request failed; try again", "failed"))
        try:
            await asyncio.to_thread(sender.send, response, flags=_backend().TRITONSERVER_RESPONSE_COMPLETE_FINAL)
        except Exception as error:
            log.error("an answer could not be sent", exc_info=error)

    async def _edit(self, values: Values | Problem, seconds: float, sender: Any) -> dict[str, Any]:
        """The answer that HTTP would have given; raises `Problem` as its routes do."""
        if isinstance(values, Problem):
            raise values
        service = self.service
        service.check_open()
        service.reserve(1)  # where not even one fits, without the work of reading what was sent
        form = form_of(values)
        check_form(form, service.settings.limits)
        job = await start_form(service, form, OWNER, ExitStack())
        assert job.task is not None
        try:
            await self._wait(job, job.task, seconds, sender)
        finally:
            job.cancel()  # unless it is over
            await asyncio.wait({job.task})
            service.jobs.drop(job)
        if job.answer is None:
            raise job.problem or Problem(503, "the engine was stopped; try again", "engine_down")
        return job.answer

    async def _wait(self, job: Job, task: asyncio.Task[None], seconds: float, sender: Any) -> None:
        """Until the job is over: by itself, or because its request was cancelled. Raises `Problem` where that takes
        longer than `seconds` (0: no end)."""
        end = self._loop.time() + seconds if seconds else float("inf")
        while not task.done():
            if await asyncio.to_thread(sender.is_cancelled):
                job.cancel()
            elif self._loop.time() > end:
                raise Problem(503, f"it was not done in {seconds:g} s; try again", "deadline_exceeded")
            await asyncio.wait({task}, timeout=min(LOOK, max(0.0, end - self._loop.time())))

    async def _drain(self) -> None:
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=self.service.settings.grace_seconds)
        self.service.is_draining = True  # whatever comes now is refused
        for job in self.service.jobs.running():
            if job.task is not None:
                job.task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=CLOSING)
        self._watching.cancel()


def _response(answer: dict[str, Any]) -> Any:
    """The outputs: the results as PNGs, their seeds, and as JSON what made them."""
    data = answer.pop("data")
    outputs = {
        "pictures": np.array([base64.b64decode(one["b64_json"]) for one in data], np.object_),
        "seeds": np.array([one["seed"] for one in data], np.int64),
        "made_by": np.array([json.dumps(answer).encode()], np.object_),
    }
    backend = _backend()
    return backend.InferenceResponse([backend.Tensor(name, values) for name, values in outputs.items()])


def _refusal(problem: Problem) -> Any:
    """One sentence and one of Triton's codes."""
    backend = _backend()
    code = getattr(backend.TritonError, CODES.get(problem.status, "INVALID_ARG"))
    return backend.InferenceResponse([], backend.TritonError(problem.message, code))


def _backend() -> Any:
    """Triton's own module, which is there where Triton runs this."""
    import triton_python_backend_utils

    return triton_python_backend_utils

"""What the routes take and answer, for `/openapi.json`: schemas and examples."""

from __future__ import annotations

import json
from typing import Any

from fastapi import FastAPI

from clora.serve.requests import FIXED
from clora.serve.service import Service

MEANINGS = {
    400: "A field or a picture is wrong",
    401: "No valid API key",
    404: "There is no such thing",
    408: "The body did not arrive in time",
    409: "Not in this state",
    413: "Beyond a budget of bytes",
    415: "Not multipart/form-data",
    429: "Too many requests of this key",
    503: "Too busy, or shutting down; see Retry-After",
}
ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": "string"},
                "nearest": {"type": "array", "items": {"type": "string"}},
            },
        }
    },
}


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The refusals of a route."""
    content = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    return {status: {"description": MEANINGS[status], "content": content} for status in statuses}


def _answers(description: str, example: Any, status: int = 200) -> dict[int | str, dict[str, Any]]:
    content = {"application/json": {"schema": {"type": "object"}, "example": example}}
    return {status: {"description": description, "content": content}}


def _lines(description: str, kind: str, example: str) -> dict[int | str, dict[str, Any]]:
    return {200: {"description": description, "content": {kind: {"schema": {"type": "string"}, "example": example}}}}


COLLECTION = f"sha256:{'0' * 8}..."
JOB_EXAMPLE = {
    "id": "job_0123456789abcdef0123456789abcdef",
    "object": "image.edit.job",
    "status": "running",
    "created": 1790000000,
    "position": 0,
    "samples": 1,
    "steps": 3,
    "steps_in_all": 8,
    "progress": 0.375,
    "error": None,
}
JOB = _answers("The job", JOB_EXAMPLE)
EVENTS = _lines(
    "The job whenever it changes, until it is over",
    "text/event-stream",
    f"event: job\ndata: {json.dumps(JOB_EXAMPLE)}\n\n",
)
METRICS = _lines("In Prometheus' format", "text/plain", "clora_ready 1.0\n")
MODELS = _answers(
    "The models",
    {"object": "list", "data": [{"id": "clora", "object": "model", "created": 0, "owned_by": "clora",
                                 "collection": COLLECTION, "sampler": "consistency", "steps": 8, "shift": 3.0}]},
)  # fmt: skip
CATALOGUE = _answers(
    "Names, triggers and pictures; `after` is null until it is made",
    {"object": "list", "before": "data:image/webp;base64,...",
     "data": [{"id": "sepia", "object": "effect", "model": "clora", "trigger": "<sepia_Ab12Cd>",
               "after": "data:image/webp;base64,..."}],
     "limits": {"samples": 4, "images": 4}},
)  # fmt: skip
_RESULT = {
    "created": 1790000000,
    "data": [{"b64_json": "iVBORw0KGgo...", "seed": 7}],
    "output_format": "png",
    "size": "64x64",
    "model": "clora",
    "collection": COLLECTION,
    "sampler": "consistency",
    "steps": 8,
    "shift": 3.0,
    "effect": ["sepia"],
}


def _text(description: str, **more: Any) -> dict[str, Any]:
    return {"type": "string", "description": description, **more}


_FILE = {"type": "string", "format": "binary"}
_FIELDS: dict[str, Any] = {
    "image": _FILE | {"description": "The picture to edit: PNG, JPEG or WebP."},
    "image[]": {
        "type": "array",
        "items": _FILE,
        "description": "Several pictures: the last is edited, the others are shown before it.",
    },
    "effect": {
        "type": "array",
        "items": {"type": "string"},
        "maxItems": 2,
        "description": "One or two names of /v1/effects; also as one value with a comma.",
    },
    "prompt": _text("An instruction, where no effect is named."),
    "model": _text("A name of /v1/models; may be left out where one model alone has the effects."),
    "n": {"type": "integer", "minimum": 1, "default": 1, "description": "Results, of seeds seed, seed + 1, ..."},
    "seed": {"type": "integer", "minimum": 0, "description": "Of the noise; drawn where it is left out."},
    "size": _text("auto (the picture's shape) or WIDTHxHEIGHT.", default="auto"),
    "steps": {"type": "integer", "description": "The model's own number, or left out."},
    "response_format": _text("b64_json alone.", enum=["b64_json"]),
    "output_format": _text("Of the results.", enum=["png", "jpeg", "webp"], default="png"),
    "output_compression": {"type": "integer", "minimum": 0, "maximum": 100, "default": 95},
    "user": _text("Taken and not used.", maxLength=256),
    **{name: _text("For OpenAI's clients.", enum=list(allowed)) for name, allowed in FIXED.items()},
}
EDIT: dict[str, Any] = {
    "summary": "Edit a picture",
    "description": "As OpenAI's `images.edit`, with `effect` and `seed`. With the header `Prefer: respond-async` the"
    " answer is a job, 202.",
    "responses": _answers("The results", _RESULT)
    | _answers("The job, where it was preferred", JOB_EXAMPLE, 202)
    | errors(400, 401, 404, 408, 413, 415, 429, 503),
    "openapi_extra": {
        "requestBody": {
            "required": True,
            "content": {
                "multipart/form-data": {
                    "schema": {"type": "object", "properties": _FIELDS, "additionalProperties": False},
                    "example": {"effect": ["sepia"], "seed": 7, "n": 1},
                }
            },
        }
    },
}


def describe_all(app: FastAPI, service: Service) -> None:
    """Complete the application's schema: errors, keys, the effects' names."""
    schema = app.openapi()
    schema.setdefault("components", {}).setdefault("schemas", {})["Error"] = ERROR
    schema["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    if service.keys is not None:
        schema["security"] = [{"key": []}]
        for place in ("/livez", "/readyz"):
            schema["paths"][place]["get"]["security"] = []
    app.openapi_schema = schema

"""How a server is set up: every setting with its default, from `serve.yaml` and the command line."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from clora.config import BaseConfig
from clora.errors import InputError, InputErrors, did_you_mean, nearest
from clora.io.text import read_yaml

Seconds = Annotated[float, Field(gt=0, le=86400)]
Count = Annotated[int, Field(ge=1, le=1_000_000)]
MiB = 1 << 20
MODELS = ("artefact", "collection", "groups")  # of which a server has one
PATHS = (*MODELS, "signed_by", "keys", "thumbnail_image")


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Batches(_Section):
    """How many samples are worked on together. `max_queue` counts those that wait for their first step; an artefact's
    own limit bounds `denoise`."""

    denoise: Annotated[int, Field(ge=1, le=64)] = 8
    encode: Annotated[int, Field(ge=1, le=64)] = 8
    decode: Annotated[int, Field(ge=1, le=64)] = 8
    max_queue: Count = 64


class Limits(_Section):
    """What one request, and one key, may ask for. Rates are per minute. `result_pixels` None: those of the base.
    `queue_seconds` is what a sample may wait and be sampled for, `upload_seconds` what a body may take to arrive,
    `waiting_bytes` what the decoded pictures of all edits together may take in memory."""

    body_bytes: Annotated[int, Field(ge=1024)] = 32 * MiB
    image_bytes: Annotated[int, Field(ge=1024)] = 16 * MiB
    image_pixels: Annotated[int, Field(ge=256, le=1 << 28)] = 1 << 25
    images: Annotated[int, Field(ge=1, le=16)] = 4
    samples: Annotated[int, Field(ge=1, le=64)] = 4
    prompt_chars: Annotated[int, Field(ge=1, le=20000)] = 4000
    result_pixels: Annotated[int, Field(ge=256, le=1 << 26)] | None = None
    requests_per_minute: Count = 600
    burst: Count = 60
    concurrent: Count = 16
    uploads: Count = 16
    connections: Count = 512
    waiting_bytes: Annotated[int, Field(ge=1 << 20)] = 1024 * MiB
    upload_seconds: Seconds = 30
    queue_seconds: Seconds = 120
    result_seconds: Seconds = 600
    results_kept: Count = 256


class Settings(_Section):
    """A server's settings. `artefact`, `collection`, `groups` (a groups.json: several collections): at most one; none
    serves the base's own collection. `engine`: the models in a process of their own, or in threads of the server's.
    `keys`: a file of `clora serve --new-key`. `cors_origins`: pages of other sites that may call. `allowed_hosts`: the
    names it answers to; by default those of this machine where it is bound to it, else any."""

    artefact: Path | None = None
    signed_by: Path | None = None
    collection: Path | None = None
    groups: Path | None = None
    base: str | None = None
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/-]{0,95}$")] = "clora"
    engine: Literal["process", "thread"] = "process"
    device: str | None = None
    dtype: Literal["float32", "bfloat16"] | None = None
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    keys: Path | None = None
    open_to_all: bool = False
    allowed_hosts: tuple[str, ...] | None = None
    cors_origins: tuple[str, ...] = ()
    grace_seconds: Seconds = 30
    stall_seconds: Seconds = 120
    start_seconds: Seconds = 900
    decode_threads: Annotated[int, Field(ge=1, le=64)] = 2
    thumbnails: bool = True
    thumbnail_image: Path | None = None
    page: bool = True
    batches: Batches = Batches()
    limits: Limits = Limits()

    @field_validator("allowed_hosts")
    @classmethod
    def _host_names(cls, values: tuple[str, ...] | None) -> tuple[str, ...] | None:
        return None if values is None else tuple(map(_host_name, values))


def _host_name(value: str) -> str:
    """As it stands in a `Host` header once case, port and brackets are taken off; ValueError for what is none."""
    name = value.strip().lower()
    if name.startswith("[") and name.endswith("]"):
        name = name[1:-1]
    if not name or name.count(":") == 1 or any(mark in name for mark in "/[]@* "):
        raise ValueError(f"{value!r} is no name of a host; leave scheme, port and wildcards out")
    return name


def load_settings(path: Path | None, given: Mapping[str, Any]) -> Settings:
    """The settings of a YAML file with those `given` over them (None is not given): a model that is given replaces the
    file's, of whatever kind. Paths in the file start from its folder. Raises `InputErrors` with every fault under its
    dotted key."""
    values: dict[str, Any] = {}
    where = "settings"
    if path is not None:
        where = str(path)
        values = _read(path)
    given = {key: value for key, value in given.items() if value is not None}
    if any(key in given for key in MODELS):
        values = {key: value for key, value in values.items() if key not in (*MODELS, "signed_by")}
    values |= given
    try:
        settings = Settings.model_validate(values)
    except ValidationError as error:
        raise InputErrors([f"{where}: {_fault(item)}" for item in error.errors()]) from error
    return settings


def _read(path: Path) -> dict[str, Any]:
    """What a settings file says, its paths made absolute."""
    text = read_yaml(path)
    try:
        loaded = yaml.safe_load(text) or {}
    # Of a date of month 99, a tag of Python's, a list as a key the loader raises what it likes.
    except Exception as error:
        what = getattr(error, "problem", None) or error
        mark = getattr(error, "problem_mark", None)
        line = "" if mark is None else f" line {mark.line + 1}"
        raise InputError(f"{path}{line}: holds a value that is none ({what}); quote it, or correct it") from error
    if not isinstance(loaded, dict):
        raise InputErrors([f"{path}: must hold 'key: value' lines, such as 'port: 8000'"])
    values = {str(key): value for key, value in loaded.items()}
    folder = path.absolute().parent
    for key in PATHS:
        if isinstance(values.get(key), str):
            values[key] = folder / Path(values[key]).expanduser()
    if isinstance(values.get("base"), str) and values["base"]:
        # As a training configuration names one: a folder beside the file, a bundled base or a hub id.
        values["base"] = BaseConfig.model_validate({"model": values["base"]}, context={"folder": folder}).model
    return values


def _fault(item: Any) -> str:
    """One of pydantic's errors as a sentence, with the nearest key for an unknown one."""
    place = ".".join(str(part) for part in item["loc"])
    if item["type"] != "extra_forbidden":
        return f"{place}: {item['msg'].removeprefix('Value error, ')}"
    sections: dict[str, type[BaseModel]] = {"limits": Limits, "batches": Batches}
    section = sections.get(str(item["loc"][0]), Settings)
    name = str(item["loc"][-1])
    known = section.model_fields
    return f"{place}: is no setting; {did_you_mean(name, known) if nearest(name, known) else 'see docs/SERVING.md'}"

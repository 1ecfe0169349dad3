"""How a server is set up: every setting with its default, from `serve.yaml` and the command line."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from clora.errors import InputErrors, did_you_mean, nearest
from clora.io.text import read_yaml

Seconds = Annotated[float, Field(gt=0, le=86400)]
Count = Annotated[int, Field(ge=1, le=1_000_000)]
MiB = 1 << 20


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
    `queue_seconds` is what a sample may wait and be sampled for, `upload_seconds` what a body may take to arrive."""

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
    decode_threads: Annotated[int, Field(ge=1, le=64)] = 2
    thumbnails: bool = True
    thumbnail_image: Path | None = None
    page: bool = True
    batches: Batches = Batches()
    limits: Limits = Limits()


def load_settings(path: Path | None, given: Mapping[str, Any]) -> Settings:
    """The settings of a YAML file with those `given` over them (None is not given); paths in the file start from its
    folder. Raises `InputErrors` with every fault under its dotted key."""
    values: dict[str, Any] = {}
    where = "settings"
    if path is not None:
        where = str(path)
        loaded = yaml.safe_load(read_yaml(path)) or {}
        if not isinstance(loaded, dict):
            raise InputErrors([f"{path}: must hold 'key: value' lines, such as 'port: 8000'"])
        values = {str(key): value for key, value in loaded.items()}
        for key in ("artefact", "signed_by", "collection", "groups", "keys", "thumbnail_image"):
            if isinstance(values.get(key), str):
                values[key] = path.absolute().parent / Path(values[key]).expanduser()
    values |= {key: value for key, value in given.items() if value is not None}
    try:
        settings = Settings.model_validate(values)
    except ValidationError as error:
        raise InputErrors([f"{where}: {_fault(item)}" for item in error.errors()]) from error
    return settings


def _fault(item: Any) -> str:
    """One of pydantic's errors as a sentence, with the nearest key for an unknown one."""
    place = ".".join(str(part) for part in item["loc"])
    if item["type"] != "extra_forbidden":
        return f"{place}: {item['msg']}"
    sections: dict[str, type[BaseModel]] = {"limits": Limits, "batches": Batches}
    section = sections.get(str(item["loc"][0]), Settings)
    name = str(item["loc"][-1])
    known = section.model_fields
    return f"{place}: is no setting; {did_you_mean(name, known) if nearest(name, known) else 'see docs/SERVING.md'}"

"""Where a base model lies, and what its optional `clora.json` says."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from clora.errors import InputError, InputErrors
from clora.io.text import parse_json, read_text

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+$")
Side = Annotated[int, Field(ge=16, le=8192)]


class BaseSidecar(BaseModel):
    """Image sizes of a base, from `clora.json` beside its `model_index.json`; the defaults are the stock
    pipeline's.

    vae_image_area, condition_image_area: pixels that a reference image is scaled to for the VAE and for the
    text encoder's eye. default_size: (height, width) of a result when no image says otherwise. preset: the
    preset a configuration gets that names none. general, acceleration, collection: paths inside the folder of
    data for the general stream, of an acceleration LoRA and of a collection, where a base brings its own.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    vae_image_area: int = Field(1024 * 1024, ge=256)
    condition_image_area: int = Field(384 * 384, ge=256)
    default_size: tuple[Side, Side] = (1024, 1024)
    preset: str | None = None
    general: str | None = None
    acceleration: str | None = None
    collection: str | None = None


def resolve_base(base: str | Path) -> Path | str:
    """The directory of a base model in diffusers format, or a hub id.

    A single word names a base bundled with clora (`clora/WORD/base`) if there is one. Otherwise a directory
    with a `model_index.json`, or `OWNER/NAME` on the hub; anything else raises `InputError`.
    """
    name = str(base)
    if name.isidentifier():
        bundled = Path(__file__).parents[1] / name / "base"
        if (bundled / "model_index.json").is_file():
            return bundled
    folder = Path(base).expanduser()
    if folder.is_dir():
        if not (folder / "model_index.json").is_file():
            raise InputError(f"base {folder}: no model_index.json in it; give a model folder in diffusers format")
        return folder
    if _HUB_ID.match(name):
        return name
    raise InputError(f"base {name!r} is no bundled base, folder or hub id; give 'tiny', a folder or OWNER/NAME")


def default_preset(base: str) -> str | None:
    """The preset that a base names for itself; None for one that names none or is not there."""
    try:
        folder = resolve_base(base)
    except InputError:
        return None
    return read_sidecar(folder).preset if isinstance(folder, Path) else None


def general_data(base: str) -> Path | None:
    """The data for the general stream that a base brings along, if any."""
    return _brought_along(base, "general")


def acceleration_lora(base: str) -> Path | None:
    """The acceleration LoRA that a base brings along, if any."""
    return _brought_along(base, "acceleration")


def collection_lora(base: str) -> Path | None:
    """The collection of effects that a base brings along, if any."""
    return _brought_along(base, "collection")


def _brought_along(base: str, what: str) -> Path | None:
    folder = resolve_base(base)
    if not isinstance(folder, Path):
        return None
    relative = getattr(read_sidecar(folder), what)
    path = folder / relative if relative else None
    return path if path is not None and path.exists() else None


def read_sidecar(folder: Path | str) -> BaseSidecar:
    """The sizes in `folder/clora.json`, the defaults without that file or for a hub id."""
    path = Path(folder) / "clora.json"
    if not path.is_file():
        return BaseSidecar.model_validate({})
    try:
        return BaseSidecar.model_validate(parse_json(read_text(path)))
    except ValidationError as error:
        places = [(".".join(map(str, item["loc"])), item["msg"]) for item in error.errors()]
        raise InputErrors([f"{path}: {place}: {message}" for place, message in places]) from error
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON: {error}") from error


def base_identity(base: str, revision: str | None) -> str:
    """A hash that changes with the base's models: names, sizes, configurations and the heads of weight files.

    General data and LoRAs that the base brings along (weight files outside its parts' folders) change nothing.
    """
    resolved = resolve_base(base)
    if not isinstance(resolved, Path):
        return f"{resolved}@{revision or 'main'}"
    digest = hashlib.sha256()
    models = (p for p in resolved.rglob("*") if p.is_file() and "general" not in p.parts)
    for path in sorted(p for p in models if p.parent != resolved or p.suffix != ".safetensors"):
        digest.update(f"{path.relative_to(resolved)} {path.stat().st_size}\n".encode())
        with path.open("rb") as file:
            digest.update(file.read(1 << 20))
    return digest.hexdigest()

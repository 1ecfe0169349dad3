"""The catalogue of a collection: which effects its one LoRA holds and how to ask for them.

It travels in the LoRA file's header metadata as JSON under `clora.catalogue`, so that base + one file are all
that editing, evaluation, export and serving need.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from clora.errors import InputError, InputErrors, did_you_mean
from clora.io.safetensors import read_header
from clora.io.text import parse_json
from clora.lora.files import CATALOGUE_KEY, write_lora
from clora.lora.inspection import inspect_lora
from clora.lora.module import LoraModule
from clora.lora.peft_folder import weights_file
from clora.method import prompts

FORMAT_VERSION = 1


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class CatalogueEntry(_Record):
    """One effect: its name for users, and trigger and prompt for the student (Eq. 5)."""

    name: str = Field(min_length=1, max_length=200)
    trigger: str = ""
    student_prompt: str
    teacher_sha256: str | None = Field(None, pattern=r"^[0-9a-f]{64}$")

    @model_validator(mode="after")
    def _says_something(self) -> CatalogueEntry:
        if not self.prompt.strip():
            raise ValueError("trigger and student_prompt are both empty")
        return self

    @property
    def prompt(self) -> str:
        """What the student reads, Eq. 5: trigger and student prompt as `clora.method.prompts.student_prompt` joins
        them."""
        return prompts.student_prompt(self.trigger, self.student_prompt)


class CatalogueSchedule(_Record):
    """The few-step schedule the collection was distilled for (`clora.method.flow.few_step_sigmas`)."""

    num_steps: int = Field(ge=1, le=1000)
    shift: float = Field(gt=0)


class Catalogue(_Record):
    """Everything a user of the file must know. `sampler`: consistency re-noises to each next sigma, euler
    does not. `version` counts the file's own editions: 1 as distilled, one more for each `clora extend`."""

    format_version: Literal[1] = 1
    version: Annotated[int, Field(ge=1)] = 1
    base: str = Field(min_length=1)
    schedule: CatalogueSchedule
    sampler: Literal["consistency", "euler"] = "consistency"
    effects: list[CatalogueEntry] = Field(min_length=1)

    @model_validator(mode="after")
    def _distinct(self) -> Catalogue:
        for what in ("name", "trigger"):
            counts = Counter(getattr(effect, what) for effect in self.effects)
            if twice := [value for value, count in counts.items() if value and count > 1]:
                raise ValueError(f"{what} given to more than one effect: {', '.join(twice)}")
        return self

    def effect(self, name: str) -> CatalogueEntry:
        """The entry of this name; `InputError` with the nearest name if there is none."""
        table = {entry.name: entry for entry in self.effects}
        if name not in table:
            raise InputError(f"effect {name!r} is not in the collection; {did_you_mean(name, table)}")
        return table[name]


def write_collection(
    path: str | Path,
    modules: Mapping[str, LoraModule],
    catalogue: Catalogue,
    metadata: Mapping[str, str] | None = None,
    dtype: torch.dtype | None = torch.bfloat16,
) -> str:
    """Write the product file (ComfyUI layout, catalogue in the header) atomically; returns its SHA-256
    (hex)."""
    return write_lora(path, modules, {**(metadata or {}), CATALOGUE_KEY: catalogue_json(catalogue)}, dtype=dtype)


def catalogue_json(catalogue: Catalogue) -> str:
    """The value of the header key `clora.catalogue`; equal catalogues give equal text."""
    return json.dumps(catalogue.model_dump(), ensure_ascii=False, sort_keys=True)


def read_catalogue(path: str | Path) -> Catalogue:
    """The catalogue of a collection file; no tensor is read.

    Raises `InputError` when the file carries none or one of a newer format, `InputErrors` for every bad
    field.
    """
    path = Path(path)
    text = read_header(weights_file(path)).metadata.get(CATALOGUE_KEY)
    if text is None:
        raise InputError(f"{path}: carries no catalogue ({CATALOGUE_KEY}); give a file written by `clora train`")
    try:
        raw = parse_json(text)
    except ValueError as error:
        raise InputError(f"{path}: its catalogue is no JSON ({error}); write the collection again") from error
    version = raw.get("format_version") if isinstance(raw, dict) else None
    if version != FORMAT_VERSION:
        raise InputError(f"{path}: catalogue format {version!r}, this clora reads {FORMAT_VERSION}; update clora")
    try:
        return Catalogue.model_validate(raw)
    except ValidationError as error:
        raise InputErrors([f"{path}: catalogue {field_fault(item)}" for item in error.errors()]) from error


def describe_file(path: str | Path) -> dict[str, Any]:
    """What `clora inspect FILE --json` prints: the catalogue's fields (if any) and, under `lora`, the file's
    own.

    Works on any LoRA file; faults of the catalogue are added to `lora.faults`.
    """
    lora = inspect_lora(path)
    if lora.pop("catalogue") is None:
        return {"lora": lora}
    try:
        catalogue = read_catalogue(path)
    except InputError as error:
        lora["faults"] = [*lora["faults"], *error.faults]
    else:
        return {**catalogue.model_dump(), "lora": lora}
    return {"lora": lora}


def field_fault(item: Any) -> str:
    """One of pydantic's errors as a sentence: the field and what is wrong with it."""
    place = ".".join(str(part) for part in item["loc"])
    message = item["msg"].removeprefix("Value error, ")
    return f"{place}: {message}" if place else str(message)

"""`clora edit`: files in, files out.

Everything that can be wrong with a request is found before a model is loaded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Literal, TypeVar

import torch

from clora.config import collection_lora
from clora.data.images import load_image
from clora.errors import InputError, raise_faults
from clora.inference.editor import edit_prompt, find_catalogue, grid_columns, load_editor
from clora.lora.groups import find_collection

Given = TypeVar("Given")
Found = TypeVar("Found")

WRITABLE = (".png", ".jpg", ".jpeg", ".webp")


@dataclass(frozen=True)
class EditRequest:
    """What `clora edit` is asked for. base None: the catalogue's. device, dtype None: GPU and bfloat16 where
    there is a GPU, else CPU and float32."""

    images: tuple[Path, ...]
    output: Path
    base: str | None = None
    lora: Path | None = None
    effects: tuple[str, ...] = ()
    prompt: str | None = None
    seeds: tuple[int, ...] = (0,)
    steps: int | None = None
    guidance: float | None = None
    grid: bool = False
    batch_size: int = 1
    device: str | None = None
    dtype: Literal["bfloat16", "float32"] | None = None


def edit_files(request: EditRequest) -> list[Path]:
    """Do what `request` says; returns the files written: the grid, or one per image and seed.

    Everything that can be wrong with it is found, and listed in `InputErrors`, before a model is loaded.
    """
    faults: list[str] = []
    request = _attempt(faults, with_collection, request) or request
    images = [image for path in request.images if (image := _attempt(faults, load_image, path)) is not None]
    paths = _attempt(faults, result_paths, request)
    base = _attempt(faults, _base_of, request)
    device = _attempt(faults, _device, request.device)
    raise_faults(faults)
    assert paths is not None and base is not None and device is not None

    dtype_name = request.dtype or ("float32" if device.type == "cpu" else "bfloat16")
    editor = load_editor(base, request.lora, device, getattr(torch, dtype_name))
    results = editor.edit(
        images,
        request.effects,
        request.prompt,
        seeds=request.seeds,
        steps=request.steps,
        guidance=request.guidance,
        grid=request.grid,
        batch_size=request.batch_size,
    )
    for path, picture in zip(paths, results, strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path, quality=95)
    return paths


def with_collection(request: EditRequest) -> EditRequest:
    """The request with its collection: the one a groups file has for its effects, or, where it names effects but no
    LoRA, the one that its base brings along."""
    if request.lora is not None and request.lora.suffix == ".json":
        return replace(request, lora=find_collection(request.lora, request.effects))
    asks_for_effects = bool(request.effects) or (request.grid and request.prompt is None)
    if request.lora is not None or request.base is None or not asks_for_effects:
        return request
    return replace(request, lora=collection_lora(request.base))


def _attempt(faults: list[str], check: Callable[[Given], Found], given: Given) -> Found | None:
    """`check(given)`, or None with its faults noted."""
    try:
        return check(given)
    except InputError as error:
        faults += error.faults
    return None


def _device(name: str | None) -> torch.device:
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise InputError(f"device: {name!r} is no device; give cpu, cuda or cuda:N") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"device: {name} is not there ({torch.cuda.device_count()} GPUs); give cpu")
    return device


def _base_of(request: EditRequest) -> str:
    """The base to edit with, once what is asked for is known to be there."""
    catalogue = find_catalogue(request.lora)
    if request.grid:
        grid_columns(catalogue, request.effects, request.prompt)
    else:
        edit_prompt(catalogue, request.effects, request.prompt)
    if request.base is not None:
        return request.base
    if catalogue is None:
        raise InputError("base: is not given, and no catalogue names one; give --base, such as tiny")
    return catalogue.base


def result_paths(request: EditRequest) -> list[Path]:
    """Where the results go: the file named, or files in the folder named (STEM.png, STEM-seedN.png).

    Raises `InputError` when one file is named for several results, for a format that cannot be written, and
    where a result would overwrite an input.
    """
    output, num_results = request.output, len(request.images) * len(request.seeds)
    if output.is_dir() or not output.suffix:
        if request.grid:
            raise InputError(f"output: {output} is a folder, a grid is one file; name it, such as grid.png")
        paths = [output / f"{name}.png" for name in _result_names(request)]
    elif output.suffix.lower() not in WRITABLE:
        raise InputError(f"output: {output} has no known image format; name it {', '.join(WRITABLE)}")
    elif num_results > 1 and not request.grid:
        raise InputError(f"output: {num_results} images do not fit into {output}; name a folder, or ask for a grid")
    else:
        paths = [output]
    inputs = {path.resolve() for path in request.images}
    for path in paths:
        if path.resolve() in inputs:
            raise InputError(f"output: {path} would overwrite an input; choose another name or folder")
    return paths


def _result_names(request: EditRequest) -> list[str]:
    names: list[str] = []
    for path in request.images:
        for seed in request.seeds:
            plain = path.stem if len(request.seeds) == 1 else f"{path.stem}-seed{seed}"
            # Inputs of different folders may have equal names.
            numbered = (f"{plain}-{number}" for number in count(2))
            names.append(plain if plain not in names else next(n for n in numbered if n not in names))
    return names

"""A request to edit files, and the checks that find all that is wrong with it before a model is loaded."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Literal, TypeVar

import torch

from clora.backbones.load import choose_device, result_size
from clora.config import collection_lora
from clora.data.images import load_image
from clora.errors import InputError, raise_faults
from clora.inference.edit_prompts import Job, edit_prompt, find_catalogue, grid_prompts
from clora.io.output import check_output
from clora.lora.groups import find_collection

Given = TypeVar("Given")
Found = TypeVar("Found")
Size = tuple[int, int]  # width, height

WRITABLE = (".png", ".jpg", ".jpeg", ".webp")


@dataclass(frozen=True)
class EditRequest:
    """What `clora edit` is asked for. `references` are shown before every image. base None: the catalogue's. device,
    dtype None: GPU and bfloat16 where there is a GPU, else CPU and float32."""

    images: tuple[Path, ...]
    output: Path
    base: str | None = None
    lora: Path | None = None
    effects: tuple[str, ...] = ()
    prompt: str | None = None
    references: tuple[Path, ...] = ()
    seeds: tuple[int, ...] = (0,)
    steps: int | None = None
    guidance: float | None = None
    grid: bool = False
    columns: int | None = None
    batch_size: int = 1
    device: str | None = None
    dtype: Literal["bfloat16", "float32"] | None = None


@dataclass(frozen=True)
class EditPlan:
    """A request that is known to be right. Jobs run over images, seeds and `prompts`, each with its label in a grid."""

    request: EditRequest
    base: str
    device: torch.device
    paths: tuple[Path, ...]
    prompts: tuple[tuple[str, str], ...]
    sizes: tuple[Size, ...]  # of the images
    made_sizes: tuple[Size, ...]

    @property
    def jobs(self) -> list[Job]:
        seeds, images = self.request.seeds, range(len(self.request.images))
        return [Job(image, text, seed) for image in images for seed in seeds for _, text in self.prompts]


def plan_edit(request: EditRequest) -> EditPlan:
    """What is to be done, once all that can be wrong with a request is known to be right; nothing is written.

    Raises `InputErrors` with every fault: files that are missing, damaged or of a shape that the base has no size for,
    places that cannot be written, unknown effects, no base.
    """
    faults: list[str] = []
    request = _attempt(faults, with_collection, request) or request
    sizes = [_attempt(faults, _size_of, path) for path in (*request.images, *request.references)]
    paths = _attempt(faults, result_paths, request)
    for path in paths or ():
        _attempt(faults, check_output, path)
    prompts = _attempt(faults, _prompts_of, request)
    base = _attempt(faults, _base_of, request)
    device = _attempt(faults, choose_device, request.device)
    raise_faults(faults)
    assert paths is not None and prompts is not None and base is not None and device is not None

    given = [size for size in sizes if size is not None]
    made = _made_sizes(base, [*request.images, *request.references], given)
    number = len(request.images)
    return EditPlan(request, base, device, tuple(paths), tuple(prompts), tuple(given[:number]), tuple(made[:number]))


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
        faults += [fault for fault in error.faults if fault not in faults]
    return None


def _size_of(path: Path) -> Size:
    return load_image(path).size


def _made_sizes(base: str, paths: Sequence[Path], sizes: Sequence[Size]) -> list[Size]:
    """The sizes of the results; raises `InputErrors` naming every file that the base has none for."""
    faults: list[str] = []
    found: list[Size] = []
    for path, size in zip(paths, sizes, strict=True):
        try:
            height, width = result_size(base, size)
            found.append((width, height))
        except InputError as error:
            faults.append(f"{path}: {error}")
    raise_faults(faults)
    return found


def _prompts_of(request: EditRequest) -> list[tuple[str, str]]:
    """Label and prompt of each result of an image and seed."""
    if request.columns is not None and not request.grid:
        raise InputError("columns: are of a grid; add --grid, or leave --columns out")
    catalogue = find_catalogue(request.lora)
    if request.grid:
        return grid_prompts(catalogue, request.effects, request.prompt)
    return [("", edit_prompt(catalogue, request.effects, request.prompt))]


def _base_of(request: EditRequest) -> str:
    """The base to edit with."""
    if request.base is not None:
        return request.base
    catalogue = find_catalogue(request.lora)
    if catalogue is None:
        raise InputError("base: is not given, and no catalogue names one; give --base, such as tiny")
    return catalogue.base


def result_paths(request: EditRequest) -> list[Path]:
    """Where the results go: the file named, or files in the folder named (STEM.png, STEM-seedN.png).

    Raises `InputError` when one file is named for several results, for a format that cannot be written, and
    where a result would overwrite an input.
    """
    output, num_results = request.output, len(request.images) * len(request.seeds)
    formats = (*WRITABLE, ".html") if request.grid else WRITABLE
    if os.path.isdir(output) or not output.suffix:  # False, not an error, for names no file can have
        if request.grid:
            raise InputError(f"output: {output} is a folder, a grid is one file; name it, such as grid.png")
        paths = [output / f"{name}.png" for name in _result_names(request)]
    elif output.suffix.lower() not in formats:
        raise InputError(f"output: {output} has no known image format; name it {', '.join(formats)}")
    elif num_results > 1 and not request.grid:
        raise InputError(f"output: {num_results} images do not fit into {output}; name a folder, or ask for a grid")
    else:
        paths = [output]
    inputs = {path.resolve() for path in (*request.images, *request.references)}
    for path in paths:
        if path.resolve() in inputs:
            raise InputError(f"output: {path} would overwrite an input; choose another name or folder")
    return paths


def _result_names(request: EditRequest) -> list[str]:
    names: dict[str, None] = {}
    for path in request.images:
        for seed in request.seeds:
            plain = path.stem if len(request.seeds) == 1 else f"{path.stem}-seed{seed}"
            # Inputs of different folders may have equal names.
            numbered = (f"{plain}-{number}" for number in count(2))
            names[plain if plain not in names else next(n for n in numbered if n not in names)] = None
    return list(names)


def size_notes(plan: EditPlan) -> list[str]:
    """A line for each size of images whose results have another aspect ratio."""
    groups: dict[tuple[Size, Size], list[str]] = {}
    for path, size, made in zip(plan.request.images, plan.sizes, plan.made_sizes, strict=True):
        if size[0] * made[1] != size[1] * made[0]:
            groups.setdefault((size, made), []).append(path.name)
    lines = []
    for (size, made), names in groups.items():
        others = f" and {len(names) - 1} more" if len(names) > 1 else ""
        change = math.exp(abs(math.log(made[0] / made[1] / (size[0] / size[1])))) - 1
        shape = f"aspect ratio {change:.1%} off" if change >= 0.0005 else "aspect ratio kept to 0.05%"
        lines.append(f"{names[0]}{others}: {size[0]}x{size[1]} pixels, made as {made[0]}x{made[1]}, {shape}")
    return lines

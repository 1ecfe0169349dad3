"""`clora edit`: files in, files out, each as soon as it is made.

Everything that can be wrong with a request is found before a model is loaded (`inference.edit_plan`).
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from PIL import Image
from rich.console import Console
from rich.progress import track

from clora.data.contact_sheet import MOST_CELL, Block, sheet_html, sheet_image
from clora.data.images import load_image
from clora.errors import InputError, Stopped, WriteError
from clora.export.edits import artefact_editor, artefact_request
from clora.inference.edit_plan import EditPlan, EditRequest, plan_edit, size_notes
from clora.inference.editor import Editor, load_editor
from clora.io.output import prepare_folder, write_output

CHUNK = 16  # images in memory at once


def edit_files(
    request: EditRequest, console: Console | None = None, artefact: Path | None = None, key: Path | None = None
) -> list[Path]:
    """Do what `request` says, with an artefact's folder where one is given, which a public `key` must have signed where
    one is given; returns the files written: the grid, or one per image and seed.

    Everything that can be wrong with it is found, and listed in `InputErrors`, before a model is loaded. Ctrl-C raises
    `Stopped`, a disk that does not take a result `WriteError`; what was made until then is written.
    """
    console = console or Console(stderr=True)
    if key is not None and artefact is None:
        raise InputError("key: is for an artefact; give its folder with --artefact, or leave --key out")
    if artefact is not None:
        request = artefact_request(request, artefact, key)
    plan = plan_edit(request)
    for folder in dict.fromkeys(path.parent for path in plan.paths):
        prepare_folder(folder)
    for line in size_notes(plan):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    place: Place = Sheet(plan) if request.grid else Files(plan)
    total = len(plan.jobs)
    try:
        editor = _open_editor(plan) if artefact is None else artefact_editor(artefact, plan.base, key, request.device)
        for index, picture in track(run(editor, plan), "editing", total, console=console, transient=True):
            place.add(index, picture)
        place.close()
    except WriteError as error:
        raise WriteError(f"{error} ({place.num_written} of {total} images are written)") from error
    except KeyboardInterrupt:
        place.close()
        rest = "the same command makes them anew" if request.grid else "give the other images or seeds to make the rest"
        raise Stopped(f"stopped: {place.num_written} of {total} images written to {request.output}; {rest}") from None
    return list(plan.paths)


def _open_editor(plan: EditPlan) -> Editor:
    dtype = plan.request.dtype or ("float32" if plan.device.type == "cpu" else "bfloat16")
    return load_editor(plan.base, plan.request.lora, plan.device, getattr(torch, dtype))


def run(editor: Editor, plan: EditPlan) -> Iterator[tuple[int, Image.Image]]:
    """The place of each job and its result as they are made, some of the images in memory at a time."""
    request, jobs = plan.request, plan.jobs
    references = [load_image(path) for path in request.references]
    sampling = editor.sampling.changed(request.steps, request.guidance)
    chunk = max(CHUNK, request.batch_size)
    per_image = len(jobs) // len(request.images)
    for start in range(0, len(request.images), chunk):
        images = [load_image(path) for path in request.images[start : start + chunk]]
        own = jobs[start * per_image : (start + len(images)) * per_image]
        shifted = [job._replace(image=job.image - start) for job in own]
        made = editor.run(images, shifted, references=references, sampling=sampling, batch_size=request.batch_size)
        for place, picture in made:
            yield start * per_image + place, picture


class Place(Protocol):
    """Where results go."""

    num_written: int

    def add(self, index: int, picture: Image.Image) -> None:
        """Take the result of job `index`."""

    def close(self) -> None:
        """Write what is not written yet."""


@dataclass
class Files:
    """A file for each result, written at once."""

    plan: EditPlan
    num_written: int = 0

    def add(self, index: int, picture: Image.Image) -> None:
        path = self.plan.paths[index]
        write_output(path, encoded(picture, path))
        self.num_written += 1

    def close(self) -> None:
        """All of them are written."""


@dataclass
class Sheet:
    """One contact sheet, written at the end: a block for each image and seed, the source and its results."""

    plan: EditPlan
    num_written: int = 0
    _made: dict[int, Image.Image] = field(default_factory=dict)

    def add(self, index: int, picture: Image.Image) -> None:
        self._made[index] = _small(picture)

    def close(self) -> None:
        if not self._made:
            return
        (path,), request = self.plan.paths, self.plan.request
        blocks = self._blocks()
        if path.suffix.lower() == ".html":
            title = f"clora edit: {request.lora.name if request.lora else self.plan.base}"
            content = sheet_html(title, blocks, request.columns).encode()
        else:
            content = encoded(sheet_image(blocks, request.columns), path)
        write_output(path, content)
        self.num_written = len(self._made)

    def _blocks(self) -> list[Block]:
        plan, blocks = self.plan, []
        seeds, labels = plan.request.seeds, [label for label, _ in plan.prompts]
        for number, path in enumerate(plan.request.images):
            source = _small(load_image(path).resize(plan.made_sizes[number], Image.Resampling.LANCZOS))
            for place, seed in enumerate(seeds):
                first = (number * len(seeds) + place) * len(labels)
                made = [(label, self._made.get(first + i)) for i, label in enumerate(labels)]
                named = [path.name] if len(plan.request.images) > 1 else []
                heading = ", ".join([*named, *([f"seed {seed}"] if len(seeds) > 1 else [])])
                blocks.append(Block(heading, [("source", source), *made]))
        return blocks


def encoded(picture: Image.Image, path: Path) -> bytes:
    """A picture in the format that the name of `path` asks for."""
    buffer = io.BytesIO()
    picture.save(buffer, Image.registered_extensions()[path.suffix.lower()], quality=95)
    return buffer.getvalue()


def _small(picture: Image.Image) -> Image.Image:
    """The picture no larger than a sheet shows it."""
    small = picture.copy()
    small.thumbnail((MOST_CELL, MOST_CELL), Image.Resampling.LANCZOS)
    return small

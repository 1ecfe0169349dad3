"""A base and one LoRA file, applied to images.

A collection is sampled with the few-step schedule of its catalogue. Any other LoRA, and the base alone, are
sampled as teachers are when they make targets: many Euler steps, with guidance. Initial noise is ordered as
in the stock pipeline, so that one seed gives one image there and here.

Shape legend: B batch, T tokens, C latent channels per token.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from clora.backbones.base import Backbone
from clora.backbones.cond import Cond, Grid, make_cond
from clora.backbones.load import linear_shapes, load_backbone
from clora.data.image_grid import grid_image
from clora.errors import InputError, raise_faults
from clora.inference.sampling import Sampling, default_sampling, guided_teacher_velocity
from clora.io.safetensors import read_header
from clora.lora.catalogue import Catalogue, read_catalogue
from clora.lora.files import CATALOGUE_KEY, LoraFile, read_lora
from clora.method.flow import few_step_sigmas
from clora.method.prompts import compose_prompts
from clora.method.samplers import few_step_sample, ode_sample

log = logging.getLogger(__name__)

SLOT = "student"
MIN_CELL = 160  # pixels: smaller images of a grid are enlarged so that labels fit over them


def find_catalogue(lora: Path | None) -> Catalogue | None:
    """The catalogue of a LoRA file, None where it carries none; reads the header alone."""
    if lora is None or CATALOGUE_KEY not in read_header(lora).metadata:
        return None
    return read_catalogue(lora)


def edit_prompt(catalogue: Catalogue | None, effects: Sequence[str], prompt: str | None = None) -> str:
    """What the model reads: `prompt` itself, one effect's student prompt, or two composed (Fig. 7).

    Raises `InputError` for an unknown effect (with the nearest), and unless one of the two was given.
    """
    if bool(effects) == (prompt is not None):
        raise InputError("an edit needs either effect names or a prompt, and not both; give one of them")
    if prompt is not None:
        if not prompt.strip():
            raise InputError("prompt: is blank; say what is to be done to the image")
        return prompt
    if catalogue is None:
        raise InputError(
            f"effect {effects[0]!r}: there is no catalogue to find it in; give a collection as the LoRA, or a prompt"
        )
    if len(effects) > 2:
        raise InputError(f"{len(effects)} effects were given, two can be composed; name one or two")
    texts = [catalogue.effect(name).prompt for name in effects]
    return texts[0] if len(texts) == 1 else compose_prompts(*texts)


@dataclass(frozen=True, eq=False)
class Editor:
    """A base with one LoRA (or none) on it. `sampling` holds the defaults of every edit."""

    backbone: Backbone
    catalogue: Catalogue | None
    sampling: Sampling
    has_lora: bool

    def edit(
        self,
        images: Sequence[Image.Image],
        effects: Sequence[str] = (),
        prompt: str | None = None,
        *,
        seeds: Sequence[int] = (0,),
        steps: int | None = None,
        guidance: float | None = None,
        grid: bool = False,
        batch_size: int = 1,
    ) -> list[Image.Image]:
        """Edit each image (RGB) with each seed: all of the first image's results, then the second's.

        One effect, two composed, or a prompt (`edit_prompt`). A result has the size the stock pipeline gives
        it, and depends on image, prompt and seed alone, not on what else is in the call. With `grid` the one
        result is a labelled picture: a row per image and seed, the source and a column for each single
        effect, all of the catalogue's where neither effects nor a prompt are given.

        Raises `InputError` for unknown effects, images not RGB and prompts too long; `FloatingPointError`
        when the model's output is not finite.
        """
        default = self.sampling
        sampling = replace(
            default,
            num_steps=default.num_steps if steps is None else steps,
            guidance=default.guidance if guidance is None else guidance,
        )
        if grid:
            columns = grid_columns(self.catalogue, effects, prompt)
        else:
            columns = [("", edit_prompt(self.catalogue, effects, prompt))]
        rows = [(index, seed) for index in range(len(images)) for seed in seeds]
        jobs = [(index, text, seed) for index, seed in rows for _, text in columns]
        results = self._run(images, jobs, sampling, batch_size)
        if not grid:
            return results
        width = len(columns)
        cells = [[images[index], *results[i * width : (i + 1) * width]] for i, (index, _) in enumerate(rows)]
        row_labels = [f"seed {seed}" for _, seed in rows] if len(seeds) > 1 else []
        return [_picture(cells, ["source", *(label for label, _ in columns)], row_labels)]

    @torch.no_grad()
    def _run(
        self, images: Sequence[Image.Image], jobs: Sequence[Job], sampling: Sampling, batch_size: int
    ) -> list[Image.Image]:
        """One result per job, in order. Images and prompts are encoded once, same sizes share batches."""
        raise_faults(
            [
                f"image {index} has mode {image.mode}; make it RGB (clora.data.images.load_image does)"
                for index, image in enumerate(images)
                if image.mode != "RGB"
            ]
        )
        used = {index for index, _, _ in jobs}
        refs = {index: self.backbone.encode_references([images[index]]) for index in used}
        prompts = {(index, text) for index, text, _ in jobs}
        if sampling.guidance != 1:
            prompts |= {(index, sampling.negative_prompt) for index in used}
        texts = {
            (index, text): self.backbone.encode_prompts([text], [[images[index]]])[0] for index, text in sorted(prompts)
        }
        encoded = Encoded(refs, texts, {i: self._grid(images[i]) for i in used})
        by_size: dict[tuple[Grid, Grid], list[int]] = {}
        for place, (index, _, _) in enumerate(jobs):
            by_size.setdefault((encoded.grids[index], refs[index][1]), []).append(place)
        results: dict[int, Image.Image] = {}
        for places in by_size.values():
            for start in range(0, len(places), batch_size):
                chosen = places[start : start + batch_size]
                made = self._sample([jobs[place] for place in chosen], encoded, sampling)
                results |= dict(zip(chosen, made, strict=True))
        return [results[place] for place in range(len(jobs))]

    def _grid(self, image: Image.Image) -> Grid:
        return self.backbone.grid(self.backbone.output_size(image))

    def _sample(self, jobs: Sequence[Job], encoded: Encoded, sampling: Sampling) -> list[Image.Image]:
        """One batch of jobs whose images share their sizes."""
        cond = encoded.cond(jobs)
        uncond = cond
        if sampling.guidance != 1:
            uncond = encoded.cond([(index, sampling.negative_prompt, seed) for index, _, seed in jobs])
        slots = [SLOT if self.has_lora else None]
        velocity = guided_teacher_velocity(self.backbone, lambda effects: slots, sampling.guidance, "norm")
        conds, grid, seeds = (cond, uncond), cond.grid, [seed for _, _, seed in jobs]
        shape_TC = (grid[0] * grid[1], self.backbone.token_channels)
        shift, device = sampling.shift, self.backbone.device
        if sampling.sampler == "consistency":
            sigmas = few_step_sigmas(sampling.num_steps, shift)
            x0_BTC = few_step_sample(velocity, conds, shape_TC, sigmas, seeds, device, grid=grid)
        else:
            steps = sampling.num_steps
            x0_BTC = ode_sample(velocity, conds, shape_TC, steps, shift, seeds, device, grid=grid)
        return self.backbone.to_pil(self.backbone.decode(x0_BTC, grid))


def _picture(rows: Sequence[Sequence[Image.Image]], labels: Sequence[str], row_labels: Sequence[str]) -> Image.Image:
    """A labelled grid of images of any sizes, every cell that of the largest result; small ones enlarged."""
    cell = (max(row[-1].width for row in rows), max(row[-1].height for row in rows))
    pixels = [
        [np.asarray(ImageOps.pad(image, cell, Image.Resampling.LANCZOS, "white")) for image in row] for row in rows
    ]
    return grid_image(pixels, labels, row_labels, scale=math.ceil(MIN_CELL / cell[0]))


Job = tuple[int, str, int]  # index of the image, prompt, seed


@dataclass(frozen=True, eq=False)
class Encoded:
    """Images and prompts, encoded: by image index, and by image index and prompt."""

    refs: dict[int, tuple[Tensor, Grid]]
    texts: dict[tuple[int, str], Tensor]
    grids: dict[int, Grid]

    def cond(self, jobs: Sequence[Job]) -> Cond:
        """The condition of a batch of jobs."""
        latents = torch.cat([self.refs[index][0] for index, _, _ in jobs])
        first = jobs[0][0]
        texts = [self.texts[index, text] for index, text, _ in jobs]
        return make_cond(texts, [(latents, self.refs[first][1])], self.grids[first])


def load_editor(
    base: str,
    lora: Path | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
) -> Editor:
    """A base with a LoRA file of any layout on it, its catalogue read where it has one.

    Only the linears that the file names get an adapter, so that none of its tensors can be left out. Raises
    `InputErrors` with every fault of the file.
    """
    catalogue = find_catalogue(lora)
    if catalogue is not None and catalogue.base != base:
        log.warning("%s was distilled on base %s, and is now used on %s", lora, catalogue.base, base)
    # Read before the base, which takes far longer.
    file = None if lora is None else read_lora(lora, linear_shapes(base))
    backbone = load_backbone(base, device, dtype)
    if file is None:
        backbone.add_adapters()  # without any slot
    else:
        _add_lora(backbone, file)
    backbone.use_kernels("auto")
    return Editor(backbone, catalogue, default_sampling(base, catalogue), lora is not None)


def _add_lora(backbone: Backbone, file: LoraFile) -> None:
    adapters = backbone.add_adapters(list(file.modules))
    adapters.add_lora(SLOT, file.modules, dtype=backbone.dtype)


def grid_columns(
    catalogue: Catalogue | None, effects: Sequence[str], prompt: str | None = None
) -> list[tuple[str, str]]:
    """Label and prompt of each column of a grid; raises as `edit_prompt` does."""
    if prompt is not None:
        return [(prompt, edit_prompt(catalogue, effects, prompt))]
    if catalogue is not None and not effects:
        effects = [entry.name for entry in catalogue.effects]
    if not effects:
        raise InputError("a grid needs effects or a prompt where the LoRA has no catalogue; give a prompt")
    return [(name, edit_prompt(catalogue, [name])) for name in effects]

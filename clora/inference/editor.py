"""A base and one LoRA file, applied to images.

A collection is sampled with the few-step schedule of its catalogue. Any other LoRA, and the base alone, are
sampled as teachers are when they make targets: many Euler steps, with guidance. Initial noise is ordered as
in the stock pipeline, so that one seed gives one image there and here.

Shape legend: B batch, T tokens, C latent channels per token.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from clora.backbones.base import Backbone
from clora.backbones.cond import Cond, Grid, make_cond
from clora.backbones.load import linear_shapes, load_backbone
from clora.config import build_config
from clora.errors import raise_faults
from clora.inference.edit_prompts import Job, edit_prompt, find_catalogue
from clora.inference.sampling import Sampling, few_step_sampling, follow, sample, teacher_sampling
from clora.lora.adapters import Adapters
from clora.lora.catalogue import Catalogue
from clora.lora.files import read_lora
from clora.lora.module import join_modules
from clora.method.flow import Velocity

log = logging.getLogger(__name__)

SLOT = "student"


@dataclass(frozen=True, eq=False)
class Editor:
    """A base with one LoRA (or none) on it. `sampling` holds the defaults of every edit.

    A `velocity` takes the place of the backbone's, whose transformer then need not be loaded; it samples without
    guidance.
    """

    backbone: Backbone
    catalogue: Catalogue | None
    sampling: Sampling
    has_lora: bool
    velocity: Velocity | None = None
    adapters: Adapters | None = None  # of the backbone, where it has any

    def edit(
        self,
        images: Sequence[Image.Image],
        effects: Sequence[str] = (),
        prompt: str | None = None,
        *,
        references: Sequence[Image.Image] = (),
        seeds: Sequence[int] = (0,),
        steps: int | None = None,
        guidance: float | None = None,
        batch_size: int = 1,
    ) -> list[Image.Image]:
        """Edit each image (RGB) with each seed: all of the first image's results, then the second's.

        One effect, two composed, or a prompt (`edit_prompt`). For more see `run`, which this collects.
        """
        text = edit_prompt(self.catalogue, effects, prompt)
        jobs = [Job(index, text, seed) for index in range(len(images)) for seed in seeds]
        sampling = self.sampling.changed(steps, guidance)
        made = dict(self.run(images, jobs, references=references, sampling=sampling, batch_size=batch_size))
        return [made[place] for place in range(len(jobs))]

    @torch.no_grad()
    def run(
        self,
        images: Sequence[Image.Image],
        jobs: Sequence[Job],
        *,
        references: Sequence[Image.Image] = (),
        sampling: Sampling | None = None,
        batch_size: int = 1,
    ) -> Iterator[tuple[int, Image.Image]]:
        """Yield the place of each job and its result (RGB), as soon as its batch is made.

        `references` (RGB) are shown before every image, as in training: the image comes last and gives the result its
        shape (`backbone.output_size`). A result depends on image, references, prompt and seed alone. Batches take the
        first job that is left and those of equal sizes after it; an image is encoded when its first job comes.

        Raises `InputError` for images not RGB, of a shape that the base has no size for, and prompts too long;
        `FloatingPointError` when the model's output is not finite.
        """
        kinds = [("image", images), ("reference", references)]
        raise_faults(
            [
                f"{what} {index} has mode {image.mode}; make it RGB (clora.data.images.load_image does)"
                for what, given in kinds
                for index, image in enumerate(given)
                if image.mode != "RGB"
            ]
        )
        encoded = Encoded(self.backbone, images, references)
        left = dict(enumerate(jobs))
        while left:
            size = encoded.size(next(iter(left.values())).image)
            fitting = (place for place, job in left.items() if encoded.size(job.image) == size)
            places = [place for place, _ in zip(fitting, range(batch_size), strict=False)]
            batch = [left.pop(place) for place in places]
            made = self._sample(batch, encoded, sampling or self.sampling)
            yield from zip(places, made, strict=True)
            encoded.keep({job.image for job in left.values()})

    def _sample(self, jobs: Sequence[Job], encoded: Encoded, sampling: Sampling) -> list[Image.Image]:
        """One batch of jobs whose images share their sizes."""
        cond = encoded.cond([(job.image, job.prompt) for job in jobs])
        seeds = [job.seed for job in jobs]
        if self.velocity is not None:
            x0_BTC = follow(self.backbone, self.velocity, cond, sampling, seeds, pipeline_noise=True)
            return self.backbone.to_pil(self.backbone.decode(x0_BTC, cond.grid))
        uncond = None
        if sampling.is_guided:
            uncond = encoded.cond([(job.image, sampling.negative_prompt) for job in jobs])
        slots = [SLOT if self.has_lora else None]
        x0_BTC = sample(self.backbone, cond, slots, sampling, seeds, uncond, pipeline_noise=True)
        return self.backbone.to_pil(self.backbone.decode(x0_BTC, cond.grid))


@dataclass(eq=False)
class Encoded:
    """Images with the references they share, and prompts, each encoded when it is first asked for."""

    backbone: Backbone
    images: Sequence[Image.Image]
    references: Sequence[Image.Image]
    _latents: dict[int, tuple[Tensor, Grid]] = field(default_factory=dict)
    _shared: list[tuple[Tensor, Grid]] | None = None
    _texts: dict[tuple[int, str], Tensor] = field(default_factory=dict)

    def size(self, index: int) -> tuple[int, int]:
        """The size of an image's result; jobs of equal sizes may share a batch."""
        return self.backbone.output_size(self.images[index])

    def cond(self, wanted: Sequence[tuple[int, str]]) -> Cond:
        """The condition of a batch of images, by index, and prompts; the images share their size."""
        if self._shared is None:
            self._shared = [self.backbone.encode_references([image]) for image in self.references]
        count = len(wanted)
        refs = [(latents.expand(count, -1, -1), grid) for latents, grid in self._shared]
        own = [self._image(index) for index, _ in wanted]
        refs.append((torch.cat([latents for latents, _ in own]), own[0][1]))
        texts = [self._text(index, prompt) for index, prompt in wanted]
        return make_cond(texts, refs, self.backbone.grid(self.size(wanted[0][0])))

    def keep(self, indices: set[int]) -> None:
        """Forget the images of all other indices."""
        self._latents = {index: found for index, found in self._latents.items() if index in indices}
        self._texts = {key: text for key, text in self._texts.items() if key[0] in indices}

    def _image(self, index: int) -> tuple[Tensor, Grid]:
        if index not in self._latents:
            self._latents[index] = self.backbone.encode_references([self.images[index]])
        return self._latents[index]

    def _text(self, index: int, prompt: str) -> Tensor:
        key = (index, prompt)
        if key not in self._texts:
            shown = [*self.references, self.images[index]]
            self._texts[key] = self.backbone.encode_prompts([prompt], [shown])[0]
        return self._texts[key]


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
    adapters = backbone.add_adapters(None if file is None else list(file.modules))
    if file is not None:
        adapters.add_lora(SLOT, file.modules, dtype=backbone.dtype)
    backbone.use_kernels("auto")
    return Editor(backbone, catalogue, default_sampling(base, catalogue), lora is not None, adapters=adapters)


def swap_lora(editor: Editor, base: str, lora: Path, accelerate: Path | None = None) -> Editor:
    """The editor with another LoRA file, or its first, on the same base, which is not loaded anew.

    accelerate: a few-step LoRA that is added to it, as the stock pipeline's `set_adapters` adds two; the sum is sampled
    with the schedule of the base's preset. `editor` must come from `load_editor` without a LoRA, so that any of the
    base's own linears can take one; it must not be used any more. Raises `InputErrors` with every fault of the file.
    """
    adapters = editor.adapters
    assert adapters is not None
    modules = read_lora(lora, adapters.module_shapes).modules
    if accelerate is not None:
        modules = join_modules(modules, read_lora(accelerate, adapters.module_shapes).modules)
    if editor.has_lora:
        adapters.remove_stack(SLOT)
    adapters.add_lora(SLOT, modules, dtype=editor.backbone.dtype)
    catalogue = find_catalogue(lora)
    sampling = default_sampling(base, catalogue, accelerate is not None)
    return replace(editor, catalogue=catalogue, sampling=sampling, has_lora=True)


def default_sampling(base: str, catalogue: Catalogue | None, accelerated: bool = False) -> Sampling:
    """The catalogue's schedule; without a catalogue a teacher's, or accelerated in few steps, by the base's preset."""
    if accelerated:
        schedule = build_config({"base": base, "output_dir": "."}).schedule
        return few_step_sampling(schedule.num_steps, schedule.shift)
    if catalogue is not None:
        return Sampling(catalogue.sampler, catalogue.schedule.num_steps, catalogue.schedule.shift)
    return teacher_sampling(build_config({"base": base, "output_dir": "."}))

"""Two effects at once without a collection: what a user of two LoRAs does, each with the acceleration LoRA.

| method | how | forwards at 8 steps |
|---|---|---|
| sequential | the second teacher edits the first one's result | 16 |
| sum | both LoRAs on the base, as `set_adapters` puts them | 8 |
| switch | LoRA Switch (Zhong et al. 2024, arXiv 2402.16843): one LoRA a step, in turn | 8 |
| composite | LoRA Composite (the same): the mean of the velocities under each LoRA | 16 |

Used by `bench.lab.baselines`. Pictures are written where `clora eval` looks for those of a method made elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from clora.backbones.base import Backbone
from clora.backbones.cond import Cond
from clora.data.images import load_image
from clora.inference.edit_prompts import Job
from clora.inference.editor import Editor, load_editor
from clora.inference.sampling import Sampling, sampling_sigmas
from clora.lora.files import read_lora
from clora.lora.slots import Slot
from clora.method.flow import Velocity

FORWARDS = {"sequential": 2, "sum": 1, "switch": 1, "composite": 2}  # of one teacher's
FAST = "acceleration"


def compose(
    base: str,
    pairs: dict[str, tuple[tuple[str, str], tuple[str, str]]],
    teachers: dict[str, Path],
    accelerate: Path,
    sources: dict[str, list[Path]],
    sampling: Sampling,
    out: Path,
) -> None:
    """Write `out/METHOD/CATEGORY/PAIR/KEY.png` by every method, where it is not there.

    pairs: by name, the two effects and the instruction of each. sources: pictures by category.
    """
    editor: Editor | None = None
    for name, (effects, texts) in pairs.items():
        todo = [
            (method, category, source)
            for method in FORWARDS
            for category, found in sources.items()
            for source in found
            if not _place(out, method, category, name, source).exists()
        ]
        if not todo:
            continue
        editor = editor or _open(base, accelerate)
        assert editor.adapters is not None
        for effect in effects:
            modules = read_lora(teachers[effect], editor.adapters.module_shapes).modules
            editor.adapters.add_lora(effect, modules, dtype=editor.backbone.dtype)
        for method in FORWARDS:
            own = [(category, source) for m, category, source in todo if m == method]
            made = _make(editor, method, effects, texts, [load_image(source) for _, source in own], sampling)
            for (category, source), picture in zip(own, made, strict=True):
                place = _place(out, method, category, name, source)
                place.parent.mkdir(parents=True, exist_ok=True)
                load_image(source).save(place.with_name(f"{source.stem}_SRCIMG.png"))
                picture.save(place)
        for effect in effects:
            editor.adapters.remove_stack(effect)


def _place(out: Path, method: str, category: str, name: str, source: Path) -> Path:
    return out / method / category / name / f"{source.stem}.png"


def _open(base: str, accelerate: Path) -> Editor:
    editor = load_editor(base, None, "cpu", torch.float32)
    assert editor.adapters is not None
    editor.adapters.add_lora(FAST, read_lora(accelerate, editor.adapters.module_shapes).modules)
    return editor


def _make(
    editor: Editor,
    method: str,
    effects: tuple[str, str],
    texts: tuple[str, str],
    images: Sequence[Image.Image],
    sampling: Sampling,
) -> list[Image.Image]:
    both = f"{texts[0]} and {texts[1]}"
    first, second = ((effect, FAST) for effect in effects)
    if method == "sequential":
        halfway = _run(editor, fixed(editor.backbone, first), texts[0], images, sampling)
        return _run(editor, fixed(editor.backbone, second), texts[1], halfway, sampling)
    velocities = {
        "sum": fixed(editor.backbone, (*effects, FAST)),
        "switch": switched(editor.backbone, [first, second], sampling),
        "composite": averaged(editor.backbone, [first, second]),
    }
    return _run(editor, velocities[method], both, images, sampling)


def _run(
    editor: Editor, velocity: Velocity, text: str, images: Sequence[Image.Image], sampling: Sampling
) -> list[Image.Image]:
    jobs = [Job(place, text, 0) for place in range(len(images))]
    made = dict(replace(editor, velocity=velocity).run(images, jobs, sampling=sampling, batch_size=8))
    return [made[place] for place in range(len(jobs))]


def fixed(backbone: Backbone, slot: Slot) -> Velocity:
    """The velocity under one slot, or the sum of several."""

    def velocity(x_BTC: Tensor, sigma_B: Tensor, cond: Cond) -> Tensor:
        return backbone.velocity(x_BTC, sigma_B, cond, [slot])

    return velocity


def switched(backbone: Backbone, slots: Sequence[Slot], sampling: Sampling) -> Velocity:
    """LoRA Switch: at step k the velocity under slot k modulo their number."""

    def velocity(x_BTC: Tensor, sigma_B: Tensor, cond: Cond) -> Tensor:
        sigmas = sampling_sigmas(backbone, sampling, x_BTC.shape[1])
        step = int((sigmas - sigma_B[0].cpu()).abs().argmin())
        return backbone.velocity(x_BTC, sigma_B, cond, [slots[step % len(slots)]])

    return velocity


def averaged(backbone: Backbone, slots: Sequence[Slot]) -> Velocity:
    """LoRA Composite: the mean of the velocities under each slot."""

    def velocity(x_BTC: Tensor, sigma_B: Tensor, cond: Cond) -> Tensor:
        return torch.stack([backbone.velocity(x_BTC, sigma_B, cond, [slot]) for slot in slots]).mean(0)

    return velocity

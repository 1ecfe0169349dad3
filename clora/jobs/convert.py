"""`clora convert`: a LoRA file in another tool's layout, and as a plain LoRA of a chosen rank."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError

from clora.config import resolve_base
from clora.errors import InputError
from clora.inference.edit_prompts import find_catalogue
from clora.io.atomic import write_text
from clora.lora.base_weights import find_base_weights
from clora.lora.comfyui import TABLE, exact_steps, workflow
from clora.lora.convert import Conversion, convert_lora
from clora.lora.files import Layout


def convert(source: Path, target: Path, to: Layout, rank: int | None = None, base: str | None = None) -> Conversion:
    """`convert_lora` with a base named as everywhere: a bundled one, a folder, or a hub id in the local cache."""
    done = convert_lora(source, target, to, rank, None if base is None else find_base_weights(_folder(base)))
    return replace(done, notes=(*done.notes, *_write_workflow(target))) if to == "comfyui" else done


def _write_workflow(target: Path) -> list[str]:
    """Write a collection's workflow beside it, and tell where; a LoRA that is no collection has none."""
    catalogue = find_catalogue(target)
    if catalogue is None:
        return []
    place = target.with_suffix(".workflow.json")
    write_text(place, json.dumps(workflow(catalogue, catalogue.effects[0], target), indent=2) + "\n")
    notes = [f"{place}: its workflow; the files of the base in it have the names of ComfyUI's own packages"]
    if not exact_steps(steps := catalogue.schedule.num_steps):
        notes.append(f"ComfyUI's noise levels of {steps} steps are up to {1 / TABLE:g} off, before the shift")
    return notes


def _folder(base: str) -> Path:
    found = resolve_base(base)
    if isinstance(found, Path):
        return found
    try:
        return Path(snapshot_download(found, allow_patterns="transformer/*", local_files_only=True))
    except LocalEntryNotFoundError as error:
        what = f"base {base}: its transformer is not in the local hub cache"
        raise InputError(f"{what}; download it with `hf download {base}`, or name a folder") from error

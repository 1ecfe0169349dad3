"""What an edit asks of the model: effects of a catalogue, or a prompt, in the words that the model reads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from clora.errors import InputError
from clora.io.safetensors import read_header
from clora.lora.catalogue import Catalogue, read_catalogue
from clora.lora.files import CATALOGUE_KEY
from clora.lora.peft_folder import weights_file
from clora.method.prompts import compose_prompts


def find_catalogue(lora: Path | None) -> Catalogue | None:
    """The catalogue of a LoRA file, None where it carries none; reads the header alone."""
    if lora is None or CATALOGUE_KEY not in read_header(weights_file(lora)).metadata:
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


def grid_prompts(
    catalogue: Catalogue | None, effects: Sequence[str], prompt: str | None = None
) -> list[tuple[str, str]]:
    """Label and prompt of each result of a grid: every effect named, all of the catalogue's where none is, or the
    prompt; raises as `edit_prompt` does."""
    if prompt is not None:
        return [(prompt, edit_prompt(catalogue, effects, prompt))]
    if catalogue is not None and not effects:
        effects = [entry.name for entry in catalogue.effects]
    if not effects:
        raise InputError("a grid needs effects or a prompt where the LoRA has no catalogue; give a prompt")
    return [(name, edit_prompt(catalogue, [name])) for name in effects]


class Job(NamedTuple):
    """One result that is wanted: the index of its image, what the model reads, the seed of its noise."""

    image: int
    prompt: str
    seed: int

"""`clora convert`: a LoRA file in another tool's layout, and as a plain LoRA of a chosen rank."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError

from clora.config import resolve_base
from clora.errors import InputError
from clora.lora.base_weights import find_base_weights
from clora.lora.convert import Conversion, convert_lora
from clora.lora.files import Layout


def convert(source: Path, target: Path, to: Layout, rank: int | None = None, base: str | None = None) -> Conversion:
    """`convert_lora` with a base named as everywhere: a bundled one, a folder, or a hub id in the local cache."""
    return convert_lora(source, target, to, rank, None if base is None else find_base_weights(_folder(base)))


def _folder(base: str) -> Path:
    found = resolve_base(base)
    if isinstance(found, Path):
        return found
    try:
        return Path(snapshot_download(found, allow_patterns="transformer/*", local_files_only=True))
    except LocalEntryNotFoundError as error:
        what = f"base {base}: its transformer is not in the local hub cache"
        raise InputError(f"{what}; download it with `hf download {base}`, or name a folder") from error

"""What is in a LoRA file, for people and programs."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from clora.errors import InputErrors
from clora.io.safetensors import read_tensors
from clora.lora.files import CATALOGUE_KEY, RawModule, read_values
from clora.lora.summary import summarise, unready_faults, width_findings


def inspect_lora(path: str | Path) -> dict[str, Any]:
    """What is in a LoRA file, ready for JSON.

    layout, num_tensors, num_modules, num_parameters, dtypes, ranks (those of the LoRAs that are exactly the
    updates), alphas and kinds (value: how many modules), targets (module name without block number: how many),
    num_blocks, metadata, catalogue (None if the file has none), sha256, notes (what is read otherwise than it lies
    there), faults (empty for a good file). Raises `InputError` only when the file is no readable
    safetensors at all.
    """
    summary, faults = summarise(Path(path), None)
    path = summary.path
    misfits, notes = width_findings(summary)
    faults += unready_faults(summary) + misfits
    tensors, sha256 = read_tensors(path, summary.header)
    raw: dict[str, RawModule] = {}
    try:
        raw = read_values(summary, tensors, faults)
    except InputErrors as error:
        faults = error.faults
    entries = summary.header.tensors
    catalogue = None
    metadata = dict(summary.header.metadata)
    if (text := metadata.pop(CATALOGUE_KEY, None)) is not None:
        try:
            catalogue = json.loads(text)
        except (ValueError, RecursionError):
            faults = [*faults, f"{path}: header metadata {CATALOGUE_KEY} is not JSON; write it again"]
    blocks = {name.split(".")[1] for name in summary.ranks if name.startswith("transformer_blocks.")}
    sizes = [math.prod(entry.shape) for key, entry in entries.items() if not key.endswith(".alpha")]
    return {
        "path": str(path),
        "layout": summary.layout,
        "num_tensors": len(entries),
        "num_modules": len(summary.ranks),
        "num_parameters": sum(sizes),
        "num_blocks": len(blocks),
        "dtypes": sorted({str(entry.dtype).removeprefix("torch.") for entry in entries.values()}),
        "ranks": _tally(str(rank) for rank in summary.ranks.values()),
        "alphas": _tally(f"{module.alpha:g}" for module in raw.values()),
        "kinds": _tally("DoRA" if "dora" in summary.keys[name] else kind for name, kind in summary.kinds.items()),
        "targets": _tally(_target(name) for name in summary.ranks),
        "metadata": metadata,
        "catalogue": catalogue,
        "sha256": sha256,
        "notes": [*summary.notes, *notes],
        "faults": faults,
    }


def _target(module: str) -> str:
    parts = module.split(".")
    return ".".join(parts[2:]) if parts[0] == "transformer_blocks" else module


def _tally(values: Iterable[str]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for value in values:
        counts[value] = counts.get(value, 0) + 1
    return dict(sorted(counts.items(), key=lambda item: -item[1]))

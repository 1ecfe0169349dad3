"""A base folder in diffusers' layout with a collection merged into it: stock diffusers loads it and needs no LoRA.

Its scheduler's configuration is the collection's schedule and sampler, so that the stock pipeline samples as `clora
edit` does when it is asked for that many steps without guidance.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from clora.config import read_sidecar
from clora.io.atomic import write_text
from clora.io.text import parse_json, read_text
from clora.lora.merge import Merge, merge_weights
from clora.lora.module import LoraModule

TRANSFORMER = "transformer"
CONFIGURATIONS = {".json", ".txt", ".jinja"}
INDEX = ".safetensors.index.json"  # of a transformer: the merge writes it anew


def write_merged(
    source: Path,
    target: Path,
    modules: Mapping[str, LoraModule],
    dtype: torch.dtype,
    weights: Sequence[str],
    on_file: Callable[[str], None] = lambda name: None,
) -> Merge:
    """Write the base in `source` to `target` with `modules` merged into its transformer, in `dtype`.

    Configurations and tokenizers are copied; of the components named in `weights` the weights are, unchanged. Raises
    as `merge_weights` does.
    """
    for folder in sorted(path for path in source.iterdir() if path.is_dir()):
        if not any(path.suffix in CONFIGURATIONS for path in folder.iterdir()):
            continue  # a folder of data that the base brings along
        for path in sorted(folder.iterdir()):
            weighs = path.suffix == ".safetensors" and folder.name in weights and folder.name != TRANSFORMER
            small = path.suffix in CONFIGURATIONS and not (folder.name == TRANSFORMER and path.name.endswith(INDEX))
            if path.is_file() and (weighs or small):
                on_file(path.name)
                (target / folder.name).mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target / folder.name / path.name)
    shutil.copyfile(source / "model_index.json", target / "model_index.json")
    if (source / "clora.json").is_file():  # its sizes; data and LoRAs that it names stay with the base
        kept = {"vae_image_area", "condition_image_area", "default_size", "preset"}
        write_text(target / "clora.json", read_sidecar(source).model_dump_json(include=kept, indent=2))
    return merge_weights(source / TRANSFORMER, target / TRANSFORMER, modules, dtype, on_file)


def set_schedule(folder: Path, shift: float, sampler: str) -> None:
    """Make the scheduler of a base folder that of a few-step schedule: this shift, and noise afresh at every step for
    the sampler "consistency"."""
    path = folder / "scheduler" / "scheduler_config.json"
    config: dict[str, Any] = parse_json(read_text(path))
    config |= {
        "shift": shift,
        "use_dynamic_shifting": False,
        "shift_terminal": None,
        "stochastic_sampling": sampler == "consistency",
    }
    write_text(path, json.dumps(config, indent=2, sort_keys=True) + "\n")

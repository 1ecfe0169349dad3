"""A collection for a random base."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from clora.backbones.load import linear_shapes
from clora.lora.catalogue import Catalogue, CatalogueEntry, CatalogueSchedule, write_collection
from clora.lora.module import LoraModule

NAMES = ("to_q", "to_out.0", "add_k_proj", "img_mlp.net.2", "img_mod.1", "txt_mod.1", "proj_out")


EFFECTS = {"a": "paint it", "b": "color"}  # their prompts


def write_random_collection(
    base: Path, path: Path, num_steps: int = 4, effects: Mapping[str, str] = EFFECTS, seed: int = 0
) -> Path:
    """A collection for a random base: two effects, updates large enough to show."""
    rng = torch.Generator().manual_seed(seed)
    modules = {
        name: LoraModule(torch.randn(2, K, generator=rng) / K**0.5, torch.randn(N, 2, generator=rng) / 2, 1.0)
        for name, (N, K) in linear_shapes(base).items()
        if name.endswith(NAMES)
    }
    entries = [CatalogueEntry(name=name, student_prompt=prompt) for name, prompt in effects.items()]
    catalogue = Catalogue(base=str(base), schedule=CatalogueSchedule(num_steps=num_steps, shift=3.0), effects=entries)
    write_collection(path, modules, catalogue, dtype=torch.float32)
    return path

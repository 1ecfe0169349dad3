"""Artefacts that several tests share: of the tiny base whole, of a base with one random block as graphs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from clora.backbones.load import linear_shapes
from clora.jobs.export import ExportRequest, export
from clora.lora.catalogue import Catalogue, CatalogueEntry, CatalogueSchedule, write_collection
from clora.lora.module import LoraModule
from tests.support.random_base import write_random_base

NAMES = ("to_q", "to_out.0", "add_k_proj", "img_mlp.net.2", "img_mod.1", "txt_mod.1", "proj_out")


def write_random_collection(base: Path, path: Path, num_steps: int = 4) -> Path:
    """A collection for a random base: two effects, updates large enough to show."""
    rng = torch.Generator().manual_seed(0)
    modules = {
        name: LoraModule(torch.randn(2, K, generator=rng) / K**0.5, torch.randn(N, 2, generator=rng) / 2, 1.0)
        for name, (N, K) in linear_shapes(base).items()
        if name.endswith(NAMES)
    }
    effects = [CatalogueEntry(name="a", student_prompt="paint it"), CatalogueEntry(name="b", student_prompt="color")]
    catalogue = Catalogue(base=str(base), schedule=CatalogueSchedule(num_steps=num_steps, shift=3.0), effects=effects)
    write_collection(path, modules, catalogue, dtype=torch.float32)
    return path


@pytest.fixture(scope="session")
def one_block(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base of one random block, and a collection for it."""
    return _write_pair(tmp_path_factory.mktemp("one_block"))


@pytest.fixture(scope="session")
def one_block_2511(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same of the kind that modulates references as at noise level 0."""
    return _write_pair(tmp_path_factory.mktemp("one_block_2511"), zero_cond_t=True)


def _write_pair(folder: Path, **config: Any) -> tuple[Path, Path]:
    base = write_random_base(folder / "base", num_layers=1, **config)
    return base, write_random_collection(base, folder / "collection.safetensors")


@pytest.fixture(scope="session")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base with its shipped collection as a merged artefact, verified with one edit."""
    folder = tmp_path_factory.mktemp("merged") / "artefact"
    export(ExportRequest(folder, "merged", "tiny", num_edits=1))
    return folder

"""Artefacts that several tests share: of the tiny base whole, of a base with one random block as graphs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from clora.jobs.export import ExportRequest, export
from tests.support.random_base import write_random_base
from tests.support.random_collection import write_random_collection


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

"""A server that is told whose artefacts to serve takes no other, and looks before it loads."""

from __future__ import annotations

from pathlib import Path

import pytest

from clora.errors import InputError
from clora.export.manifest import read_manifest, write_manifest
from clora.serve import load
from clora.serve.load import open_model
from clora.serve.settings import Settings
from tests.export.test_manifest import make
from tests.export.test_signature import write_keys

pytest.importorskip("cryptography")


class Loaded(Exception):
    """A weight would be read now."""


@pytest.fixture
def artefact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    def stop(*_: object) -> None:
        raise Loaded

    monkeypatch.setattr(load, "base_of", lambda *_: "tiny")
    monkeypatch.setattr(load, "open_artefact", stop)
    return make(tmp_path / "artefact")


def test_open_model_refuses_an_artefact_that_nobody_or_another_signed(artefact: Path, tmp_path: Path) -> None:
    _, public = write_keys(tmp_path, "own")
    settings = Settings(artefact=artefact, signed_by=public)
    with pytest.raises(InputError, match="is not signed"):
        open_model(settings)
    write_manifest(artefact, read_manifest(artefact), write_keys(tmp_path, "other")[0])
    with pytest.raises(InputError, match="was not signed with the key"):
        open_model(settings)


def test_open_model_takes_an_artefact_of_the_key(artefact: Path, tmp_path: Path) -> None:
    private, public = write_keys(tmp_path, "own")
    write_manifest(artefact, read_manifest(artefact), private)
    with pytest.raises(Loaded):
        open_model(Settings(artefact=artefact, signed_by=public))


def test_open_model_refuses_a_signer_of_a_collection(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="signed_by"):
        open_model(Settings(signed_by=write_keys(tmp_path, "own")[1]))

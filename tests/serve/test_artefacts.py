"""A folder of `clora export` behind the server gives the pictures of the collection it was made of."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest
import torch

from clora.inference.editor import load_editor
from clora.jobs.export import ExportRequest, export
from clora.serve.load import open_model
from clora.serve.service import Service
from clora.serve.settings import Settings
from tests.serve.conftest import picture, post
from tests.serve.test_edits import assert_near, pixels


@pytest.mark.slow
@pytest.mark.parametrize("form", ["merged", "onnx"])
def test_open_model_serves_an_artefact(
    small_base: tuple[Path, Path],
    tmp_path: Path,
    make_service: Callable[..., Service],
    form: Literal["merged", "onnx"],
) -> None:
    if form == "onnx":
        pytest.importorskip("onnxruntime")
    base, collection = small_base
    # tests/export/test_vae_graphs.py serves one with its VAE.
    export(ExportRequest(tmp_path / "artefact", form, str(base), collection, num_edits=1, with_vae=form == "merged"))
    service = make_service(opened=open_model(Settings(artefact=tmp_path / "artefact")))
    answer = post(service, {"effect": "b", "seed": "3"})
    assert answer.status_code == 200
    (wanted,) = load_editor(str(base), collection, "cpu", torch.float32).edit([picture()], ["b"], seeds=[3])
    assert_near(pixels(answer), wanted)

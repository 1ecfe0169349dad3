"""edits: `clora edit --artefact` makes what base and LoRA make, and has no choice of what the artefact decides."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from clora.errors import InputError
from clora.export import edits
from clora.export.artefact import device_of, open_artefact
from clora.export.manifest import read_manifest
from clora.export.verify import picture
from clora.inference.batching import StepBatcher
from clora.inference.edit_plan import EditRequest
from clora.inference.editor import Encoded
from clora.jobs.edit import edit_files

FORMATS = ("merged", "aoti", "onnx", "tensorrt")


@pytest.fixture
def request_(tmp_path: Path) -> EditRequest:
    picture(4, 96).save(tmp_path / "in.png")
    return EditRequest((tmp_path / "in.png",), tmp_path / "out.png", effects=("sepia",), seeds=(5,))


def test_artefact_editor_makes_the_eager_models_image(merged: Path, request_: EditRequest, tmp_path: Path) -> None:
    edit_files(request_, artefact=merged)
    edit_files(replace(request_, base="tiny", output=tmp_path / "eager.png"))
    made, wanted = (np.asarray(Image.open(tmp_path / name), np.int16) for name in ("out.png", "eager.png"))
    assert np.abs(made - wanted).max() <= 1
    edit_files(replace(request_, output=tmp_path / "other.png", effects=("pencil_sketch",)), artefact=merged)
    assert np.abs(np.asarray(Image.open(tmp_path / "other.png"), np.int16) - wanted).max() > 20


def test_step_batcher_makes_the_image_that_edit_makes_of_a_seed(merged: Path) -> None:
    editor, images = edits.artefact_editor(merged, str(merged)), [picture(4), picture(5)]
    names = ["sepia", "pencil_sketch"]
    wanted = [editor.edit([image], [name], seeds=[7])[0] for image, name in zip(images, names, strict=True)]
    assert editor.catalogue is not None
    encoded, prompts = Encoded(editor.backbone, images, []), [editor.catalogue.effect(name).prompt for name in names]
    conds = [encoded.cond([pair]) for pair in enumerate(prompts)]
    with closing(StepBatcher.over_artefact(open_artefact(merged))) as batcher:
        futures = [batcher.submit(cond, seed=7, effect=name) for cond, name in zip(conds, names, strict=True)]
        x0_BTC = torch.stack([future.result(120) for future in futures])
    for made, image in zip(editor.backbone.to_pil(editor.backbone.decode(x0_BTC, conds[0].grid)), wanted, strict=True):
        assert np.abs(np.asarray(made, np.int16) - np.asarray(image, np.int16)).max() <= 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": 4}, "steps: .* holds the modulation of 8 steps .shift 3., not of 4"),
        ({"guidance": 2.0}, "guidance: .* samples without it, 2 was given"),
        ({"lora": Path("x.safetensors")}, "lora: is the artefact's own"),
        ({"dtype": "bfloat16"}, "dtype: is the artefact's own"),
        ({"device": "cuda:99"}, "device: cuda:99 is not there"),
        ({"batch_size": 64}, "batch_size: .* takes 32 at most"),
        ({"effects": ("sepa",)}, "effect 'sepa' is not in the collection; did you mean 'sepia'"),
    ],
)
def test_artefact_request_names_what_an_artefact_cannot(
    merged: Path, request_: EditRequest, values: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(edits, "open_encoders", None)
    monkeypatch.setattr(edits, "open_artefact", None)
    with pytest.raises(InputError, match=message):
        edit_files(replace(request_, **values), artefact=merged)
    assert not request_.output.exists()


def test_device_of_is_what_an_artefacts_code_was_made_for(merged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifests = {form: read_manifest(merged).model_copy(update={"format": form}) for form in FORMATS}
    for gpus in (0, 2):
        monkeypatch.setattr(torch.cuda, "is_available", lambda gpus=gpus: gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda gpus=gpus: gpus)
        found = {form: str(device_of(merged, manifest, None)) for form, manifest in manifests.items()}
        own = "cuda" if gpus else "cpu"
        assert found == {"merged": own, "aoti": "cpu", "onnx": "cpu", "tensorrt": own}  # an engine does not open there
    assert str(device_of(merged, manifests["tensorrt"], "cuda:1")) == "cuda:1"
    assert str(device_of(merged, manifests["merged"], "cpu")) == "cpu"
    for form, name in (("aoti", "cuda"), ("onnx", "cuda:1"), ("tensorrt", "cpu")):
        with pytest.raises(InputError, match=f"device: .* is code for .*, not for {name}; leave it out"):
            device_of(merged, manifests[form], name)


def test_artefact_request_refuses_a_folder_that_is_none(request_: EditRequest, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no manifest.json, so it is no artefact"):
        edit_files(request_, artefact=tmp_path)

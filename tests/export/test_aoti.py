"""AOTInductor packages: what one says of the sizes it takes, and one that cannot be loaded."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch

from clora.errors import InputError
from clora.export.aoti import open_aoti, shapes_taken
from clora.export.graph import example_inputs
from clora.export.manifest import Limits
from tests.export.test_clora_sample import write_package


def test_shapes_taken_are_the_widths_of_the_inputs_and_the_limits() -> None:
    found = shapes_taken(example_inputs(64, 32, 16, torch.bfloat16), Limits(batch=3, tokens=40, text_buckets=(8, 24)))
    assert found == {
        "clora_batch": "3",
        "clora_tokens": "40",
        "clora_text": "24",
        "clora_channels": "64",
        "clora_text_width": "32",
        "clora_angles": "8",
        "clora_dtype": "bfloat16",
    }


def test_open_aoti_says_in_one_sentence_what_cannot_be_loaded(tmp_path: Path) -> None:
    """Torch's own error has a backtrace; where packages are unpacked is what a user can mend."""
    write_package(tmp_path / "model.pt2")
    with pytest.raises(InputError) as error:
        open_aoti(tmp_path)
    assert str(error.value).startswith(f"{tmp_path}/model.pt2: cannot be loaded from {tempfile.gettempdir()}, where")
    assert "no noexec" in str(error.value) and "\n" not in str(error.value)

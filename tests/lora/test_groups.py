"""groups.json: the collection that serves an effect, and what is said of a file that is none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from clora.errors import InputError
from clora.lora.groups import find_collection


def test_find_collection_of_every_effect(tmp_path: Path) -> None:
    groups = [
        {"config": "a.yaml", "collection": "a/a.safetensors", "effects": ["oil", "ink"]},
        {"config": "b.yaml", "collection": "b/b.safetensors", "effects": ["snow"]},
    ]
    path = tmp_path / "groups.json"
    path.write_text(json.dumps({"base": "tiny", "groups": groups}))
    for group in groups:
        for effect in group["effects"]:
            assert find_collection(path, [effect]) == tmp_path / str(group["collection"])
    with pytest.raises(InputError, match="oil, snow are in different collections"):
        find_collection(path, ["oil", "snow"])


def test_find_collection_names_a_missing_file_as_missing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"groups.json does not exist; correct the path$"):
        find_collection(tmp_path / "groups.json", ["oil"])
    (tmp_path / "groups.json").write_text(json.dumps({"base": "tiny", "groups": [], "more": 1}))
    with pytest.raises(InputError) as caught:
        find_collection(tmp_path / "groups.json", ["oil"])
    assert len(caught.value.faults) == 2

"""manifest: a folder is opened when every file is as it was exported, and never before that is known."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from clora.errors import InputError, InputErrors
from clora.export import artefact as opening
from clora.export.artefact import library_versions, machine, open_artefact
from clora.export.manifest import MANIFEST, Limits, Manifest, check_folder, list_files, read_manifest, write_manifest

CATALOGUE = {
    "format_version": 1,
    "base": "tiny",
    "schedule": {"num_steps": 8, "shift": 3.0},
    "effects": [{"name": "a", "student_prompt": "paint it"}],
}


def make(folder: Path, **values: Any) -> Path:
    """A folder with two files and a manifest that fits them; no model is in it."""
    (folder / "sub").mkdir(parents=True)
    (folder / "model.pt2").write_bytes(b"native code" * 100)
    (folder / "sub" / "weights.safetensors").write_bytes(b"weights")
    settings: dict[str, Any] = {
        "format": "aoti", "precision": "float32", "base": "tiny", "base_identity": "0", "catalogue": CATALOGUE,
        "num_steps": 8, "shift": 3.0, "sampler": "consistency", "rounding": 0.0, "platform": machine(),
        "limits": Limits(batch=4, tokens=64, text_buckets=(32,)), "versions": library_versions(),
    }  # fmt: skip
    write_manifest(folder, Manifest(**settings | values, files=list_files(folder)))
    return folder


@pytest.fixture
def never_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Anything that would load from a folder fails the test."""

    def load(*_: object) -> None:
        raise AssertionError("something was loaded")

    for name in ("open_aoti", "open_onnx", "load_backbone"):
        monkeypatch.setattr(opening, name, load)


def edit_manifest(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    values = json.loads((folder / MANIFEST).read_text())
    change(values)
    (folder / MANIFEST).write_text(json.dumps(values))


def rename_entry(name: str) -> Callable[[Path], None]:
    """The manifest calls its native code by another name, at which a file with those bytes lies, if it can."""

    def damage(folder: Path) -> None:
        shutil.copy(folder / "model.pt2", folder.parent / "outside.pt2")
        edit_manifest(folder, lambda values: values["files"].update({name: values["files"].pop("model.pt2")}))
        (folder / "model.pt2").unlink()

    return damage


def link_file(folder: Path) -> None:
    shutil.move(folder / "model.pt2", folder.parent / "elsewhere.pt2")
    (folder / "model.pt2").symlink_to(folder.parent / "elsewhere.pt2")


def link_folder(folder: Path) -> None:
    shutil.move(folder / "sub", folder.parent / "elsewhere")
    (folder / "sub").symlink_to(folder.parent / "elsewhere")


def flip_byte(folder: Path) -> None:
    path = folder / "model.pt2"
    raw, status = bytearray(path.read_bytes()), path.stat()
    raw[-1] ^= 1
    path.write_bytes(raw)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # size and time are as before


def change(key: str, value: Any) -> Callable[[Path], None]:
    return lambda folder: edit_manifest(folder, lambda values: values.update({key: value}))


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "changed": (flip_byte, "model.pt2 is not what was exported"),
    "cut off": (lambda f: os.truncate(f / "model.pt2", 500), "model.pt2 has 500 bytes, manifest.json says 1100"),
    "empty": (lambda f: os.truncate(f / "model.pt2", 0), "model.pt2 has 0 bytes"),
    "longer": (lambda f: (f / "model.pt2").open("ab").write(b"x"), "model.pt2 has 1101 bytes"),
    "missing": (lambda f: (f / "model.pt2").unlink(), "model.pt2 is missing"),
    "missing below": (lambda f: shutil.rmtree(f / "sub"), "sub/weights.safetensors is missing"),
    "a folder": (lambda f: ((f / "model.pt2").unlink(), (f / "model.pt2").mkdir()), "model.pt2 is no regular file"),
    "a pipe": (lambda f: ((f / "model.pt2").unlink(), os.mkfifo(f / "model.pt2")), "model.pt2 is no regular file"),
    "a link": (link_file, "model.pt2 cannot be read or is a link"),
    "behind a link": (link_folder, "sub/weights.safetensors lies behind the link sub"),
    "unlisted": (lambda f: (f / "sub" / "more.safetensors").write_bytes(b""), "sub/more.safetensors is not in"),
    "unlisted link": (lambda f: (f / "more").symlink_to(f.parent), "more is not in manifest.json"),
    "no manifest": (lambda f: (f / MANIFEST).unlink(), "has no manifest.json, so it is no artefact"),
    "manifest a link": (
        lambda f: ((f / MANIFEST).rename(f.parent / "m"), (f / MANIFEST).symlink_to(f.parent / "m")),
        "has no manifest.json",
    ),
    "manifest empty": (lambda f: (f / MANIFEST).write_text(""), "manifest.json: is no JSON"),
    "manifest cut off": (lambda f: os.truncate(f / MANIFEST, 300), "manifest.json: is no JSON"),
    "manifest binary": (lambda f: (f / MANIFEST).write_bytes(b"\xff\x00"), "manifest.json is not UTF-8"),
    "manifest a list": (lambda f: (f / MANIFEST).write_text("[]"), "format version None"),
    "manifest twice": (
        lambda f: (f / MANIFEST).write_text('{"format_version": 1, "format_version": 1}'), "manifest.json: is no JSON",
    ),
    "newer": (change("format_version", 2), "format version 2, this clora reads 1"),
    "unknown format": (change("format", "pickle"), "manifest.json: format: "),
    "unknown key": (change("run", "rm"), "manifest.json: run: "),
    "no number": (change("rounding", "x"), "manifest.json: rounding: "),
    "bad hash": (
        lambda f: edit_manifest(f, lambda v: v["files"]["model.pt2"].update(sha256="..")), "files.model.pt2.sha256: "
    ),
    "too many files": (
        lambda f: edit_manifest(f, lambda v: v["files"].update({f"f{i}": v["files"]["model.pt2"] for i in range(999)})),
        "manifest.json: files: ",
    ),
    "above": (rename_entry("../outside.pt2"), "names the file '../outside.pt2', which is not inside"),
    "above, hidden": (rename_entry("sub/../../outside.pt2"), "which is not inside the folder"),
    "absolute": (rename_entry("/etc/passwd"), "names the file '/etc/passwd', which is not inside"),
    "backslash": (rename_entry("..\\outside.pt2"), "which is not inside the folder"),
    "drive": (rename_entry("C:outside.pt2"), "which is not inside the folder"),
    "not plain": (rename_entry("./sub//model.pt2"), "which is not inside the folder"),
    "itself": (rename_entry("manifest.json"), "names the file 'manifest.json'"),
    "nothing": (rename_entry(""), "names the file ''"),
    "NUL": (rename_entry("a\0b"), "which is not inside the folder"),
    "other torch": (
        lambda f: edit_manifest(f, lambda v: v["versions"].update(torch="1.0")), "was compiled for torch 1.0, this is"
    ),
    "other machine": (change("platform", "Plan9 pdp11"), "was compiled for the CPU Plan9 pdp11, this is"),
    "other steps": (change("num_steps", 4), "is for 4 steps with shift 3 .consistency., its catalogue for 8"),
    "other shift": (change("shift", 2.0), "is for 8 steps with shift 2 .consistency., its catalogue for 8"),
    "other sampler": (change("sampler", "euler"), "is for 8 steps with shift 3 .euler."),
    "no catalogue": (change("catalogue", {}), "its manifest holds no catalogue"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_open_artefact_refuses_before_anything_is_loaded(damage: str, tmp_path: Path, never_loaded: None) -> None:
    folder = make(tmp_path / "artefact")
    check_folder(folder)
    hurt, message = DAMAGES[damage]
    hurt(folder)
    with pytest.raises(InputError, match=message) as error:
        open_artefact(folder)
    for fault in error.value.faults:
        assert str(folder) in fault and "\n" not in fault


def test_open_artefact_opens_what_is_whole(tmp_path: Path, never_loaded: None) -> None:
    with pytest.raises(AssertionError, match="something was loaded"):
        open_artefact(make(tmp_path / "artefact"))


def test_check_folder_tells_every_fault(tmp_path: Path) -> None:
    folder = make(tmp_path / "artefact")
    flip_byte(folder)
    (folder / "sub" / "weights.safetensors").unlink()
    (folder / "new").write_bytes(b"")
    with pytest.raises(InputErrors) as error:
        check_folder(folder)
    assert len(error.value.faults) == 3


def test_read_manifest_returns_what_was_written(tmp_path: Path) -> None:
    manifest = read_manifest(make(tmp_path / "artefact"))
    assert set(manifest.files) == {"model.pt2", "sub/weights.safetensors"}
    assert manifest.files["model.pt2"].num_bytes == 1100
    assert manifest.versions["torch"] == str(torch.__version__) and manifest.limits.text_buckets == (32,)
    with pytest.raises(InputError, match="is no folder"):
        read_manifest(tmp_path / "nowhere")

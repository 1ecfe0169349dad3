"""build: what is wrong is told in a sentence before any weight is read, and a failed export leaves nothing."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from clora.config import collection_lora
from clora.errors import InputError, ParityError, WriteError
from clora.export import build as building
from clora.export.build import check_format, find_source
from clora.io.atomic import new_folder
from clora.jobs import export as job
from clora.jobs.export import ExportRequest, export


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(*_: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(job, "build", build)


def test_export_tells_bad_requests_before_weights_are_read(
    tmp_path: Path, random_base: Path, no_weights: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, shipped = tmp_path / "artefact", collection_lora("tiny")

    def told(message: str, error: type[Exception] = InputError, **values: Any) -> None:
        request = ExportRequest(**{"output": output, "format": "merged", "base": "tiny", **values})
        with pytest.raises(error, match=message) as found:
            export(request)
        assert "\n" not in str(found.value)

    told("base .* is no bundled base", base="nowhere")
    told("no collection is given", base=str(random_base))
    told("no collection is given", base=None)
    told("does not exist", lora=tmp_path / "missing.safetensors")
    told("carries no catalogue", lora=shipped.parent / "acceleration.safetensors")  # type: ignore[union-attr]
    told("is there already", output=tmp_path)
    told("an onnx graph in bfloat16 cannot be verified", format="onnx", precision="bfloat16")
    told("calibration: float32 is not calibrated, fp8 and int8 are; leave it out", calibration=tmp_path)
    told("no-vae: is for aoti and onnx, the VAE is always a part of a merged folder; leave it out", with_vae=False)
    (tmp_path / "file").write_text("")
    told("is no folder", output=tmp_path / "file" / "artefact")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))  # type: ignore[attr-defined]
    told(r"needs 0\.0 GB, 0\.0 are free; make room", WriteError)
    monkeypatch.setattr(shutil, "which", lambda _: None)
    told("needs a C\\+\\+ compiler", format="aoti")
    monkeypatch.undo()
    assert not output.exists() and {path.name for path in tmp_path.iterdir()} == {"file"}


def test_check_format_names_missing_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(InputError, match=r"needs onnx, onnxscript; run pip install 'clora\[export\]'"):
        check_format("onnx", "float32")


def test_find_source_takes_the_catalogues_base() -> None:
    lora = collection_lora("tiny")
    assert lora is not None
    source = find_source(None, lora)
    assert source.base == "tiny" and len(source.catalogue.effects) == 50


def test_export_of_a_lora_for_another_base_leaves_nothing(tmp_path: Path, random_base: Path) -> None:
    with pytest.raises(InputError, match="give a LoRA trained on this base"):
        export(ExportRequest(tmp_path / "artefact", "merged", str(random_base), collection_lora("tiny")))
    assert list(tmp_path.iterdir()) == []


def test_export_that_misses_the_tolerance_leaves_nothing(
    tmp_path: Path, one_block: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    merge = building.write_merged

    def off(source: Path, target: Path, modules: Any, *rest: Any) -> Any:
        return merge(source, target, {name: m for name, m in modules.items() if "to_q" not in name}, *rest)

    monkeypatch.setattr(building, "write_merged", off)
    with pytest.raises(ParityError, match=r"velocity is .* from the eager model's, the bar is 3e-06") as error:
        export(ExportRequest(tmp_path / "artefact", "merged", str(one_block[0]), one_block[1], num_edits=1))
    assert "\n" not in str(error.value) and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), RuntimeError("x")])
def test_export_that_is_cut_off_leaves_nothing(
    tmp_path: Path, one_block: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def fail(_: Path) -> None:
        raise error

    monkeypatch.setattr(building, "list_files", fail)
    wanted = WriteError if isinstance(error, OSError) else type(error)
    with pytest.raises(wanted):
        export(ExportRequest(tmp_path / "artefact", "merged", str(one_block[0]), one_block[1]))
    assert list(tmp_path.iterdir()) == []


def test_new_folder_is_whole_or_not_there(tmp_path: Path) -> None:
    path = tmp_path / "made"
    with new_folder(path) as folder:
        (folder / "a").write_text("a")
        assert not path.exists() and folder.name.startswith(".made.")
    assert (path / "a").read_text() == "a"
    with pytest.raises(FileExistsError), new_folder(path):
        pass
    with pytest.raises(KeyError), new_folder(tmp_path / "other") as folder:
        (folder / "a").write_text("a")
        raise KeyError
    with pytest.raises(OSError), new_folder(tmp_path / "late"):  # something appears there meanwhile
        (tmp_path / "late").mkdir()
        (tmp_path / "late" / "theirs").write_text("")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["late", "made"]
    assert (tmp_path / "late" / "theirs").exists()


def test_export_in_bf16_is_at_most_twice_as_far_as_eager(tmp_path: Path, one_block: tuple[Path, Path]) -> None:
    request = ExportRequest(tmp_path / "a", "merged", str(one_block[0]), one_block[1], "bfloat16", num_edits=1)
    manifest = export(request)
    parity = manifest.parity
    assert parity["ok"] and 1e-4 < parity["velocity"] <= parity["velocity_bar"] and parity["pixel_bar"] is None
    assert 1e-4 < manifest.rounding < 0.1

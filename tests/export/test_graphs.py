"""aoti and onnx: a compiled graph is the eager model at every shape, and refuses what it does not hold."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from clora.backbones.cond import make_cond
from clora.errors import InputError
from clora.export import artefact as opening
from clora.export import build as building
from clora.export.artefact import Artefact, open_artefact
from clora.export.graph import trace
from clora.export.manifest import COLLECTION, Format, Limits, read_manifest
from clora.export.onnx_graph import GRAPH, WEIGHTS, check_weights_place
from clora.export.verify import load_eager, padding_change, picture, random_cases, relative, verify
from clora.inference.edit_plan import EditRequest
from clora.jobs.edit import edit_files
from clora.jobs.export import ExportRequest, export
from clora.jobs.verify import verify_artefact

pytestmark = pytest.mark.slow
FORMATS: tuple[Format, ...] = ("aoti", "onnx")


@pytest.fixture(scope="module", params=FORMATS)
def artefact(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Artefact]:
    """Of a 2509 base as AOTInductor's, of a 2511 base as ONNX."""
    if request.param == "onnx":
        pytest.importorskip("onnxruntime")
    base, lora = request.getfixturevalue("one_block" if request.param == "aoti" else "one_block_2511")
    folder = tmp_path_factory.mktemp(request.param) / "artefact"
    with torch._inductor.config.patch({"aot_inductor.debug_compile": True}):  # a compiler in less of a hurry
        export(ExportRequest(folder, request.param, str(base), lora, num_edits=1, with_vae=False))
    yield open_artefact(folder)


def test_export_graph_is_the_eager_model_at_five_shapes(artefact: Artefact) -> None:
    lora = artefact.folder / COLLECTION
    eager, velocity = load_eager(artefact.manifest.base, lora, torch.float32, ("transformer",))
    cases = list(random_cases(artefact, eager.token_channels, 32, seed=3))
    assert [len(x) for x, _, _ in cases] == [1, 2, 3, 4, 8]
    for case in cases:
        wanted = velocity(*case)
        assert relative(artefact.velocity(*case), wanted) <= 3e-6
    assert padding_change(artefact.velocity, cases) == 0
    # The measure is awake: text that counts moves the velocity, as the step does.
    x, sigma, cond = cases[1]
    made = artefact.velocity(x, sigma, cond)
    assert relative(artefact.velocity(x, sigma.flip(0), cond), made) > 1e-3
    cond.text_BLD[0, 0] += 1
    assert relative(artefact.velocity(x, sigma, cond), made) > 1e-4


def test_export_graph_holds_its_files_and_parity(artefact: Artefact) -> None:
    manifest, folder = read_manifest(artefact.folder), artefact.folder
    models = {"aoti": {"model.pt2"}, "onnx": {GRAPH, WEIGHTS}}[manifest.format]
    assert set(manifest.files) == {COLLECTION, *models}
    assert {path.name for path in folder.iterdir()} == {"manifest.json", COLLECTION, *models}
    assert manifest.parity["ok"] and manifest.num_steps == 4
    assert verify_artefact(folder, num_edits=1).faults == []


def test_graph_velocity_names_what_it_does_not_hold(artefact: Artefact) -> None:
    rng = torch.Generator().manual_seed(0)
    x, ref = torch.randn(1, 6, 64, generator=rng), torch.randn(1, 6, 64, generator=rng)

    def cond(length: int = 9, batch: int = 1):  # type: ignore[no-untyped-def]
        texts = [torch.zeros(length, 32)] * batch
        return make_cond(texts, [(ref.expand(batch, -1, -1), (2, 3))], (2, 3))

    one = torch.ones(1)
    assert artefact.velocity(x, one, cond()).shape == (1, 6, 64)
    with pytest.raises(InputError, match=r"noise level 0\.77 is none of its 4 \(shift 3\)"):
        artefact.velocity(x, one * 0.77, cond())
    with pytest.raises(InputError, match="a text of 2049 tokens is longer than its 2048; shorten the prompt"):
        artefact.velocity(x, one, cond(2049))
    with pytest.raises(InputError, match="a batch of 33 is beyond its 32"):
        artefact.velocity(x.expand(33, -1, -1), one, cond(9, 33))
    with pytest.raises(InputError, match="a result of 1 tokens; it takes 2 to 16384"):
        artefact.velocity(x[:, :1], one, cond())


def test_verify_measures_edits(artefact: Artefact) -> None:
    parity = verify(artefact, num_edits=2, seed=9)
    assert parity.faults == [] and parity.effects == ("a", "b") and parity.latent < 1e-4 and parity.pixel <= 1


def test_artefact_editor_runs_a_graph_between_the_bases_encoders(
    artefact: Artefact, random_base: Path, tmp_path: Path
) -> None:
    picture(4, 80).save(tmp_path / "in.png")
    request = EditRequest((tmp_path / "in.png",), tmp_path / "out.png", effects=("a",), seeds=(1, 2), batch_size=2)
    with pytest.raises(InputError, match="is a folder|do not fit"):
        edit_files(request, artefact=artefact.folder)
    request, lora = replace(request, output=tmp_path / "graph"), artefact.folder / COLLECTION
    edit_files(request, artefact=artefact.folder)
    edit_files(replace(request, output=tmp_path / "eager", base=artefact.manifest.base, lora=lora))
    for path in sorted((tmp_path / "eager").iterdir()):
        made = np.asarray(Image.open(tmp_path / "graph" / path.name), np.int16)
        assert np.abs(made - np.asarray(Image.open(path), np.int16)).max() <= 1
    with pytest.raises(InputError, match=r"is not what .* was exported from; give that one with --base"):
        edit_files(replace(request, base=str(random_base)), artefact=artefact.folder)


def test_check_weights_place_refuses_weights_elsewhere(tmp_path: Path) -> None:
    """Also where the manifest, written anew, has the right hash of such a graph."""
    onnx = pytest.importorskip("onnx")
    for place in ("../model.onnx.data", "/etc/passwd", "other.data"):
        tensor = onnx.TensorProto(name="w", data_type=1, dims=[2], data_location=onnx.TensorProto.EXTERNAL)
        tensor.external_data.add(key="location", value=place)
        graph = onnx.helper.make_graph([], "g", [], [], [tensor])
        (tmp_path / GRAPH).write_bytes(onnx.helper.make_model(graph).SerializeToString())
        with pytest.raises(InputError, match=f"w is to be read from '{place}', not model.onnx.data"):
            check_weights_place(tmp_path)
    (tmp_path / GRAPH).write_bytes(b"\xff" * 50)
    with pytest.raises(InputError, match="is no ONNX graph"):
        check_weights_place(tmp_path)


def test_export_of_onnx_without_its_runtime_is_checked_but_not_measured(
    one_block: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What torch writes is replaced by a stand-in here: the other tests have the graph itself."""
    monkeypatch.setattr(opening, "has_runtime", lambda: False)
    monkeypatch.setattr(building, "build_onnx", lambda network, inputs, limits, folder: (folder / GRAPH).touch())
    manifest = export(ExportRequest(tmp_path / "artefact", "onnx", str(one_block[0]), one_block[1], with_vae=False))
    assert manifest.parity == {"ok": None, "unmeasured": "onnxruntime is not installed"}
    assert set(manifest.files) == {COLLECTION, GRAPH}


def test_trace_refuses_a_graph_that_leaves_an_input_unused() -> None:
    class Deaf(torch.nn.Module):
        def forward(self, x, refs, text, cos, sin, step, text_len):  # type: ignore[no-untyped-def]
            return x + refs.sum() + text.sum() + cos.sum() + sin.sum() + step[:, None, None]

    from clora.export.graph import example_inputs

    limits = Limits(batch=4, tokens=64, text_buckets=(32,))
    with pytest.raises(ValueError, match="does not use text_len"):
        trace(Deaf(), example_inputs(8, 8, 8, torch.float32), limits)

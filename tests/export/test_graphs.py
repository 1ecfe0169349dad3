"""aoti and onnx: a compiled graph is the eager model at every shape, and refuses what it does not hold."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from clora import _C
from clora.backbones.cond import Cond, cat_conds, make_cond
from clora.errors import InputError
from clora.export import artefact as opening
from clora.export import build as building
from clora.export.artefact import Artefact, open_artefact
from clora.export.graph import trace
from clora.export.manifest import COLLECTION, Format, Limits, read_manifest
from clora.export.onnx_graph import GRAPH, WEIGHTS, check_weights_place
from clora.export.verify import load_eager, padding_change, picture, random_cases, relative, verify
from clora.inference.batching import StepBatcher
from clora.inference.edit_plan import EditRequest
from clora.inference.sampling import few_step_sampling, follow
from clora.jobs.edit import edit_files
from clora.jobs.export import ExportRequest, export
from clora.jobs.verify import verify_artefact
from clora.method.samplers import draw_noise, few_step_sample, noise_generators, ode_sample
from tests.export.test_clora_sample import PROGRAM

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


def test_step_batcher_over_a_graph_makes_each_request_as_alone(artefact: Artefact) -> None:
    given = [(case_cond(seed, length), seed) for seed, length in enumerate((9, 31, 12, 30, 17, 25, 8, 20))]
    with closing(StepBatcher.over_artefact(artefact)) as batcher:
        futures = [batcher.submit(cond, seed=seed) for cond, seed in given]
        together = [future.result(60) for future in futures]
        assert batcher.stats()["batch_mean"] > 2
    with closing(StepBatcher.over_artefact(artefact, max_batch=1)) as batcher:
        alone = [batcher.submit(cond, seed=seed).result(60) for cond, seed in given]
    sampling = few_step_sampling(4, 3.0)
    eager, velocity = load_eager(artefact.manifest.base, artefact.folder / COLLECTION, torch.float32, ("transformer",))
    for (cond, seed), x0, x0_alone in zip(given, together, alone, strict=True):
        run = partial(follow, eager, cond=cond, sampling=sampling, seeds=[seed], pipeline_noise=True)
        if artefact.manifest.format == "aoti":  # whose sums do not depend on the batch
            assert torch.equal(x0, x0_alone) and torch.equal(x0, run(artefact.velocity)[0])
        assert relative(x0, x0_alone) < 1e-5 and relative(x0, run(velocity)[0]) < 1e-5


def test_sample_engine_is_the_loop_over_python_bit_for_bit(artefact: Artefact) -> None:
    served, conds = artefact.served(), [case_cond(seed, length) for seed, length in enumerate((9, 31, 12))]
    given = [served.conditions(cond) for cond in conds]
    refs, text = torch.stack([one.refs for one in given]), torch.stack([one.text for one in given])
    lengths = torch.tensor([one.text_len for one in given])
    for sampler, loop in (("consistency", few_step_sample), ("euler", ode_sample)):
        generators = noise_generators([5, 6, 7])
        noise = draw_noise(generators, (24, 64))
        x0 = _C.sample_engine(
            served.engine, noise, refs, text, given[0].cos, given[0].sin, lengths, generators, served.sigmas, sampler
        )
        assert torch.equal(x0, loop(artefact.velocity, cat_conds(conds), (24, 64), served.sigmas, [5, 6, 7]))


def test_clora_sample_makes_what_python_makes(artefact: Artefact, tmp_path: Path) -> None:
    """In an empty environment, bit for bit; also with noise that was drawn elsewhere and by another sampler."""
    if artefact.manifest.format != "aoti":
        pytest.skip("runs AOTInductor packages alone")
    served, conds, seeds = (
        artefact.served(),
        [case_cond(seed, length) for seed, length in enumerate((9, 31))],
        [5, 2**40],
    )
    given = [served.conditions(cond) for cond in conds]
    tensors = {
        "refs": torch.stack([one.refs for one in given]),
        "text": torch.stack([one.text for one in given]),
        "cos": given[0].cos,
        "sin": given[0].sin,
        "text_len": torch.tensor([one.text_len for one in given]),
        "seed": torch.tensor(seeds),
        "grid": torch.tensor(conds[0].grid),
    }

    def run(*network: object, **more: Tensor) -> Tensor:
        save_file(tensors | more, tmp_path / "in.safetensors")
        files = ("--conditions", tmp_path / "in.safetensors", "--output", tmp_path / "out.safetensors")
        command = list(map(str, (PROGRAM, *network, *files, "--threads", 1)))
        subprocess.run(command, env={}, check=True, timeout=120)
        assert not list(tmp_path.glob("*.part"))
        return load_file(tmp_path / "out.safetensors")["x0"]

    loop = partial(few_step_sample, artefact.velocity, cat_conds(conds), (24, 64), served.sigmas, seeds)
    assert torch.equal(run("--artefact", artefact.folder), loop(grid=conds[0].grid))
    sigmas = ",".join(str(sigma) for sigma in served.sigmas.tolist())
    network = ("--package", artefact.folder / "model.pt2", "--sigmas", sigmas)
    noise = draw_noise(noise_generators(seeds), (24, 64))
    assert torch.equal(run(*network, noise=noise), loop())
    euler = ode_sample(artefact.velocity, cat_conds(conds), (24, 64), served.sigmas, seeds)
    assert torch.equal(run(*network, "--sampler", "euler", noise=noise), euler)


def test_aoti_engine_refuses_inputs_that_it_was_not_compiled_for(artefact: Artefact) -> None:
    if artefact.manifest.format != "aoti":
        pytest.skip("other runtimes check inputs themselves")
    served = artefact.served()
    given = served.conditions(case_cond(0, 9))
    x, step, length = torch.zeros(1, 24, 64), torch.zeros(1, dtype=torch.int64), torch.tensor([9])
    inputs = {"x": x, "refs": given.refs[None], "text": given.text[None], "cos": given.cos, "sin": given.sin}
    inputs |= {"step": step, "text_len": length}
    wanted = served.engine(**inputs)
    for changed, message in (
        ({"text": given.text[None, :, :1]}, "'text' is of width 1, the package takes 32"),
        ({"x": x[..., :4], "refs": given.refs[None, :, :4]}, "'refs' is of width 4, the package takes 64"),
        ({"cos": given.cos[:, :1], "sin": given.sin[:, :1]}, "'cos' is of width 1, the package takes 8"),
        ({"x": x.repeat(2, 1, 1)}, "are not of one batch"),
        ({"text": given.text[None].bfloat16()}, "must be of one type"),
        ({"cos": given.cos[1:], "sin": given.sin[1:]}, "are not the positions of 71 tokens"),
        (dict(zip(inputs, (one.repeat(33, *[1] * (one.dim() - 1)) for one in inputs.values()), strict=True))
         | {"cos": given.cos, "sin": given.sin}, "batch of 33 is beyond the package's 32"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            served.engine(**(inputs | changed))
    # Strides of its own, as of a transposed view, do not change what is read.
    turned = inputs | {"refs": given.refs.T.contiguous().T[None]}
    assert torch.equal(served.engine(**turned), wanted)


def case_cond(seed: int, length: int) -> Cond:
    """A request of a result of 24 tokens, with one reference of 15."""
    rng = torch.Generator().manual_seed(seed)
    refs = [(torch.randn(1, 15, 64, generator=rng), (5, 3))]
    return make_cond([torch.randn(length, 32, generator=rng)], refs, (4, 6))


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

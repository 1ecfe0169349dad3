"""What is taught, trained, edited and served on another device is, value by value, what the CPU makes of it.

The device is a simulated one (`tests.support.second_device`): it finds what was left on the wrong device, on machines
that have no GPU.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from clora.errors import InputError
from clora.export.artefact import open_files
from clora.export.graph import INPUTS, OUTPUT, example_inputs
from clora.export.manifest import Engine, Limits, check_folder
from clora.export.tensorrt_engine import EngineRun, engine_profiles
from clora.export.verify import verify
from clora.jobs.export import ExportRequest, export
from clora.serve.load import open_model
from clora.serve.models import Model
from clora.serve.settings import Batches, Settings
from tests.support import second_device
from tests.support.processes import LIMIT_S, SERVER, run
from tests.support.random_base import write_random_base
from tests.support.random_collection import write_random_collection
from tests.support.small_job import NAMES, write_config, write_dataset

pytestmark = pytest.mark.slow
DEVICES = ("cpu", second_device.NAME)


def prepare(device: str) -> None:
    """Every process uses the same attention: kernels of torch's own are for devices that it knows."""
    torch.backends.cuda.enable_flash_sdp(False)
    if device == second_device.NAME:
        second_device.use()


def clora(device: str, folder: Path, *arguments: object) -> str:
    return run(1, list(map(str, arguments)), folder / "output", prepare, [device])


def in_a_process(target: Callable[..., None], *given: object) -> None:
    process = SERVER.Process(target=target, args=given)
    process.start()
    process.join(LIMIT_S)
    assert process.exitcode == 0


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_base(tmp_path_factory.mktemp("base") / "base", num_layers=1)


@pytest.fixture(scope="module")
def collection(base: Path) -> Path:
    return write_random_collection(base, base.parent / "collection.safetensors")


@pytest.fixture(scope="module")
def merged(base: Path, collection: Path) -> Path:
    folder = base.parent / "merged"
    export(ExportRequest(folder, "merged", str(base), collection, num_edits=1))
    return folder


def mix_devices() -> None:
    second_device.use()
    here = torch.ones(2, 3)
    there = here.to(second_device.NAME)
    assert torch.equal((2 * there + torch.tensor(1.0)).cpu(), 2 * here + 1)
    for mixed in (lambda: here + there, lambda: torch.cat([there, here]), lambda: there.where(here > 0, there)):
        with pytest.raises(RuntimeError, match="expected all tensors on one device, found second and cpu"):
            mixed()
    for taken in (lambda: there.numpy(), lambda: np.asarray(there)):
        with pytest.raises((TypeError, RuntimeError)):
            taken()


def test_the_second_device_refuses_to_meet_the_cpu() -> None:
    in_a_process(mix_devices)


def test_teach_train_and_eval_on_another_device_are_those_of_the_cpu(base: Path, tmp_path: Path) -> None:
    data, made = write_dataset(tmp_path / "data"), {}
    for device in DEVICES:
        out = tmp_path / device
        config = write_config(tmp_path / f"{device}.yaml", base, data, out)
        said = [
            clora(device, out, "teach", config),
            clora(device, out, "train", config, "train.max_train_steps=4", "objective.imitation_weight=0.1"),
            clora(device, out, "eval", config, "--lora", out / "collection.safetensors"),
        ]
        assert ["on second" in text for text in said] == [device == second_device.NAME] * 3
        files = [out / "collection.safetensors", *(out / "teachers" / f"{name}.safetensors" for name in NAMES)]
        pictures = {path.name: path.read_bytes() for path in sorted((out / "eval").rglob("*.png"))}
        assert pictures
        made[device] = [load_file(path) for path in files], pictures
    (files_here, pictures_here), (files_there, pictures_there) = made.values()
    for here, there in zip(files_here, files_there, strict=True):
        assert here.keys() == there.keys() and all(torch.equal(here[name], there[name]) for name in here)
    assert pictures_here == pictures_there


def test_edit_on_another_device_is_that_of_the_cpu(base: Path, collection: Path, merged: Path, tmp_path: Path) -> None:
    source = tmp_path / "in.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(source)
    networks = (["--base", base, "--lora", collection, "--dtype", "float32"], ["--artefact", merged])
    for number, network in enumerate(networks):
        pictures = []
        for device in DEVICES:
            result = tmp_path / f"{device}-{number}.png"
            options = ("--image", source, "--effect", "a", "--seed", 3, "--device", device, "--output", result)
            clora(device, tmp_path, "edit", *network, *options)
            pictures.append(result.read_bytes())
        assert pictures[0] == pictures[1]


class FakeContext:
    """An engine's execution context that computes 2 x + step at the addresses and shapes that it is told."""

    def __init__(self, told: list[str]) -> None:
        self.told = told
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.works = True

    def set_optimization_profile_async(self, profile: int, handle: int) -> None:
        self.told.append(f"profile {profile} in {handle}")

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> None:
        self.shapes[name] = shape

    def set_tensor_address(self, name: str, address: int) -> None:
        self.addresses[name] = address

    def execute_async_v3(self, handle: int) -> bool:
        self.told.append(f"execute in {handle}")
        assert self.shapes.keys() == set(INPUTS) and self.addresses.keys() == {*INPUTS, OUTPUT}

        def values(name: str, like: str, kind: Any) -> Any:
            place = ctypes.cast(self.addresses[name], ctypes.POINTER(kind))
            return np.ctypeslib.as_array(place, self.shapes[like])

        steps = values("step", "step", ctypes.c_int64)[:, None, None]
        values(OUTPUT, "x", ctypes.c_float)[:] = 2 * values("x", "x", ctypes.c_float) + steps
        return self.works


class FakeStream:
    def __init__(self, name: str, told: list[str]) -> None:
        self.name, self.told, self.cuda_stream = name, told, 7

    def wait_stream(self, other: FakeStream) -> None:
        self.told.append(f"{self.name} waits for {other.name}")


def run_an_engine() -> None:
    second_device.use()
    told: list[str] = []
    context, device = FakeContext(told), torch.device(second_device.NAME, 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "device", lambda _: nullcontext())
        patch.setattr(torch.cuda, "stream", lambda _: nullcontext())
        patch.setattr(torch.cuda, "Stream", lambda _: FakeStream("its own", told))
        patch.setattr(torch.cuda, "current_stream", lambda: FakeStream("the caller's", told))
        patch.setattr(torch.Tensor, "record_stream", lambda _, stream: told.append(f"kept for {stream.name}"))
        profiles = engine_profiles(Limits(batch=4, tokens=24, text_buckets=(8,)), 8)
        engine = Engine(
            library="tensorrt",
            version="11",
            target="SM90",
            attention="fused",
            attentions=1,
            weight_streaming=False,
            profiles=profiles,
        )
        loaded = SimpleNamespace(create_execution_context=lambda: context)
        run = EngineRun(Path("artefact"), engine, loaded, device)
        inputs = list(example_inputs(64, 32, 16, torch.float32))
        inputs[5] = torch.tensor([0, 3])
        expected = 2 * inputs[0] + inputs[5][:, None, None]

        # Of the CPU: 12 tokens are beyond the profile of one reference.
        torch.testing.assert_close(run(*inputs), expected)
        assert told == ["profile 1 in 7", "execute in 7"]
        told.clear()
        there = run(inputs[0].mT.contiguous().mT.to(device), *(one.to(device) for one in inputs[1:]))
        assert there.device == device
        torch.testing.assert_close(there.cpu(), expected)
        waits = ["its own waits for the caller's", "execute in 7", "the caller's waits for its own"]
        assert told == [*waits, "kept for the caller's"]
        with pytest.raises(InputError, match="artefact: sizes beyond its engine's profiles"):
            run(*(torch.cat([one] * 3) if one.dim() != 2 else one for one in inputs))
        context.works = False
        with pytest.raises(RuntimeError, match="artefact: its engine failed"):
            run(*inputs)


def test_engine_run_gives_an_engine_every_input_and_waits_for_what_is_on_its_gpu() -> None:
    in_a_process(run_an_engine)


def verify_once(device: str, folder: Path) -> None:
    prepare(device)
    parity = verify(open_files(folder, check_folder(folder), None, torch.device(device)), num_edits=1)
    assert not parity.faults and 0 < parity.velocity and parity.padding == 0 and parity.edits == 1


def test_verify_compares_where_the_artefact_is(merged: Path) -> None:
    in_a_process(verify_once, second_device.NAME, merged)


def serve_once(device: str, settings: Settings, place: Path) -> None:
    """Latents and picture of one request, as the server makes them."""
    prepare(device)
    model = Model(open_model(settings), Batches(), 100, lambda *_: None)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    cond = model.encode((picture,), "paint it").result(60)
    assert cond.text_BLD.device.type == device
    x0_TC = model.denoise(cond, 3, "a", 60, None).result(60)
    np.savez(place, x0=x0_TC.numpy(), pixels=np.asarray(model.decode(x0_TC, cond.grid).result(60)))
    model.close()


def served(device: str, model: dict[str, Any], place: Path) -> dict[str, Any]:
    dtype = {} if "artefact" in model else {"dtype": "float32"}
    settings = Settings.model_validate({"device": device, "thumbnails": False, **dtype, **model})
    in_a_process(serve_once, device, settings, place)
    return dict(np.load(place))


@pytest.fixture(params=("collection", "artefact"))
def model(request: pytest.FixtureRequest, base: Path, collection: Path, merged: Path) -> dict[str, Any]:
    return {"artefact": merged} if request.param == "artefact" else {"base": str(base), "collection": collection}


def test_serve_on_another_device_is_that_of_the_cpu(model: dict[str, Any], tmp_path: Path) -> None:
    here, there = (served(device, model, tmp_path / f"{device}.npz") for device in DEVICES)
    for name in ("x0", "pixels"):
        np.testing.assert_array_equal(here[name], there[name])


@pytest.mark.gpu
def test_serve_on_a_gpu_is_that_of_the_cpu_but_for_rounding(model: dict[str, Any], tmp_path: Path) -> None:
    here, there = (served(device, model, tmp_path / f"{device}.npz") for device in ("cpu", "cuda"))
    np.testing.assert_allclose(there["x0"], here["x0"], rtol=0, atol=1e-3 * np.abs(here["x0"]).max())
    assert np.abs(there["pixels"].astype(int) - here["pixels"].astype(int)).max() <= 2

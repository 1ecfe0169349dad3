"""The model for NVIDIA Triton: many requests at once are each what they are alone, and every fault is one sentence.

No server of Triton's is here: `tests/support/triton_backend.py` stands in for it, after its documented API.
"""

from __future__ import annotations

import base64
import json
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from clora import __version__
from clora.config import collection_lora
from clora.errors import InputError, WriteError
from clora.export.manifest import check_folder
from clora.inference.editor import load_editor
from clora.jobs import export as export_job
from clora.jobs.export import ExportRequest, export
from clora.serve.service import Service
from clora.serve.triton_repository import INPUTS, MODEL, check_model, config_text, model_folder
from tests.serve.conftest import picture, png, post
from tests.serve.test_edits import assert_near
from tests.serve.test_edits import pixels as pixels_of
from tests.support import triton_backend
from tests.support.triton_backend import InferenceRequest, InferenceResponse, Server, Tensor, TritonError, loaded
from tests.test_house import ROOT

ALONE = {"encode": 1, "decode": 1}  # so that results are bit-equal whatever shares a batch
KINDS = {port.name: {"TYPE_STRING": np.object_, "TYPE_INT32": np.int32}.get(port.kind, np.int64) for port in INPUTS}


@pytest.fixture(autouse=True)
def backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", triton_backend)


Load = Callable[..., Server]


@pytest.fixture
def load(small_base: tuple[Path, Path], tmp_path: Path) -> Iterator[Load]:
    """Servers with a model over the small base; settings are those of a file beside its configuration."""
    with ExitStack() as held:

        def make(**settings: Any) -> Server:
            own = {"base": str(small_base[0]), "collection": str(small_base[1]), "dtype": "float32", "device": "cpu"}
            folder = write_folder(tmp_path / "clora", own | settings)
            return held.enter_context(loaded(folder, config_of({"settings": "settings.yaml"})))

        yield make


def write_folder(folder: Path, settings: dict[str, Any], version: str = __version__) -> Path:
    """A model's folder with a file of settings."""
    (folder / "1").mkdir(parents=True)
    (folder / "1" / "model.py").write_text(MODEL.format(version=version))
    (folder / "settings.yaml").write_text(json.dumps(settings))
    return folder


def config_of(parameters: dict[str, str]) -> dict[str, Any]:
    """A configuration as Triton hands it on, without what the model does not look at."""
    ports = [
        {"name": port.name, "data_type": port.kind, "dims": [port.count], "optional": port.optional} for port in INPUTS
    ]
    return {"input": ports, "parameters": {key: {"string_value": value} for key, value in parameters.items()}}


def request(timeout: int = 0, **inputs: Any) -> InferenceRequest:
    """A request of one picture, or of `image`; texts are sent as bytes."""
    given = {"image": [png()]} | inputs
    tensors = []
    for name, values in given.items():
        values = values if isinstance(values, list) else [values]
        encoded = [value.encode() if isinstance(value, str) else value for value in values]
        tensors.append(Tensor(name, np.array(encoded, KINDS[name])))
    return InferenceRequest(tensors, timeout)


def outputs(response: InferenceResponse) -> dict[str, list[Any]]:
    error = response.error()
    assert error is None, error.message()
    return {tensor.name(): tensor.as_numpy().tolist() for tensor in response.output_tensors()}


def refusal(response: InferenceResponse) -> tuple[int, str]:
    error = response.error()
    assert error is not None and response.output_tensors() == []
    assert "\n" not in error.message() and "Traceback" not in error.message() and "/" not in error.message()
    return error.code(), error.message()


def pixels(content: bytes) -> Any:
    return pixels_of({"data": [{"b64_json": base64.b64encode(content)}]})


# Edits


def test_requests_of_many_effects_share_steps_and_are_what_they_are_alone(tmp_path: Path) -> None:
    """The tiny base with the collection that it brings along."""
    folder = write_folder(tmp_path / "clora", {"base": "tiny", "batches": ALONE})
    asked = [
        {"effect": effect, "seed": 10 * number, "n": 1 + number % 2, "image": png(number)}
        for number, effect in enumerate(["sepia", "snow", "knit", "oil_paint", "sepia,snow", "mosaic"])
    ]
    with loaded(folder, config_of({"settings": "settings.yaml"})) as server:
        engine = server.model.service.engine
        alone = [outputs(server.send(request(**one))[0].answer()) for one in asked]
        assert engine.stats()["clora"]["effects_max"] == 1
        senders = [
            sender for some in (asked[:2], asked[2:]) for sender in server.send(*(request(**one) for one in some))
        ]
        together = [outputs(sender.answer()) for sender in senders]
        assert engine.stats()["clora"]["effects_max"] >= 3
    editor = load_editor("tiny", collection_lora("tiny"), "cpu", torch.float32)
    for number, (one, first, second) in enumerate(zip(asked, alone, together, strict=True)):
        effects, seeds = one["effect"].split(","), [one["seed"] + more for more in range(one["n"])]
        assert first["seeds"] == second["seeds"] == seeds
        assert first["pictures"] == second["pictures"] and len(set(second["pictures"])) == len(seeds)
        wanted = editor.edit([picture(number)], effects, seeds=seeds)
        for content, image in zip(second["pictures"], wanted, strict=True):
            assert_near(pixels(content), image)
        assert json.loads(second["made_by"][0])["effect"] == effects


def test_an_edit_is_the_one_of_http(load: Load, make_service: Callable[..., Service]) -> None:
    found = outputs(load(batches=ALONE).send(request(effect="b", seed=3, n=2, size="32x64"))[0].answer())
    wanted = post(make_service(batches=ALONE), {"effect": "b", "seed": "3", "n": "2", "size": "32x64"}).json()
    assert found["pictures"] == [base64.b64decode(one["b64_json"]) for one in wanted["data"]]
    assert found["seeds"] == [one["seed"] for one in wanted["data"]] == [3, 4]
    made_by = json.loads(found["made_by"][0])
    assert {k: v for k, v in made_by.items() if k != "created"} == {
        k: v for k, v in wanted.items() if k not in ("created", "data")
    }


def test_an_edit_takes_two_effects_references_and_a_prompt(load: Load, make_service: Callable[..., Service]) -> None:
    server, http = load(batches=ALONE), make_service(batches=ALONE)
    two = [png(1), png(2, (96, 48))]
    files = [("image[]", one) for one in two]
    first, second = server.send(
        request(effect=["a", "b"], seed=5, image=two), request(prompt="color it", seed=6, image=two)
    )
    for sender, data in ((first, {"effect": "a,b", "seed": "5"}), (second, {"prompt": "color it", "seed": "6"})):
        assert np.array_equal(pixels(outputs(sender.answer())["pictures"][0]), pixels_of(post(http, data, files)))


def test_an_edit_without_a_seed_draws_one_and_tells(load: Load) -> None:
    first, second = (
        outputs(sender.answer())["seeds"] for sender in load().send(request(effect="a"), request(effect="b"))
    )
    assert first != second and len(first) == 1


def test_the_client_of_the_documents_gets_its_pictures(
    load: Load, tmp_path: Path, make_service: Callable[..., Service], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The program of docs/SERVING.md, with Triton's own client over its own protocol."""
    pytest.importorskip("tritonclient")
    from tests.support.triton_grpc import listening

    [program] = [
        block
        for block in re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "SERVING.md").read_text(), re.S)
        if "tritonclient" in block
    ]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.png").write_bytes(png())
    with listening("snowy", load(batches=ALONE)) as address:
        for there, here in (("127.0.0.1:8001", address), ('["sepia", "snow"]', '["a", "b"]')):
            assert there in program
            program = program.replace(there, here)
        exec(program, {})
        with pytest.raises(Exception, match=r"^effect 'aa' is not in this collection; did you mean 'a'\?$"):
            exec(program.replace('["a", "b"]', '["aa"]'), {})
    wanted = post(make_service(batches=ALONE), {"effect": "a,b", "seed": "7", "n": "2"}).json()
    for number, seed in enumerate((7, 8)):
        assert np.array_equal(pixels((tmp_path / f"out-{seed}.png").read_bytes()), pixels_of(wanted, number))
    assert len(list(tmp_path.glob("out-*.png"))) == 2


# Refusals


def test_an_unknown_effect_is_told_the_nearest_and_none_is_made(load: Load) -> None:
    server = load()
    near, far = (sender.answer() for sender in server.send(request(effect="aa"), request(effect="zzz")))
    assert refusal(near) == (TritonError.NOT_FOUND, "effect 'aa' is not in this collection; did you mean 'a'?")
    code, message = refusal(far)
    assert code == TritonError.NOT_FOUND and message.endswith(
        "the parameter effects in the model's configuration lists them"
    )
    assert server.model.service.engine.stats()["clora"]["steps"] == 0


@pytest.mark.parametrize(
    ("inputs", "start"),
    [
        ({"effect": "a", "image": png()[:200]}, "image 0"),
        ({"effect": "a", "image": b"no picture"}, "image 0"),
        ({"effect": "a", "image": []}, "image: there is none"),
        ({"effect": "a", "image": [png()] * 5}, "image: 5 were sent, 4 may be"),
        ({"effect": "a", "image": [png(), b"x" * 70_000]}, "a file of 70000 bytes"),
        ({"effect": "a", "prompt": "paint"}, "prompt: an effect has its own"),
        ({}, "prompt: is empty"),
        ({"prompt": "x" * 4001}, "prompt: is longer than 4000 characters"),
        ({"prompt": "x" * 20_000}, "prompt: is longer than 17024 bytes"),
        ({"prompt": b"\xff"}, "prompt: is not UTF-8"),
        ({"prompt": "a\0b"}, "prompt: holds a null character"),
        ({"effect": ["a", "b", "a"]}, "effect: 3 were given"),
        ({"effect": ["a"] * 40}, "40 values were sent, 32 may be"),
        ({"effect": "a", "seed": -1}, "seed: '-1'"),
        ({"effect": "a", "n": 0}, "n: '0'"),
        ({"effect": "a", "n": 5}, "n: '5'"),
        ({"effect": "a", "size": "63x64"}, "size: '63x64'"),
    ],
)
def test_a_bad_request_is_one_sentence_and_harms_no_other(load: Load, inputs: dict[str, Any], start: str) -> None:
    server = load(batches=ALONE, limits={"image_bytes": 65_536})
    good, bad = server.send(request(effect="a", seed=1), request(**inputs))
    code, message = refusal(bad.answer())
    assert code == TritonError.INVALID_ARG and message.startswith(start), message
    [again] = server.send(request(effect="a", seed=1))
    assert outputs(good.answer())["pictures"] == outputs(again.answer())["pictures"]


def test_pictures_together_beyond_the_budget_are_refused(load: Load) -> None:
    server = load(limits={"body_bytes": 2 * len(png()) - 1})
    one, two = server.send(request(effect="a"), request(effect="a", image=[png(), png()]))
    assert outputs(one.answer())["seeds"]
    assert refusal(two.answer())[1].startswith("the body is beyond the")


def test_a_full_queue_refuses_and_takes_again(load: Load) -> None:
    server = load(batches={"denoise": 1, "max_queue": 2} | ALONE)
    first, *others = server.send(*(request(effect="a", n=2, seed=seed) for seed in (0, 2, 4)))
    full = (TritonError.UNAVAILABLE, "2 samples are waiting, no more than 2 may; try again")
    assert [refusal(sender.answer()) for sender in others] == [full, full]
    assert outputs(first.answer())["seeds"] == [0, 1]
    assert outputs(server.send(request(effect="a", n=2, seed=2))[0].answer())["seeds"] == [2, 3]


LONG = {"n": 64, "effect": "a", "seed": 0}  # a second or so, at one sample a step
SLOW = {"limits": {"samples": 64}, "batches": {"denoise": 1, "max_queue": 200}}


def wait_for_steps(server: Server) -> None:
    end = time.monotonic() + 120
    while not any(stats["steps"] for stats in server.model.service.engine.stats().values()):
        assert time.monotonic() < end
        time.sleep(0.002)


def test_a_cancelled_request_leaves_its_batch(load: Load) -> None:
    server = load(**SLOW)
    long, other = server.send(request(**LONG), request(effect="b", seed=1))
    wait_for_steps(server)
    long.cancel()
    assert refusal(long.answer()) == (TritonError.CANCELLED, "the job was cancelled")
    assert outputs(other.answer())["seeds"] == [1]
    stats = server.model.service.engine.stats()["clora"]
    assert stats["cancelled"] > 0 and stats["steps"] < 65 * 4
    assert server.model.service.jobs.running() == []


def test_a_request_has_its_own_end_and_the_settings(load: Load) -> None:
    server = load(**SLOW)
    late, other = server.send(request(timeout=50_000, **LONG), request(effect="b", seed=1))
    assert refusal(late.answer()) == (TritonError.UNAVAILABLE, "it was not done in 0.05 s; try again")
    assert outputs(other.answer())["seeds"] == [1]
    assert server.model.service.engine.stats()["clora"]["done"] < 65


def test_the_settings_end_a_request(load: Load) -> None:
    server = load(**SLOW | {"limits": {"samples": 64, "queue_seconds": 0.05}})
    assert refusal(server.send(request(**LONG))[0].answer()) == (
        TritonError.UNAVAILABLE,
        "it was not done in 0.05 s; try again",
    )


def test_a_failing_engine_tells_nothing_of_itself(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    server = load()

    async def fail(*_: Any) -> Any:
        raise RuntimeError("/secret/place is broken")

    monkeypatch.setattr(server.model.service.engine, "edit", fail)
    [sender] = server.send(request(effect="a"))
    assert refusal(sender.answer()) == (TritonError.UNAVAILABLE, "the engine failed; try again")


def test_a_request_that_cannot_be_read_harms_no_other(load: Load) -> None:
    server = load()
    broken, good = request(effect="a"), request(effect="a", seed=4)
    broken.timeout = lambda: 1 / 0  # type: ignore[method-assign, assignment, return-value]
    one, two = server.send(broken, good)
    assert refusal(one.answer())[0] == TritonError.INTERNAL
    assert outputs(two.answer())["seeds"] == [4]


# The end


def test_finalize_lets_requests_end(load: Load, small_base: tuple[Path, Path], tmp_path: Path) -> None:
    own = {"base": str(small_base[0]), "collection": str(small_base[1]), "dtype": "float32", "batches": ALONE}
    asked = [{"effect": "ab"[number % 2], "seed": number, "n": 4} for number in range(4)]
    server = Server(write_folder(tmp_path / "m", own), config_of({"settings": "settings.yaml"}))
    senders = server.send(*(request(**one) for one in asked))
    server.unload()
    assert all(sender.is_done for sender in senders)
    assert not server.model._thread.is_alive()
    other = load(batches=ALONE)
    for one, sender in zip(asked, senders, strict=True):
        [again] = other.send(request(**one))
        for found, wanted in zip(*(outputs(s.answer())["pictures"] for s in (sender, again)), strict=True):
            assert np.array_equal(pixels(found), pixels(wanted))


def test_finalize_refuses_what_does_not_end_in_time(small_base: tuple[Path, Path], tmp_path: Path) -> None:
    own = {"base": str(small_base[0]), "collection": str(small_base[1]), "grace_seconds": 0.05} | SLOW
    server = Server(write_folder(tmp_path / "m", own), config_of({"settings": "settings.yaml"}))
    senders = server.send(request(**LONG), request(**LONG))
    wait_for_steps(server)
    began = time.monotonic()
    server.unload()
    assert time.monotonic() - began < 60
    for sender in senders:
        assert sender.is_done
        assert refusal(sender.answer(0)) == (TritonError.UNAVAILABLE, "the engine was stopped; try again")


# What is not served


def test_model_refuses_another_version(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "clora", {}, version="0.0.1")
    with pytest.raises(RuntimeError) as refused:
        Server(folder, config_of({"settings": "settings.yaml"}))
    assert str(refused.value) == (
        f"model.py: is of clora 0.0.1, installed is {__version__}; install the former, or export again"
    )


@pytest.mark.parametrize(
    ("parameters", "settings", "says"),
    [
        ({}, {}, "clora: its configuration has neither artefact nor settings"),
        ({"artefact": "../nowhere"}, {}, "is no folder; give the folder that `clora export` wrote"),
        ({"settings": "other.yaml"}, {}, "other.yaml"),
        ({"settings": "settings.yaml"}, {"groups": "groups.json"}, "clora: groups are several models"),
        ({"settings": "settings.yaml"}, {"prot": 1, "hots": 2}, "prot: is no setting"),
    ],
)
def test_initialize_says_what_cannot_be_served(
    tmp_path: Path, parameters: dict[str, str], settings: dict[str, Any], says: str
) -> None:
    folder = write_folder(tmp_path / "clora", settings)
    with pytest.raises(triton_backend.TritonModelException) as refused:
        Server(folder, config_of(parameters))
    assert says in str(refused.value) and "\n" not in str(refused.value)


# The repository


def parsed(text: str) -> dict[str, Any]:
    """A configuration by the schema that Triton's own client brings along, as Triton hands it to a model."""
    pytest.importorskip("tritonclient")
    from google.protobuf import json_format, text_format
    from tritonclient.grpc import model_config_pb2

    config = text_format.Parse(text, model_config_pb2.ModelConfig())
    found: dict[str, Any] = json_format.MessageToDict(config, preserving_proto_field_name=True)
    return found


def test_config_text_is_what_triton_reads() -> None:
    text = config_text("snowy", {"artefact": "../../snowy", "effects": '["a \\"b\\"", "zażółć\\n雪"]'})
    string = {"data_type": "TYPE_STRING"}
    assert parsed(text) == {
        "name": "snowy",
        "backend": "python",
        "version_policy": {"specific": {"versions": ["1"]}},
        "model_transaction_policy": {"decoupled": True},
        "instance_group": [{"count": 1, "kind": "KIND_MODEL"}],
        "input": [
            {"name": "image", "dims": ["-1"], **string},
            {"name": "effect", "dims": ["-1"], "optional": True, **string},
            {"name": "prompt", "dims": ["1"], "optional": True, **string},
            {"name": "seed", "data_type": "TYPE_INT64", "dims": ["1"], "optional": True},
            {"name": "n", "data_type": "TYPE_INT32", "dims": ["1"], "optional": True},
            {"name": "size", "dims": ["1"], "optional": True, **string},
        ],
        "output": [
            {"name": "pictures", "dims": ["-1"], **string},
            {"name": "seeds", "data_type": "TYPE_INT64", "dims": ["-1"]},
            {"name": "made_by", "dims": ["1"], **string},
        ],
        "parameters": {
            "artefact": {"string_value": "../../snowy"},
            "effects": {"string_value": '["a \\"b\\"", "zażółć\\n雪"]'},
        },
    }


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("dims: [ -1 ]", "dim: [ -1 ]"),
        ("TYPE_STRING", "TYPE_BYTES"),
        ("KIND_MODEL", "KIND_ITSELF"),
        ("decoupled: true", "decoupled: yes"),
        ("versions: [ 1 ]", 'versions: [ "1" ]'),
        ("string_value:", "text_value:"),
        ("max_batch_size: 0", "max_batch_size: none"),
    ],
)
def test_a_wrong_configuration_is_none(right: str, wrong: str) -> None:
    pytest.importorskip("tritonclient")
    from google.protobuf.text_format import ParseError

    text = config_text("snowy", {"artefact": "../../snowy"})
    assert parsed(text)["name"] == "snowy" and right in text
    with pytest.raises(ParseError):
        parsed(text.replace(right, wrong))


@pytest.mark.parametrize("name", ["model_repository", "two words", "snowé", ".hidden"])
def test_check_model_refuses_names(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="cannot be a Triton model's name"):
        check_model(tmp_path / name)
    check_model(tmp_path / "snowy-1.0_a")


def test_export_writes_a_model_that_triton_can_load(
    small_base: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, collection = small_base
    output = tmp_path / "first" / "snowy"
    asked = ExportRequest(output, "merged", str(base), collection, num_edits=1, triton=True)
    export(asked)
    assert sorted(p.relative_to(tmp_path / "first").parts[0] for p in (tmp_path / "first").iterdir()) == [
        "model_repository",
        "snowy",
    ]
    folder = tmp_path / "first" / "model_repository" / "snowy"
    assert folder == model_folder(output)
    assert sorted(str(p.relative_to(folder)) for p in folder.rglob("*")) == ["1", "1/model.py", "config.pbtxt"]
    config = parsed((folder / "config.pbtxt").read_text())
    parameters = {key: value["string_value"] for key, value in config["parameters"].items()}
    assert parameters == {"artefact": "../../snowy", "clora_version": __version__, "effects": '["a", "b"]'}
    with pytest.raises(InputError, match="snowy is there already"):
        export(asked)

    # It works wherever both are, also where Python has left files beside model.py.
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    shutil.move(tmp_path / "first", tmp_path / "second")
    folder = tmp_path / "second" / "model_repository" / "snowy"
    for _ in range(2):
        with loaded(folder, config) as server:
            found = outputs(server.send(request(effect="b", seed=3))[0].answer())
    assert list((folder / "1" / "__pycache__").iterdir())
    check_folder(tmp_path / "second" / "snowy")
    wanted = load_editor(str(base), collection, "cpu", torch.float32).edit([picture()], ["b"], seeds=[3])
    assert_near(pixels(found["pictures"][0]), wanted[0])


def test_export_leaves_neither_where_one_cannot_be_written(
    small_base: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(folder: Path, *_: Any) -> None:
        (folder / "config.pbtxt").write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export_job, "write_model", fail)
    base, collection = small_base
    with pytest.raises(WriteError, match="the disk is full"):
        export(ExportRequest(tmp_path / "snowy", "merged", str(base), collection, num_edits=1, triton=True))
    assert [str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")] == ["model_repository"]

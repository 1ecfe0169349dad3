"""An edit over HTTP: the pictures of `clora edit`, whoever shares the batch; what is wrong is said in a sentence."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import httpx
import numpy as np
import pytest
import torch
from PIL import Image

from clora.inference.editor import Editor, load_editor
from clora.serve.service import Service
from tests.serve.conftest import call, encoded, model_of, picture, png, post


@pytest.fixture(scope="module")
def editor(small_base: tuple[Path, Path]) -> Editor:
    """What `clora edit` runs on the same files: the collection as adapters, unmerged."""
    return load_editor(str(small_base[0]), small_base[1], "cpu", torch.float32)


def pixels(answer: httpx.Response | dict[str, Any], number: int = 0) -> Any:
    found = answer if isinstance(answer, dict) else answer.json()
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(found["data"][number]["b64_json"]))), np.int16)


def assert_near(found: Any, image: Image.Image) -> None:
    wanted = np.asarray(image, np.int16)
    assert found.shape == wanted.shape
    assert np.abs(found - wanted).max() <= 1


@pytest.mark.parametrize("effects", [("a",), ("b",), ("a", "b")])
def test_edit_makes_what_clora_edit_makes(service: Service, editor: Editor, effects: tuple[str, ...]) -> None:
    answer = post(service, {"effect": ",".join(effects), "seed": "7"})
    assert answer.status_code == 200
    (wanted,) = editor.edit([picture()], effects, seeds=[7])
    assert_near(pixels(answer), wanted)
    (other,) = editor.edit([picture()], effects, seeds=[8])
    assert np.abs(pixels(answer) - np.asarray(other, np.int16)).max() > 8


def test_edit_takes_a_prompt_references_and_shapes(service: Service, editor: Editor) -> None:
    files = [("image[]", png(1)), ("image[]", png(2, (96, 48)))]
    answer = post(service, {"prompt": "color it", "seed": "1", "n": ""}, files)
    (wanted,) = editor.edit([picture(2, (96, 48))], prompt="color it", references=[picture(1)], seeds=[1])
    assert answer.json()["size"] == f"{wanted.width}x{wanted.height}"
    assert_near(pixels(answer), wanted)


def test_edit_of_four_is_the_four_seeds_alone(make_service: Callable[..., Service]) -> None:
    service = make_service(batches={"decode": 1})
    together = post(service, {"effect": "a", "seed": "3", "n": "4"}).json()
    assert [one["seed"] for one in together["data"]] == [3, 4, 5, 6]
    for number, seed in enumerate(range(3, 7)):
        alone = post(service, {"effect": "a", "seed": str(seed)})
        assert np.array_equal(pixels(together, number), pixels(alone))
    assert not np.array_equal(pixels(together, 0), pixels(together, 1))


@pytest.mark.parametrize(("size", "most"), [(1, 0), (8, 1)])
def test_edits_at_once_are_what_they_are_alone(make_service: Callable[..., Service], size: int, most: int) -> None:
    # The VAE's convolutions round differently in a batch: a level of 8 bits, where its lanes batch.
    service = make_service(batches={"encode": size, "decode": size})
    asked = [
        ({"effect": effect, "seed": str(4 * seed), "n": "4"}, png(seed))
        for seed in (0, 1)
        for effect in ("a", "b", "a,b")
    ]

    async def talk(client: httpx.AsyncClient) -> list[httpx.Response]:
        return await asyncio.gather(
            *(client.post("/v1/images/edits", data=data, files={"image": image}) for data, image in asked)
        )

    together = call(service, talk)
    for (data, image), answer in zip(asked, together, strict=True):
        for number in range(4):
            alone = post(service, data | {"n": "1", "seed": str(int(data["seed"]) + number)}, {"image": image})
            assert np.abs(pixels(answer, number) - pixels(alone)).max() <= most


def test_denoise_shares_steps_between_effects_without_a_trace(service: Service) -> None:
    model = model_of(service)
    effects = model.parts.offer.collection.effects
    conds = [model.encode([picture()], effects[name].prompt).result() for name in "ab"]

    def denoise(number: int) -> Future[torch.Tensor]:
        return model.denoise(conds[number % 2], number, "ab"[number % 2], 60, None)

    alone = [denoise(number).result() for number in range(12)]
    together = [future.result() for future in [denoise(number) for number in range(12)]]
    assert model_of(service).batcher.stats()["effects_max"] == 2
    for one, other in zip(alone, together, strict=True):
        assert torch.equal(one, other)


def test_edit_says_what_made_a_result(service: Service) -> None:
    answer = post(service, {"effect": "a", "seed": "5"})
    found = answer.json()
    image = Image.open(io.BytesIO(base64.b64decode(found["data"][0]["b64_json"])))
    digest = service.offers["clora"].collection.digest
    assert json.loads(image.info["clora"]) == {
        "model": "clora", "collection": f"sha256:{digest}", "sampler": "consistency", "steps": 4, "shift": 3.0,
        "effect": ["a"], "seed": 5,
    }  # fmt: skip
    assert answer.headers["x-clora-seed"] == "5"
    assert unquote(answer.headers["x-clora-effect"]) == "a"
    assert answer.headers["x-clora-collection"] == f"sha256:{digest}"
    assert answer.headers["x-clora-sampler"] == "consistency; steps=4; shift=3"


@pytest.mark.parametrize(("kind", "name"), [("png", "PNG"), ("jpeg", "JPEG"), ("webp", "WEBP")])
def test_edit_writes_the_format_asked_for(service: Service, kind: str, name: str) -> None:
    found = post(service, {"effect": "a", "output_format": kind, "size": "32x64"}).json()
    image = Image.open(io.BytesIO(base64.b64decode(found["data"][0]["b64_json"])))
    assert (image.format, image.size, found["size"], found["output_format"]) == (name, (32, 64), "32x64", kind)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_edit_reads_the_formats_it_says(service: Service, kind: str) -> None:
    assert post(service, {"effect": "a"}, {"image": encoded(picture(), kind)}).status_code == 200


def test_edit_of_an_unknown_effect_names_the_nearest(make_service: Callable[..., Service]) -> None:
    service = make_service()
    answer = post(service, {"effect": "aa"})
    assert answer.status_code == 404
    error = answer.json()["error"]
    assert (error["code"], error["param"], error["nearest"]) == ("effect_not_found", "effect", ["a"])
    assert "did you mean 'a'?" in error["message"]
    assert model_of(service).batcher.stats()["steps"] == 0


@pytest.mark.parametrize(
    ("data", "param"),
    [
        ({"effect": "a", "prompt": "paint it"}, "prompt"),
        ({}, "prompt"),
        ({"prompt": "x" * 4001}, "prompt"),
        ({"effect": "a,b,a"}, "effect"),
        ({"effect": "a,a"}, "effect"),
        ({"effect": "a", "n": "5"}, "n"),
        ({"effect": "a", "n": "0"}, "n"),
        ({"effect": "a", "n": "1e3"}, "n"),
        ({"effect": "a", "n": "٣"}, "n"),
        ({"effect": "a", "seed": "-1"}, "seed"),
        ({"effect": "a", "seed": "9" * 30}, "seed"),
        ({"effect": "a", "steps": "8"}, "steps"),
        ({"effect": "a", "size": "63x64"}, "size"),
        ({"effect": "a", "size": "4096x4096"}, "size"),
        ({"effect": "a", "size": "1024x16"}, "size"),
        ({"effect": "a", "response_format": "url"}, "response_format"),
        ({"effect": "a", "output_format": "gif"}, "output_format"),
        ({"effect": "a", "background": "transparent"}, "background"),
        ({"effect": "a", "user": "x" * 300}, "user"),
        ({"effect": "a", "mask": "x"}, "mask"),
        ({"effect": "a", "sede": "1"}, "sede"),
        ({"effect": "a", "image": "http://127.0.0.1/"}, "image"),
    ],
)
def test_edit_refuses_what_it_cannot_do(service: Service, data: dict[str, str], param: str) -> None:
    answer = post(service, data)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["type"]) == (400, param, "invalid_request_error")
    assert error["message"].count("\n") == 0


def test_edit_takes_the_models_name_alone(service: Service) -> None:
    assert post(service, {"effect": "a", "model": "clora"}).status_code == 200
    assert post(service, {"effect": "a", "model": "gpt-image-1"}).json()["error"]["code"] == "model_not_found"


def test_edit_without_a_seed_draws_one(service: Service) -> None:
    first, second = (post(service, {"effect": "a"}).json()["data"][0]["seed"] for _ in range(2))
    assert first != second

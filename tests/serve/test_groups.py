"""Several collections of one base behind one server: who answers, and that nothing else does."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from clora.errors import InputError
from clora.serve.load import open_model, open_models
from clora.serve.service import Service
from clora.serve.settings import Batches, Settings
from clora.serve.threads import ThreadEngine
from tests.serve.conftest import call, png, post
from tests.serve.test_edits import pixels
from tests.support.random_collection import write_random_collection

PLAIN: dict[str, Any] = {"dtype": "float32", "device": "cpu", "thumbnails": False,
                         "batches": Batches(encode=1, decode=1)}  # fmt: skip


def write_groups(folder: Path, base: Path, effects: dict[str, list[str]]) -> Path:
    groups = [{"config": "", "collection": name, "effects": names} for name, names in effects.items()]
    path = folder / "groups.json"
    path.write_text(json.dumps({"base": str(base), "groups": groups}))
    return path


@pytest.fixture(scope="module")
def grouped(small_base: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """`x-1` has the effects oil and ink, `x-2` has foil and mist."""
    base, folder = small_base[0], tmp_path_factory.mktemp("groups")
    write_random_collection(base, folder / "one.safetensors", effects={"oil": "oil it", "ink": "ink it"}, seed=1)
    write_random_collection(base, folder / "two.safetensors", effects={"foil": "foil it", "mist": "mist"}, seed=2)
    path = write_groups(folder, base, {"one.safetensors": ["oil", "ink"], "two.safetensors": ["foil", "mist"]})
    settings = Settings(groups=path, name="x", **PLAIN)
    service = Service(settings, ThreadEngine(open_models(settings), settings))
    yield service
    service.close()


def refused(service: Service, **data: str) -> dict[str, Any]:
    answer = post(service, data)
    error: dict[str, Any] = answer.json()["error"]
    return error | {"status": answer.status_code}


def test_each_effect_is_answered_by_its_own_collection(grouped: Service) -> None:
    for number, (name, effect) in enumerate((("one", "ink"), ("two", "mist")), 1):
        assert grouped.settings.groups is not None
        file = grouped.settings.groups.parent / f"{name}.safetensors"
        alone = Settings(collection=file, **PLAIN)
        single = Service(alone, ThreadEngine({"clora": open_model(alone)}, alone))
        wanted, found = (post(service, {"effect": effect, "seed": "4"}) for service in (single, grouped))
        single.close()
        assert np.array_equal(pixels(wanted), pixels(found))
        assert found.json()["model"] == f"x-{number}" and found.json()["collection"] == wanted.json()["collection"]
        named = post(grouped, {"effect": effect, "seed": "4", "model": f"x-{number}"})
        assert np.array_equal(pixels(named), pixels(found))


def test_a_prompt_needs_the_model_and_gets_it(grouped: Service) -> None:
    error = refused(grouped, prompt="paint it")
    assert (error["status"], error["param"]) == (400, "model") and "x-1, x-2" in error["message"]
    one, two = (post(grouped, {"prompt": "paint it", "seed": "1", "model": name}) for name in ("x-1", "x-2"))
    assert not np.array_equal(pixels(one), pixels(two))


def test_what_no_single_collection_has_is_refused(grouped: Service) -> None:
    error = refused(grouped, effect="oil,mist")
    assert (error["status"], error["param"]) == (400, "effect") and "different models" in error["message"]
    error = refused(grouped, effect="oil", model="x-2")
    assert (error["status"], error["code"], error["nearest"]) == (404, "effect_not_found", ["foil"])
    error = refused(grouped, effect="foill")
    assert (error["status"], error["nearest"]) == (404, ["foil", "oil"])
    error = refused(grouped, effect="oil", model="x-3")
    assert (error["status"], error["code"], error["nearest"]) == (404, "model_not_found", ["x-2", "x-1"])
    assert refused(grouped, effect="oil", model="clora")["status"] == 404


def test_the_lists_show_every_model(grouped: Service) -> None:
    async def talk(client: httpx.AsyncClient) -> tuple[Any, Any, Any, str]:
        answers = [await client.get(f"/v1/{path}") for path in ("models", "effects", "models/x-2")]
        return *[answer.json() for answer in answers], (await client.get("/metrics")).text

    models, effects, one, metrics = call(grouped, talk)
    assert [model["id"] for model in models["data"]] == ["x-1", "x-2"]
    assert len({model["collection"] for model in models["data"]}) == 2 and one == models["data"][1]
    found = [(effect["id"], effect["model"]) for effect in effects["data"]]
    assert found == [("oil", "x-1"), ("ink", "x-1"), ("foil", "x-2"), ("mist", "x-2")]
    assert 'clora_queue_depth{model="x-1"}' in metrics and 'clora_queue_depth{model="x-2"}' in metrics


def test_both_models_work_at_once_on_the_same_encoders(grouped: Service) -> None:
    assert isinstance(grouped.engine, ThreadEngine)
    first, second = (model.parts.encoders for model in grouped.engine.models.values())
    assert first is second
    asked = [{"effect": effect, "seed": "2", "n": "4"} for effect in ("oil", "foil", "ink", "mist")]

    async def talk(client: httpx.AsyncClient) -> list[httpx.Response]:
        sent = [client.post("/v1/images/edits", data=data, files={"image": png()}) for data in asked]
        return await asyncio.gather(*sent)

    for data, answer in zip(asked, call(grouped, talk), strict=True):
        assert np.array_equal(pixels(answer, 3), pixels(post(grouped, data | {"n": "1", "seed": "5"})))


def test_open_models_refuses_files_that_are_not_what_the_groups_say(
    small_base: tuple[Path, Path], tmp_path: Path
) -> None:
    base, collection = small_base
    path = write_groups(tmp_path, base, {str(collection): ["a", "c"]})
    with pytest.raises(InputError, match=r"lacks c, which .*groups\.json says it has"):
        open_models(Settings(groups=path, **PLAIN))
    with pytest.raises(InputError, match="groups: names the collections"):
        open_models(Settings(groups=path, collection=collection, **PLAIN))

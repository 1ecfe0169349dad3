"""A job's life: progress, cancelling, clients that go, an engine that dies, more than can be done."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import httpx
import numpy as np
import pytest

from clora.inference.batching import StepBatcher
from clora.serve.jobs import Jobs, State
from clora.serve.lanes import Lane
from clora.serve.models import Model, Parts
from clora.serve.problems import Problem
from clora.serve.service import Service
from tests.serve.conftest import call, listening, model_of, png, post
from tests.serve.test_edits import pixels

ASYNC = {"prefer": "respond-async"}


async def start(client: httpx.AsyncClient, **data: str) -> str:
    """Ask for an edit; its job's address."""
    answer = await client.post("/v1/images/edits", data={"effect": "a"} | data, files={"image": png()}, headers=ASYNC)
    assert answer.status_code == 202, answer.text
    place: str = answer.headers["location"]
    return place


def test_a_job_tells_its_progress_and_keeps_its_result(service: Service) -> None:
    async def talk(client: httpx.AsyncClient) -> tuple[list[dict[str, Any]], httpx.Response, httpx.Response]:
        place = await start(client, seed="5", n="2")
        events = await client.get(f"{place}/events")
        assert events.headers["content-type"].startswith("text/event-stream")
        lines = [line.removeprefix("data: ") for line in events.text.splitlines() if line.startswith("data: ")]
        return list(map(json.loads, lines)), await client.get(f"{place}/result"), await client.get(place)

    seen, result, job = call(service, talk)
    assert seen[0]["status"] in ("queued", "running") and seen[-1]["status"] == "succeeded"
    steps = [one["steps"] for one in seen]
    assert steps == sorted(steps) and steps[-1] == seen[-1]["steps_in_all"] == 8
    assert job.json() == seen[-1]
    alone = post(service, {"effect": "a", "seed": "5", "n": "2"})
    assert [one["seed"] for one in result.json()["data"]] == [5, 6]
    assert np.abs(pixels(result) - pixels(alone)).max() <= 1
    assert result.headers["x-clora-seed"] == "5,6"


def test_a_job_waits_behind_those_before_it(make_service: Callable[..., Service]) -> None:
    service = make_service(batches={"denoise": 1, "encode": 1})

    async def talk(client: httpx.AsyncClient) -> tuple[list[int], httpx.Response]:
        places = [await start(client, n="4") for _ in range(3)]
        positions = [(await client.get(place)).json()["position"] for place in places]
        early = await client.get(f"{places[-1]}/result")
        for place in places:
            await client.get(f"{place}/events")
        return positions, early

    positions, early = call(service, talk)
    assert positions[0] <= positions[1] < positions[2] <= 9 and positions[2] >= 5
    assert (early.status_code, early.json()["error"]["code"]) == (409, "not_done")


def test_cancelling_ends_a_job_and_no_other(make_service: Callable[..., Service]) -> None:
    service = make_service(batches={"encode": 1, "decode": 1})

    async def talk(client: httpx.AsyncClient) -> tuple[Any, Any, Any, Any]:
        keep = [await start(client, seed=str(seed), n="4") for seed in (0, 8)]
        drop = await start(client, seed="4", n="4", effect="b")
        while (await client.get(drop)).json()["steps"] == 0:
            await asyncio.sleep(0.001)
        cancelled = await client.delete(drop)
        again, result = await client.delete(drop), await client.get(f"{drop}/result")
        kept = []
        for place in keep:
            await client.get(f"{place}/events")
            kept.append(await client.get(f"{place}/result"))
        return cancelled, again, result, kept

    cancelled, again, result, kept = call(service, talk)
    assert cancelled.json()["status"] == again.json()["status"] == "cancelled"
    assert cancelled.json()["steps"] < 16
    assert (result.status_code, result.json()["error"]["code"]) == (409, "cancelled")
    for answer, seed in zip(kept, (0, 8), strict=True):
        for number in range(4):
            alone = post(service, {"effect": "a", "seed": str(seed + number)})
            assert np.array_equal(pixels(answer, number), pixels(alone))
    stats = model_of(service).batcher.stats()
    assert stats["cancelled"] >= 1 and stats["queued"] == stats["running"] == 0


def test_clients_that_go_free_their_places(make_service: Callable[..., Service]) -> None:
    service = make_service(batches={"denoise": 2})

    async def leave(client: httpx.AsyncClient, number: int) -> None:
        asked = client.post("/v1/images/edits", data={"effect": "b", "n": "4"}, files={"image": png()})
        task = asyncio.create_task(asked)
        await asyncio.sleep(0.01 + number % 5 * 0.03)
        task.cancel()

    async def run(address: str) -> tuple[httpx.Response, float]:
        async with httpx.AsyncClient(base_url=address, timeout=60) as client:
            await asyncio.gather(*(leave(client, number) for number in range(10)))
            await asyncio.gather(*(leave(client, number) for number in range(10)))
            began = time.monotonic()
            while service.jobs.running():
                await asyncio.sleep(0.005)
            freed = time.monotonic() - began
            answer = await client.post("/v1/images/edits", data={"effect": "a", "seed": "1"}, files={"image": png()})
        return answer, freed

    with listening(service) as address:
        answer, freed = asyncio.run(run(address))
    assert answer.status_code == 200
    stats = model_of(service).batcher.stats()
    assert stats["queued"] == stats["running"] == 0
    assert stats["done"] < 40  # of the 80 samples that were asked for and left
    assert service.jobs.samples_in_flight() == 0 and service.quotas.running == 0


def test_three_times_too_much_is_refused_and_nothing_is_lost(make_service: Callable[..., Service]) -> None:
    service = make_service(
        batches={"denoise": 2, "max_queue": 6},
        limits={"concurrent": 12, "burst": 10_000, "requests_per_minute": 100_000},
    )

    async def run(address: str) -> list[httpx.Response]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=address, timeout=60, limits=limits) as client:

            async def one(number: int) -> httpx.Response:
                await asyncio.sleep(number * 0.012)
                data = {"effect": "ab"[number % 2], "seed": str(number)}
                return await client.post("/v1/images/edits", data=data, files={"image": png()})

            return await asyncio.gather(*map(one, range(120)))

    with listening(service) as address:
        answers = asyncio.run(run(address))
    statuses = [answer.status_code for answer in answers]
    assert len(statuses) == 120 and set(statuses) <= {200, 429, 503}
    assert statuses.count(200) >= 8 and statuses.count(429) + statuses.count(503) > 20
    for answer in answers:
        if answer.status_code != 200:
            assert int(answer.headers["retry-after"]) >= 1
    assert service.jobs.samples_in_flight() == 0


def test_a_dead_engine_is_told_and_started_anew(make_service: Callable[..., Service], parts: Parts) -> None:
    service = make_service()
    model_of(service).decoder.close()

    async def ready(client: httpx.AsyncClient) -> int:
        return (await client.get("/readyz")).status_code

    assert call(service, ready) == 503
    answer = post(service, {"effect": "a"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_down")
    assert service.revive() and call(service, ready) == 200
    assert post(service, {"effect": "a"}).status_code == 200
    assert b"clora_restarts_total 1.0" in service.metrics.text()


class Failing:
    """A batcher whose engine fails whatever it is asked."""

    def __init__(self, batcher: StepBatcher) -> None:
        self._batcher = batcher
        self.close, self.stats, self.cancel = batcher.close, batcher.stats, batcher.cancel

    def submit(self, *given: Any, **more: Any) -> Any:
        def fail(*_: int) -> None:
            raise RuntimeError("device-side assert at /root/secret")

        return self._batcher.submit(*given, **(more | {"on_step": fail}))


def test_an_engine_that_fails_again_and_again_is_started_anew(
    make_service: Callable[..., Service], parts: Parts
) -> None:
    healthy = iter([False, True])
    opened = replace(parts, start=lambda: parts.start() if next(healthy) else Failing(parts.start()))
    service = make_service(opened=opened)
    for _ in range(3):
        answer = post(service, {"effect": "a"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_failed")
        assert "secret" not in answer.text
    assert not service.is_ready
    assert service.revive()
    assert post(service, {"effect": "a"}).status_code == 200


def failing_once(parts: Parts, least: int) -> Parts:
    """The model, whose first forward of so many samples fails."""
    failed: list[int] = []

    def start() -> StepBatcher:
        batcher = parts.start()
        served = batcher._served
        batcher.close(False)

        def engine(*given: Any) -> Any:
            if len(given[0]) >= least and not failed:
                failed.append(1)
                raise RuntimeError("one bad step")
            return served.engine(*given)

        return StepBatcher(replace(served, engine=engine), max_batch=8, max_queue=64)

    return replace(parts, start=start)


def test_a_step_that_fails_counts_once_whatever_is_in_it(make_service: Callable[..., Service], parts: Parts) -> None:
    service = make_service(opened=failing_once(parts, 3))
    assert post(service, {"effect": "a", "n": "4"}).json()["error"]["code"] == "engine_failed"
    assert service.is_ready and not service.revive()
    assert post(service, {"effect": "a", "n": "4"}).status_code == 200


@pytest.mark.parametrize("lane", ["encoder", "decoder"])
def test_a_lane_that_hangs_is_noticed(parts: Parts, settings: Any, lane: str) -> None:
    model = Model(parts, settings.batches, 0.2, lambda *_: None)
    held = threading.Event()
    hung: Lane[int, None] = Lane(lane, lambda items: [None for _ in items if held.wait(10)], lambda item: 0, 4)
    getattr(model, lane).close()
    setattr(model, lane, hung)
    try:
        assert model.is_alive
        waiting = hung.submit(1)
        time.sleep(0.4)
        assert not model.is_alive
        held.set()
        waiting.result(10)
        deadline = time.monotonic() + 10
        while not model.is_alive and time.monotonic() < deadline:
            time.sleep(0.01)
        assert model.is_alive  # it was slow, and idles now
    finally:
        held.set()
        model.close()


def test_a_stalled_engine_is_noticed(parts: Parts, settings: Any) -> None:
    class Hanging:
        def stats(self) -> dict[str, float]:
            return {"queued": 1, "running": 0, "steps": 3}

        def close(self, drain: bool = True, timeout: float | None = None) -> None:
            pass

    model = Model(replace(parts, start=Hanging), settings.batches, 0.05, lambda *_: None)  # type: ignore[arg-type]
    assert model.is_alive
    time.sleep(0.1)
    assert not model.is_alive
    model.close()


def test_an_edit_beyond_its_time_is_given_up(make_service: Callable[..., Service]) -> None:
    service = make_service(limits={"queue_seconds": 0.01})
    answer = post(service, {"effect": "a", "n": "4"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "deadline_exceeded")
    assert service.jobs.samples_in_flight() == 0


def test_a_draining_server_takes_no_edits(service: Service) -> None:
    service.is_draining = True
    answer = post(service, {"effect": "a"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "draining")


def test_results_are_forgotten_after_a_while(make_service: Callable[..., Service]) -> None:
    service = make_service(limits={"results_kept": 2})

    async def talk(client: httpx.AsyncClient) -> list[int]:
        places = [await start(client) for _ in range(4)]
        for place in places:
            await client.get(f"{place}/events")
        await client.get("/v1/jobs/none")
        return [(await client.get(place)).status_code for place in places]

    assert call(service, talk) == [404, 404, 200, 200]


def test_metrics_count_what_happened(service: Service) -> None:
    post(service, {"effect": "a,b", "n": "2"})
    post(service, {"effect": "c"})

    async def talk(client: httpx.AsyncClient) -> str:
        return (await client.get("/metrics")).text

    text = call(service, talk)
    for line in (
        'clora_http_requests_total{method="POST",route="/v1/images/edits",status="200"} 1.0',
        'clora_rejects_total{reason="effect_not_found"} 1.0',
        'clora_effect_samples_total{effect="a"} 2.0',
        'clora_samples_total{model="clora",outcome="done"} 2.0',
        "clora_ready 1.0",
    ):
        assert line in text
    for phase in ("read_picture", "encode", "denoise", "decode", "write_picture", "edit"):
        assert f'clora_phase_seconds_count{{phase="{phase}"}} 1.0' in text


def finished(jobs: Jobs, owner: str, state: State) -> str:
    """The name of a new job that is over."""
    job = jobs.add(owner, 1, 4)
    job.change(state)
    return job.id


def test_jobs_of_one_key_do_not_push_out_anothers() -> None:
    jobs = Jobs(600, 4)
    alice = [finished(jobs, "alice", "succeeded")]
    bob = [finished(jobs, "bob", state) for state in ("succeeded", "cancelled", "succeeded", "failed", "succeeded")]

    def kept(owner: str, names: list[str]) -> list[bool]:
        def there(name: str) -> bool:
            try:
                return jobs.find(owner, name).id == name
            except Problem:
                return False

        return [there(name) for name in names]

    assert kept("bob", bob) == [True, False, True, False, True] and kept("alice", alice) == [True]
    bob += [finished(jobs, "bob", "succeeded") for _ in range(2)]
    assert kept("bob", bob) == [False, False, False, False, True, True, True] and kept("alice", alice) == [True]


@pytest.mark.parametrize(
    ("given", "status"),
    [("respond-async", 202), ("Respond-Async; foo=1, wait=10", 202), ("wait=10,respond-async", 202), ("wait=10", 200),
     ("x=respond-async", 200), ("", 200)],
)  # fmt: skip
def test_a_job_is_made_where_it_is_among_the_preferences(service: Service, given: str, status: int) -> None:
    assert post(service, {"effect": "a"}, prefer=given).status_code == status


@pytest.mark.parametrize("path", ["/v1/effects", "/v1/models", "/openapi.json"])
def test_the_catalogue_is_told(service: Service, path: str) -> None:
    async def talk(client: httpx.AsyncClient) -> Any:
        return (await client.get(path)).json()

    found = call(service, talk)
    if path == "/v1/effects":
        assert [one["id"] for one in found["data"]] == ["a", "b"]
    elif path == "/v1/models":
        assert found["data"][0]["collection"] == f"sha256:{service.offers['clora'].collection.digest}"
    else:
        assert found["paths"]["/v1/images/edits"]["post"]["requestBody"]["content"]["multipart/form-data"]["example"]

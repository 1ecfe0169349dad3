"""The step-level batcher over engines in Python: each request is what it is alone, and every request is answered."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from clora import _C
from clora.backbones.cond import Cond, Grid, make_cond
from clora.inference.batching import Conditions, Expired, QueueFull, Served, StepBatcher
from clora.method.flow import few_step_sigmas
from clora.method.samplers import few_step_sample, ode_sample

SIGMAS = few_step_sigmas(4)


def closed_form(
    x: Tensor, refs: Tensor, text: Tensor, cos: Tensor, sin: Tensor, step: Tensor, length: Tensor
) -> Tensor:
    """A velocity that depends on every input, sample by sample."""
    counts = torch.arange(text.shape[1]) < length[:, None]
    told = (text * counts[..., None]).sum(dim=(1, 2))
    shift = 0.3 * told + refs.mean(dim=(1, 2)) + 0.1 * step + cos.sum() - sin.sum()
    return torch.tanh(x) * 0.7 + shift[:, None, None].to(x.dtype)


def make_request(seed: int, grid: Grid = (2, 3), length: int = 5) -> Cond:
    rng = torch.Generator().manual_seed(seed)
    refs = [(torch.randn(1, 4, 8, generator=rng), (2, 2)), (torch.randn(1, 2, 8, generator=rng), (1, 2))]
    return make_cond([torch.randn(length, 3, generator=rng)], refs, grid)


def conditions(cond: Cond) -> Conditions:
    """Padded to 8 tokens of text; positions that differ with the grids."""
    text, refs = (
        torch.nn.functional.pad(cond.text_BLD[0], (0, 0, 0, 8 - cond.text_BLD.shape[1])),
        torch.cat(cond.refs, 1)[0],
    )
    joint = cond.grid[0] * cond.grid[1] + len(refs) + len(text)
    angle = torch.arange(joint * 2).reshape(joint, 2) / (100.0 * cond.grid[0])
    return Conditions(refs, text, angle.cos(), angle.sin(), cond.text_BLD.shape[1])


def served(engine: Callable[..., Tensor] = closed_form, sampler: Any = "consistency", most: int = 32) -> Served:
    return Served(engine, conditions, SIGMAS, sampler, torch.float32, most)


@contextmanager
def batcher(
    engine: Callable[..., Tensor] = closed_form, sampler: Any = "consistency", **options: int
) -> Iterator[StepBatcher]:
    made = StepBatcher(served(engine, sampler), **options)
    yield made
    made.close(drain=False)


def alone(cond: Cond, seed: int, sampler: str = "consistency") -> Tensor:
    """The same by the loop of `method.samplers`, in a batch of one."""
    given = conditions(cond)

    def velocity(x: Tensor, sigma_B: Tensor, _: Any) -> Tensor:
        step = (SIGMAS == sigma_B[:, None]).int().argmax(dim=1)
        return closed_form(
            x, given.refs[None], given.text[None], given.cos, given.sin, step, torch.tensor([given.text_len])
        )

    run = few_step_sample if sampler == "consistency" else ode_sample
    return run(velocity, cond, (cond.grid[0] * cond.grid[1], 8), SIGMAS, [seed], grid=cond.grid)[0]


class Gate:
    """An engine that waits until it is let go on, and keeps what it was called with."""

    def __init__(self) -> None:
        self.steps: list[list[int]] = []
        self.tokens: list[int] = []
        self.reached, self.go = threading.Event(), threading.Event()

    def __call__(self, *inputs: Tensor) -> Tensor:
        self.steps.append(inputs[5].tolist())
        self.tokens.append(inputs[0].shape[1])
        self.reached.set()
        assert self.go.wait(30)
        return closed_form(*inputs)


@pytest.mark.parametrize("sampler", ["consistency", "euler"])
def test_submit_gives_what_the_sampler_gives_bit_for_bit(sampler: str) -> None:
    with batcher(sampler=sampler, max_batch=4) as made:
        given = [(make_request(i, (2, 3) if i % 3 else (4, 2), 3 + i % 5), 100 + i) for i in range(24)]
        futures = [made.submit(cond, seed=seed, effect=f"e{seed % 7}") for cond, seed in given]
        for (cond, seed), future in zip(given, futures, strict=True):
            x0 = future.result(30)
            assert x0.dtype == torch.float32 and torch.equal(x0, alone(cond, seed, sampler))
        stats = made.stats()
    assert stats["done"] == 24 and stats["queued"] == stats["running"] == 0
    assert 24 <= stats["steps"] < 96 and 1 < stats["batch_mean"] <= 4
    assert stats["batch_fill"] == stats["batch_mean"] / 4


def test_a_request_joins_the_others_at_the_next_step() -> None:
    gate = Gate()
    with batcher(gate) as made:
        first = made.submit(make_request(0), seed=0, effect="a")
        assert gate.reached.wait(30)
        second = made.submit(make_request(1), seed=1, effect="b")
        gate.go.set()
        assert torch.equal(first.result(30), alone(make_request(0), 0))
        assert torch.equal(second.result(30), alone(make_request(1), 1))
        stats = made.stats()
    assert gate.steps == [[0], [1, 0], [2, 1], [3, 2], [3]]
    assert stats["effects_max"] == 2 and stats["effects_last"] == 1 and stats["effects_mean"] == 1.6


def test_later_requests_of_another_shape_delay_none() -> None:
    gate = Gate()
    with batcher(gate, max_batch=2) as made:
        small, large = (2, 3), (4, 2)
        futures = [made.submit(make_request(i, small if i != 1 else large), seed=i) for i in range(8)]
        gate.go.set()
        for future in futures:
            future.result(30)
    # The oldest is served until it is done, with whom it may share; then the one of the other shape.
    assert gate.tokens[:8] == [6] * 4 + [8] * 4
    assert gate.tokens[8:] == [6] * len(gate.tokens[8:])


def test_submit_refuses_what_is_beyond_the_queue() -> None:
    gate = Gate()
    with batcher(gate, max_queue=2) as made:
        futures = [made.submit(make_request(0), seed=0)]
        assert gate.reached.wait(30)
        futures += [made.submit(make_request(i), seed=i) for i in (1, 2)]
        with pytest.raises(QueueFull, match=r"as many requests wait as may \(2\); try again later"):
            made.submit(make_request(3), seed=3)
        assert made.stats() | {"queued": 2, "running": 1, "rejected": 1} == made.stats()
        gate.go.set()
        assert all(torch.equal(f.result(30), alone(make_request(i), i)) for i, f in enumerate(futures))
    with pytest.raises(ValueError, match="submit one at a time"):
        made.submit(make_cond([torch.zeros(2, 3)] * 2, [(torch.zeros(2, 1, 8), (1, 1))], (1, 1)), seed=0)
    with pytest.raises(RuntimeError, match="the batcher is closed"):
        made.submit(make_request(0), seed=0)


@pytest.mark.parametrize("by_future", [True, False])
def test_cancel_takes_a_request_out_at_the_next_step(by_future: bool) -> None:
    gate = Gate()
    with batcher(gate) as made:
        futures = [made.submit(make_request(i), seed=i) for i in range(2)]
        assert gate.reached.wait(30)
        assert futures[1].cancel() if by_future else made.cancel(futures[1])
        gate.go.set()
        assert torch.equal(futures[0].result(30), alone(make_request(0), 0))
        with pytest.raises(CancelledError):
            futures[1].result(30)
        assert not made.cancel(futures[0])
        assert made.stats() | {"cancelled": 1, "done": 1} == made.stats()
    assert len(gate.steps) <= 5 and all(len(step) == 1 for step in gate.steps[1:])


def test_timeout_answers_expired_and_samples_no_further() -> None:
    gate = Gate()
    with batcher(gate) as made:
        late = made.submit(make_request(0), seed=0, timeout=0.05)
        never = made.submit(make_request(1), seed=1, timeout=0.0)
        good = made.submit(make_request(2), seed=2, timeout=1e30)
        assert gate.reached.wait(30)
        time.sleep(0.1)
        gate.go.set()
        with pytest.raises(Expired, match="its time ran out after 1 of 4 steps"):
            late.result(30)
        with pytest.raises(Expired, match="after 0 of 4 steps"):
            never.result(30)
        assert torch.equal(good.result(30), alone(make_request(2), 2))
        assert made.stats()["expired"] == 2


def test_a_velocity_that_is_not_finite_fails_its_request_alone() -> None:
    def broken(x: Tensor, *rest: Tensor) -> Tensor:
        v = closed_form(x, *rest)
        v[(rest[-1] == 7) & (rest[-2] == 2), 0, 3] = float("nan")  # the request with a text of 7 tokens, at step 2
        return v

    with batcher(broken) as made:
        futures = [made.submit(make_request(i, length=5 + i), seed=i) for i in range(4)]
        with pytest.raises(FloatingPointError, match=r"velocity is not finite at step 2 \(sigma 0.75"):
            futures[2].result(30)
        for i in (0, 1, 3):
            assert torch.equal(futures[i].result(30), alone(make_request(i, length=5 + i), i))


def test_an_engine_that_fails_fails_its_batch_and_the_batcher_goes_on() -> None:
    calls = []

    def failing(*inputs: Tensor) -> Any:
        calls.append(1)
        if len(calls) == 1:
            raise KeyError("no such weight")
        return closed_form(*inputs)[:, :-1] if len(calls) == 2 else "text" if len(calls) == 3 else closed_form(*inputs)

    with batcher(failing) as made:
        for message in ("KeyError: 'no such weight'", r"shape \[1, 5, 8\] for x of shape \[1, 6, 8\]", "got str"):
            with pytest.raises(RuntimeError, match=message):
                made.submit(make_request(0), seed=0).result(30)
        assert torch.equal(made.submit(make_request(0), seed=0).result(30), alone(make_request(0), 0))
        assert made.stats()["failed"] == 3


def test_on_step_tells_every_step_and_fails_its_request_alone() -> None:
    told: list[tuple[int, int]] = []

    def fail(step: int, num_steps: int) -> None:
        if step == 2:
            raise OSError("the client is gone")

    with batcher() as made:
        good = made.submit(make_request(0), seed=0, on_step=lambda *step: told.append(step))
        bad = made.submit(make_request(1), seed=1, on_step=fail)
        assert torch.equal(good.result(30), alone(make_request(0), 0))
        with pytest.raises(RuntimeError, match="on_step raised OSError: the client is gone"):
            bad.result(30)
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_close_drains_or_cancels() -> None:
    made = StepBatcher(served(lambda *inputs: time.sleep(0.01) or closed_form(*inputs)), max_batch=1)
    futures = [made.submit(make_request(i), seed=i) for i in range(3)]
    made.close()
    assert [torch.equal(f.result(0), alone(make_request(i), i)) for i, f in enumerate(futures)] == [True] * 3
    made.close()

    made = StepBatcher(served(lambda *inputs: time.sleep(0.02) or closed_form(*inputs)), max_batch=1)
    futures = [made.submit(make_request(i), seed=i) for i in range(20)]
    made.close(drain=True, timeout=0.1)
    answers = [future.cancelled() for future in futures]
    assert all(future.done() for future in futures) and any(answers) and answers == sorted(answers)


def test_a_batcher_that_nobody_holds_cancels_its_requests() -> None:
    gate = Gate()
    made = StepBatcher(served(gate))
    futures = [made.submit(make_request(i), seed=i) for i in range(3)]
    assert gate.reached.wait(30)
    threading.Timer(0.05, gate.go.set).start()
    del made
    gc.collect()
    assert all(future.cancelled() for future in futures)


def test_a_callback_may_drop_the_last_reference_on_the_batchers_own_thread() -> None:
    held = [StepBatcher(served())]
    ended = threading.Event()

    def drop(_: Future[Tensor]) -> None:
        held.clear()
        ended.set()

    held[0].submit(make_request(0), seed=0).add_done_callback(drop)
    assert ended.wait(30)


def test_submit_from_many_threads_loses_none() -> None:
    counts = {"done": 0, "cancelled": 0, "expired": 0}
    lock = threading.Lock()

    def client(number: int, made: StepBatcher) -> None:
        rng = torch.Generator().manual_seed(number)
        for turn in range(12):
            cond, seed = make_request(turn % 3, (2, 3) if turn % 2 else (4, 2)), 12 * number + turn
            dice = int(torch.randint(0, 6, (), generator=rng))
            while True:
                try:
                    future = made.submit(cond, seed=seed, timeout=0.0005 if dice == 0 else None)
                    break
                except QueueFull:
                    time.sleep(0.001)
            if dice == 1:
                future.cancel()
            try:
                assert torch.equal(future.result(60), alone(cond, seed))
                what = "done"
            except CancelledError:
                what = "cancelled"
            except Expired:
                what = "expired"
            with lock:
                counts[what] += 1

    with batcher(max_batch=4, max_queue=4) as made:
        threads = [threading.Thread(target=client, args=(number, made)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        made.close()
        stats = made.stats()
    assert sum(counts.values()) == 96 == stats["done"] + stats["cancelled"] + stats["expired"]
    assert stats["done"] >= counts["done"] > 40


@pytest.mark.parametrize("bad", [{"max_batch": 0}, {"max_queue": 0}])
def test_step_batcher_refuses_limits_of_none(bad: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="max_batch and max_queue must be positive"):
        StepBatcher(served(), **bad)


def test_native_submit_refuses_shapes_that_do_not_fit() -> None:
    native = _C.Batcher(closed_form, SIGMAS, "consistency", torch.float32, 2, 2)
    x, refs, text, angle = torch.zeros(6, 8), torch.zeros(4, 8), torch.zeros(3, 3), torch.zeros(13, 2)
    generator = torch.Generator()

    def submit(**changed: Any) -> None:
        given = {"noise_TC": x, "refs_RC": refs, "text_MD": text, "cos": angle, "sin": angle, "text_len": 2} | changed
        native.submit(0, **given, generator=generator, effect="", timeout=None, on_step=None, on_done=lambda *_: None)

    for changed, message in (
        ({"noise_TC": x.double()}, "noise must be float32"),
        ({"refs_RC": refs[:, :4]}, "refs have 4 channels, noise has 8"),
        ({"cos": angle[1:]}, "are not the positions of 13 tokens"),
        ({"text_len": 4}, "text_len is 4 of 3 tokens"),
        ({"text_MD": text[0]}, "must be matrices on the CPU"),
    ):
        with pytest.raises(ValueError, match=message):
            submit(**changed)
    with pytest.raises(ValueError, match="choose consistency or euler"):
        _C.Batcher(closed_form, SIGMAS, "heun", torch.float32, 2, 2)
    native.close(True, None)

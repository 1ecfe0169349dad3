"""The training loop on a toy: exact continuation, signals, non-finite guards, averages, schedules."""

from __future__ import annotations

import math
import os
import signal
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import clora.training.checkpoint as checkpoint
from clora.errors import InputError, Interrupted, NonFiniteError
from clora.method.routing import step_generator
from clora.training.flat_parameters import FlatParameters
from clora.training.loop import run_loop
from clora.training.optimizer import AdamW, apply_gradients
from clora.training.saver import LoopConfig
from clora.training.tracker import read_log


def make_optimizer(**options: float) -> AdamW:
    flat = FlatParameters({"w": nn.Parameter(torch.linspace(-1, 1, 5))})
    return AdamW(flat, learning_rate=0.05, **options)  # type: ignore[arg-type]


def set_gradient(optimizer: AdamW, grad: Tensor) -> None:
    (optimizer.parameters["w"] * grad).sum().backward()


def config(folder: Path, steps: int, resume: str | None = None, **options: object) -> LoopConfig:
    return LoopConfig("toy", steps, folder, 3, "fingerprint", **{"log_every": 1, "resume": resume} | options)  # type: ignore[arg-type]


def run(folder: Path, steps: int, resume: str | None = None, stop_at: int | None = None, **options: object) -> AdamW:
    optimizer = make_optimizer(ema_decay=0.9)

    def one_step(step: int) -> dict[str, Tensor]:
        if step == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        noise = torch.randn(5, generator=step_generator(0, step, "toy", "cpu"))
        loss = (optimizer.parameters["w"] - noise).square().sum()
        loss.backward()
        apply_gradients(optimizer, 1.0, f"step {step}")
        return {"loss": loss.detach()}

    run_loop(config(folder, steps, resume, **options), {"g": optimizer}, one_step)
    return optimizer


def test_run_loop_resumes_bitwise_equal(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", 10)
    with pytest.raises(Interrupted) as stopped:
        run(tmp_path / "split", 10, stop_at=4)
    assert stopped.value.code == 128 + signal.SIGTERM
    resumed = run(tmp_path / "split", 10, resume="latest")
    assert torch.equal(whole.parameters["w"], resumed.parameters["w"])
    states = whole.snapshot(), resumed.snapshot()
    assert set(states[0]) == {"param", "ema", "exp_avg", "exp_avg_sq"}
    assert all(torch.equal(states[0][kind], states[1][kind]) for kind in states[0])
    losses = [[row["loss"] for row in read_log(tmp_path / name)] for name in ("whole", "split")]
    assert losses[0] == losses[1] and len(losses[0]) == 10


def test_run_loop_that_starts_anew_is_not_resumed_from_the_run_before(tmp_path: Path) -> None:
    """A run of 12 steps, then one of 20 that is stopped after 5: `latest` is of the second, not step 12. Until the
    second is done the first one's are there under another name."""

    def broken(step: int) -> dict[str, Tensor]:
        raise ZeroDivisionError

    run(tmp_path, 12)
    with pytest.raises(ZeroDivisionError):
        run_loop(config(tmp_path, 20), {"g": make_optimizer()}, broken)
    aside = {f"replaced-checkpoint-{step:08d}" for step in (9, 12)}
    assert {path.name for path in tmp_path.glob("*checkpoint-*")} == aside
    assert checkpoint.open_latest(tmp_path) == (None, [])
    with pytest.raises(Interrupted):
        run(tmp_path, 20, stop_at=4)
    found, _ = checkpoint.open_latest(tmp_path)
    assert found is not None and found.step == 5
    assert {path.name for path in tmp_path.glob("replaced-*")} == aside
    old = run(tmp_path / "other", 12, resume=str(tmp_path / "replaced-checkpoint-00000012"))
    assert torch.equal(old.parameters["w"], run(tmp_path / "old", 12).parameters["w"])
    resumed = run(tmp_path, 20, resume="latest")
    assert not list(tmp_path.glob("replaced-*"))
    assert torch.equal(resumed.parameters["w"], run(tmp_path / "whole", 20).parameters["w"])


def test_run_loop_refuses_another_configuration(tmp_path: Path) -> None:
    run(tmp_path, 3)
    other = LoopConfig("toy", 5, tmp_path, 3, "another", resume="latest")
    with pytest.raises(InputError, match="another configuration"):
        run_loop(other, {"g": make_optimizer(ema_decay=0.9)}, lambda step: {})


def test_run_loop_goes_on_when_a_checkpoint_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    whole = run(tmp_path / "whole", 10)
    write, calls = checkpoint.write_tensors, []

    def full_once(path: Path, *more: object) -> str:
        calls.append(path)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        return write(path, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(checkpoint, "write_tensors", full_once)
    kept = run(tmp_path / "kept", 10)
    assert torch.equal(whole.parameters["w"], kept.parameters["w"])
    said = " ".join(capfd.readouterr().err.split())
    assert "checkpoint of step 6 could not be written" in said and "No space left on device; the newest is" in said
    assert [row.get("failed_checkpoints", 0) for row in read_log(tmp_path / "kept")] == [0] * 9 + [1]
    assert len(calls) == 4  # steps 3, 6, 9 and the last


def test_run_loop_fails_when_no_checkpoint_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_tensors", full)
    with pytest.raises(OSError, match="no checkpoint could be written, that of step 10 neither: .*No space left"):
        run(tmp_path, 10)
    with pytest.raises(OSError, match="stopped by SIGTERM; step 3 could not be saved"):
        run(tmp_path, 10, stop_at=2)


def test_run_loop_keeps_the_figures_of_an_unfinished_log_line(tmp_path: Path) -> None:
    """Three steps to a line, a checkpoint every three, interrupted after the second step of a line."""
    toy = {"log_every": 3}
    run(tmp_path / "whole", 9, **toy)
    with pytest.raises(Interrupted):
        run(tmp_path / "split", 9, stop_at=4, **toy)
    run(tmp_path / "split", 9, resume="latest", **toy)
    losses = [[row["loss"] for row in read_log(tmp_path / name)] for name in ("whole", "split")]
    assert losses[0] == losses[1] and len(losses[0]) == 3


def test_run_loop_logs_short_stages_at_every_step_and_the_end_of_each(tmp_path: Path) -> None:
    """Stages of 65, 8 and 60 steps, a line every ten: the short one has eight points, none is of two stages."""
    run(tmp_path, 133, log_every=10, stages=(0, 65, 73))
    steps = [row["step"] for row in read_log(tmp_path)]
    assert steps == [10, 20, 30, 40, 50, 60, 65, *range(66, 74), 80, 90, 100, 110, 120, 130, 133]
    run(tmp_path / "plain", 33, log_every=10)
    assert [row["step"] for row in read_log(tmp_path / "plain")] == [10, 20, 30, 33]
    run(tmp_path / "short", 33, log_every=10, stages=(0, 33))
    assert [row["step"] for row in read_log(tmp_path / "short")] == list(range(1, 34))


def test_run_loop_mends_a_log_line_that_was_cut_off(tmp_path: Path) -> None:
    run(tmp_path, 4)
    log = tmp_path / "log.jsonl"
    log.write_text(log.read_text() + '{"step": 5, "lo')
    run(tmp_path, 10, resume="latest")
    assert [row["step"] for row in read_log(tmp_path)] == list(range(1, 11))


def test_run_loop_stops_after_max_seconds(tmp_path: Path) -> None:
    assert run_loop(config(tmp_path, 1000, max_seconds=1e-9), {"g": make_optimizer()}, lambda step: {}) == 1


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_apply_gradients_leaves_everything_when_not_finite(bad: float) -> None:
    optimizer = make_optimizer()
    before = optimizer.parameters["w"].detach().clone()
    set_gradient(optimizer, torch.tensor([1.0, bad, 0.0, 0.0, 0.0]))
    with pytest.raises(NonFiniteError, match="step 3"):
        apply_gradients(optimizer, 1.0, "step 3 (student)")
    assert torch.equal(optimizer.parameters["w"], before)
    state = optimizer.snapshot()
    assert not state["exp_avg"].any() and not state["exp_avg_sq"].any()
    assert optimizer.updates == 0 and optimizer.steps == {"w": 0} and optimizer.flat.gradient("w") is None


def test_apply_gradients_clips_each_slot_by_its_own_norm() -> None:
    def update(grads: Tensor, per_slot: bool) -> Tensor:
        flat = FlatParameters({"w": nn.Parameter(torch.zeros(2, 3))})
        optimizer = AdamW(flat, 1.0, max_grad_norm=1.0, per_slot=per_slot)
        set_gradient(optimizer, grads)
        recorded: list[Tensor] = []
        optimizer.update = lambda learning_rate: recorded.append(optimizer.flat.gradient("w").clone())  # type: ignore
        apply_gradients(optimizer, 1.0, "here")
        return recorded[0]

    grads = torch.tensor([[300.0, 0.0, 400.0], [0.0, 0.5, 0.0]])
    clipped = update(grads, per_slot=True)
    torch.testing.assert_close(clipped, torch.tensor([[0.6, 0.0, 0.8], [0.0, 0.5, 0.0]]))
    assert update(grads, per_slot=False)[1, 1] < 0.01  # together, the large one would starve the small one


def test_ema_matches_the_closed_form() -> None:
    optimizer = make_optimizer(ema_decay=0.5, ema_start=2)
    expected = optimizer.averaged()["w"].clone()
    for update in range(1, 8):
        set_gradient(optimizer, torch.ones(5))
        apply_gradients(optimizer, 1.0, "")
        since = update - 2
        decay = 0.0 if since <= 0 else min(0.5, since / (since + 10))
        expected = decay * expected + (1 - decay) * optimizer.parameters["w"].detach()
    torch.testing.assert_close(optimizer.averaged()["w"], expected)

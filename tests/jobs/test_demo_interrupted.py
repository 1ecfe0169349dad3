"""The smallest demo, interrupted once in each of its phases: it goes on, says so, and ends as if nothing had been."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import clora.distill.step as step
import clora.jobs.demo as demo
import clora.jobs.demo_samples as demo_samples
import clora.jobs.teach as teaching
from clora.jobs.demo import Phases, run_demo
from clora.training.tracker import read_log

# Smaller still than the smoke size, and saved at every step.
TINY = ("train.checkpointing_steps=1", "train.max_train_steps=4", "train.coarse_steps=2", "train.critic_updates=1",
        "train.batch_size=1", "train.anchor_batch_size=2", "teach.max_train_steps=4", "targets.num_steps=2",
        "schedule.num_steps=2")  # fmt: skip
CONTROL = "joint-fm (student prompts)"
PHASES = ("dataset", "validate", "teach", "distil", "joint-fm", CONTROL, "sample", "score")


def stop_at(call: int, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, but its call of this number raises `KeyboardInterrupt`, once."""
    calls = iter(range(1_000_000))

    def stopped(*arguments: Any, **options: Any) -> Any:
        if next(calls) == call:
            raise KeyboardInterrupt
        return function(*arguments, **options)

    return stopped


def interruptions(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Break one phase after the other, somewhere in its middle; gives the phase that will stop."""
    for phase, module, name, call in (
        ("dataset", demo, "write_effect_pairs", 1),
        ("validate", demo, "validate_config", 0),
        ("teach", teaching, "apply_gradients", 3),
        ("distil", step, "apply_gradients", 3),
        ("joint-fm", teaching, "apply_gradients", 3),
        (CONTROL, step, "apply_gradients", 0),
        ("sample", demo_samples, "sample_held_out", 2),
        ("score", demo, "evaluate_methods", 0),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, stop_at(call, getattr(module, name)))
            yield phase


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_demo_goes_on_when_interrupted_in_each_phase(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smoke = demo.SCALES["smoke"]
    monkeypatch.setitem(demo.SCALES, "smoke", demo.Scale(2, 1, (*smoke.overrides, *TINY)))

    def run(out: str) -> str:
        console = Console(width=200)
        with console.capture() as said:
            try:
                run_demo(tmp_path / out, size="smoke", console=console)
            except KeyboardInterrupt:
                console.print("stopped")
        return said.get()

    assert "interrupted" not in run("whole")
    before = None
    for phase in interruptions(monkeypatch):
        said = run("parts")
        assert said.rstrip().endswith("stopped"), phase
        rows = json.loads((tmp_path / "parts" / "phases.json").read_text())
        assert list(rows) == list(PHASES[: PHASES.index(phase) + 1]) and not rows[phase]["done"]
        if before is not None:
            assert f"{before}: was interrupted after" in said and said.count("was interrupted") == 1
        before = phase
    said = run("parts")
    assert "score: was interrupted after" in said and "sample: done before" in said
    for title in ("teach", "train", "joint", "joint_student/train"):
        logs = [[row | {"seconds": 0} for row in read_log(tmp_path / out / title)] for out in ("whole", "parts")]
        assert logs[0] == logs[1] and logs[0]
    tables = []
    for out in ("whole", "parts"):
        rows = json.loads((tmp_path / out / "scores.json").read_text())
        tables.append({name: {**row, "seconds_per_image": 0} for name, row in rows.items()})
    assert tables[0] == tables[1]
    assert (tmp_path / "parts" / "report.html").is_file()


def test_phases_says_that_a_killed_phase_goes_on(tmp_path: Path) -> None:
    """A process that is killed writes nothing more; that the phase had begun was written before."""
    console = Console(width=200)

    def killed() -> None:
        assert json.loads((tmp_path / "phases.json").read_text())["teach"]["done"] is False
        text = (tmp_path / "phases.json").read_text()
        with console.capture() as said:
            Phases(tmp_path, console).run("teach", lambda: None)  # as the next process would
        assert "teach: was interrupted after 0 s, and goes on" in said.get()
        (tmp_path / "phases.json").write_text(text)

    Phases(tmp_path, console).run("teach", killed)
    with console.capture() as said:
        Phases(tmp_path, console).run("teach", lambda: pytest.fail("it was done"))
    assert "teach: done before" in said.get()

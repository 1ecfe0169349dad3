"""Learning rates over a run."""

from __future__ import annotations

import pytest

from clora.config import TrainConfig
from clora.training.lr_schedule import critic_lr_multiplier, lr_multiplier, student_lr_multiplier


def test_lr_multiplier_closed_forms() -> None:
    assert [lr_multiplier(i, 10, 4, "constant") for i in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert lr_multiplier(7, 10, 4, "linear") == pytest.approx(0.5)
    assert lr_multiplier(7, 10, 4, "cosine") == pytest.approx(0.5)
    assert lr_multiplier(10, 10, 4, "cosine") == pytest.approx(0.0)


def test_student_lr_multiplier_has_a_schedule_for_each_stage() -> None:
    """Cosine without warm-up: 1 at the start, 1/2 in the middle of each stage; the coarse one at its own rate."""
    train = TrainConfig(
        max_train_steps=30, learning_rate=1e-3, coarse_learning_rate=8e-3, lr_scheduler="cosine", lr_warmup_steps=0
    )
    factors = [student_lr_multiplier(train, 10, step) for step in (0, 5, 10, 20)]
    assert factors == pytest.approx([8.0, 4.0, 1.0, 0.5])
    same = train.model_copy(update={"coarse_learning_rate": None, "lr_warmup_steps": 2})
    assert [student_lr_multiplier(same, 10, step) for step in (0, 1, 2, 10, 11, 12)] == [0.5, 1, 1, 0.5, 1, 1]


def test_critic_lr_multiplier_counts_the_critics_own_updates() -> None:
    """Linear to 0 over the 20 full steps' three updates each, after a warm-up of four updates."""
    train = TrainConfig(max_train_steps=30, critic_updates=3, lr_scheduler="linear", lr_warmup_steps=4)
    factors = [critic_lr_multiplier(train, 10, update) for update in (0, 3, 4, 32, 60)]
    assert factors == pytest.approx([0.25, 1.0, 1.0, 0.5, 0.0])

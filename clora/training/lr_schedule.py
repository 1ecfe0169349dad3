"""Learning rates over a run."""

from __future__ import annotations

import math

from clora.config import TrainConfig


def lr_multiplier(update: int, total: int, warmup: int, scheduler: str) -> float:
    """Learning-rate factor of update 0, 1, ...: linear warm-up, then constant, cosine or linear decay to 0."""
    if update < warmup:
        return (update + 1) / warmup
    if scheduler == "constant":
        return 1.0
    progress = min(1.0, (update - warmup) / max(1, total - warmup))
    return 1.0 - progress if scheduler == "linear" else 0.5 * (1 + math.cos(math.pi * progress))


def student_lr_multiplier(train: TrainConfig, coarse_steps: int, step: int) -> float:
    """The student's learning rate at `step` over `train.learning_rate`: each stage warms up and decays on its own."""
    shape = (train.lr_warmup_steps, train.lr_scheduler)
    if step >= coarse_steps:
        return lr_multiplier(step - coarse_steps, train.max_train_steps - coarse_steps, *shape)
    peak = train.coarse_learning_rate or train.learning_rate
    return peak / train.learning_rate * lr_multiplier(step, min(coarse_steps, train.max_train_steps), *shape)


def critic_lr_multiplier(train: TrainConfig, coarse_steps: int, update: int) -> float:
    """The critic's at its own update number `update`: it learns in the full stage alone."""
    total = (train.max_train_steps - coarse_steps) * train.critic_updates
    return lr_multiplier(update, total, train.lr_warmup_steps, train.lr_scheduler)

"""The stages of a training run, and schedules and weights that do not fit into them."""

from __future__ import annotations

from clora.config import Config
from clora.method.objective import has_terms
from clora.method.routing import Stream


def idle_streams(config: Config) -> list[str]:
    """A sentence for each stream that the full stage of `train` draws and whose every weight is 0."""
    train, objective = config.train, config.objective
    if config.effects and train.coarse_steps >= train.max_train_steps:
        return []
    drawn: list[tuple[Stream, bool]] = [
        ("effect", bool(config.effects) and objective.p_switch > 0),
        ("general", not config.effects or objective.p_switch < 1),
    ]
    return [
        f"objective: every weight of the {stream} stream is 0, which the full stage draws; raise one (dmd_bs_weight and"
        " imitation_weight serve both streams), or set p_switch so that it is not drawn"
        for stream, is_drawn in drawn
        if is_drawn and not has_terms(objective, stream) and not objective.imitates(stream)
    ]


def training_warnings(config: Config) -> list[str]:
    """Schedules of `train` under which a stage learns next to nothing, or the average that is exported is not of its
    stage: no full stage, a warm-up as long as its stage, an average that starts in the coarse stage or never.

    Each names the key and the mend.
    """
    train = config.train
    total, coarse = train.max_train_steps, train.coarse_steps if config.effects else 0  # without effects no TA-FM
    if coarse >= total:
        return [
            "train.coarse_steps is not below train.max_train_steps: every update is coarse, none has a critic",
            *_warm_ups("train", total, 0, train.lr_warmup_steps),
        ]
    return _warm_ups("train", coarse, total - coarse, train.lr_warmup_steps) + _average(config, coarse, total)


def extend_warnings(config: Config) -> list[str]:
    """The same for `extend`, whose few updates the average may well outlast: then the last update is exported."""
    settings, started = config.extend, config.train.ema_start < config.extend.max_train_steps
    coarse, total = settings.coarse_steps, settings.max_train_steps
    warnings = _warm_ups("extend", min(coarse, total), max(0, total - coarse), settings.lr_warmup_steps)
    return warnings + (_average(config, coarse, total) if started and coarse < total else [])


def teaching_warnings(config: Config) -> list[str]:
    """The same for `teach`, which is one stage."""
    return _warm_ups("teach", 0, config.teach.max_train_steps, config.teach.lr_warmup_steps)


def _warm_ups(section: str, coarse: int, full: int, warm_up: int) -> list[str]:
    """What is wrong with a warm-up in stages of so many updates; each stage has its own, one of 0 is left out."""
    names = ("the coarse stage", "the full stage") if coarse else ("", "the run")
    warnings = []
    for stage, steps in zip(names, (coarse, full), strict=True):
        if steps and warm_up >= steps and warm_up > 1:  # a warm-up of one update is none
            peak = "reaches its peak only with the last one" if warm_up == steps else "never reaches its peak"
            warnings.append(
                f"{section}.lr_warmup_steps: {warm_up}, but {stage} has {steps} updates, so that the learning rate"
                f" {peak}; set it to about {max(1, steps // 10)}, or raise {section}.max_train_steps"
            )
    return warnings


def _average(config: Config, coarse: int, total: int) -> list[str]:
    """What is wrong with the start of the student's average in so many updates, the first ones coarse."""
    decay, start = config.train.ema_decay, config.train.ema_start
    if decay and start >= total:
        return [
            f"train.ema_start: {start}, but the run has {total} updates, so that no average is ever taken and the last"
            f" update is exported; set it to {coarse}, or train.ema_decay=0"
        ]
    if decay and start < coarse:
        left = decay ** (total - coarse)
        share = "less than 1 %" if left < 0.01 else f"{100 * left:.0f} %"
        return [
            f"train.ema_start: {start} lies in the coarse stage of {coarse} updates, so that {share} of the exported"
            f" average is from before the full stage; set it to {coarse}"
        ]
    return []

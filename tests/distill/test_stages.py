"""Schedules that do not fit into the stages of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from clora.config import PRESETS, Config, build_config
from clora.distill.stages import extend_warnings, idle_streams, teaching_warnings, training_warnings
from clora.jobs.demo import SCALES, Size


def config_of(tmp_path: Path, *overrides: str, **values: Any) -> Config:
    effects = [{"name": "clay", "prompt": "p", "pairs": "pairs"}]
    return build_config({"output_dir": "out", "preset": "clora", "effects": effects, **values}, tmp_path, overrides)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_fit(tmp_path: Path, preset: str) -> None:
    config = config_of(tmp_path, preset=preset)
    assert training_warnings(config) + teaching_warnings(config) + extend_warnings(config) + idle_streams(config) == []


@pytest.mark.parametrize("size", SCALES)
def test_sizes_of_the_demo_fit(tmp_path: Path, size: Size) -> None:
    config = config_of(tmp_path, *SCALES[size].overrides, preset="tiny")
    assert training_warnings(config) + teaching_warnings(config) == []


def test_training_warnings_name_a_warm_up_as_long_as_its_stage(tmp_path: Path) -> None:
    short = ("train.max_train_steps=620", "train.coarse_steps=600", "train.ema_start=600")
    fitting = config_of(tmp_path, *short, "train.lr_warmup_steps=19")
    assert training_warnings(fitting) == []
    assert training_warnings(config_of(tmp_path, *short, "train.lr_warmup_steps=20")) == [
        "train.lr_warmup_steps: 20, but the full stage has 20 updates, so that the learning rate reaches its peak only"
        " with the last one; set it to about 2, or raise train.max_train_steps"
    ]
    both = training_warnings(config_of(tmp_path, *short, "train.lr_warmup_steps=700"))
    assert len(both) == 2 and "the coarse stage has 600 updates" in both[0] and "never reaches its peak;" in both[1]
    assert training_warnings(config_of(tmp_path, "train.coarse_steps=1", "train.lr_warmup_steps=1")) == []
    (alone,) = training_warnings(config_of(tmp_path, "train.coarse_steps=0", "train.lr_warmup_steps=5000"))
    assert "but the run has 5000 updates" in alone


def test_training_warnings_name_an_average_of_another_stage(tmp_path: Path) -> None:
    """A decay of 0.98 over 20 full updates leaves .98^20 = 67 % of what was there before them."""
    short = ("train.max_train_steps=620", "train.coarse_steps=600", "train.lr_warmup_steps=2", "train.ema_decay=0.98")
    (warning,) = training_warnings(config_of(tmp_path, *short, "train.ema_start=50"))
    assert warning == (
        "train.ema_start: 50 lies in the coarse stage of 600 updates, so that 67 % of the exported average is from"
        " before the full stage; set it to 600"
    )
    (never,) = training_warnings(config_of(tmp_path, *short, "train.ema_start=620"))
    assert never.startswith("train.ema_start: 620, but the run has 620 updates, so that no average is ever taken")
    for right in ("train.ema_start=600", "train.ema_decay=0"):
        assert training_warnings(config_of(tmp_path, *short, "train.ema_start=50", right)) == []
    (little,) = training_warnings(config_of(tmp_path, "train.ema_start=499", "train.ema_decay=0.9"))
    assert "less than 1 % of the exported average" in little


def test_training_warnings_name_a_run_without_a_full_stage(tmp_path: Path) -> None:
    (warning,) = training_warnings(config_of(tmp_path, "train.max_train_steps=500"))
    assert warning.startswith("train.coarse_steps is not below train.max_train_steps")
    # Without effects there is no coarse stage, whatever the key says.
    assert training_warnings(config_of(tmp_path, "train.max_train_steps=501", effects=[])) == []


def test_extend_warnings_are_of_its_own_keys(tmp_path: Path) -> None:
    given = (
        "extend.max_train_steps=100",
        "extend.coarse_steps=80",
        "extend.lr_warmup_steps=20",
        "train.ema_decay=0.98",
    )
    warm_up, average = extend_warnings(config_of(tmp_path, *given, "train.ema_start=50"))
    assert warm_up.startswith("extend.lr_warmup_steps: 20, but the full stage has 20 updates")
    assert average.startswith("train.ema_start: 50 lies in the coarse stage of 80 updates")
    assert len(extend_warnings(config_of(tmp_path, *given, "train.ema_start=500"))) == 1


def test_teaching_warnings_name_a_warm_up_as_long_as_the_run(tmp_path: Path) -> None:
    (warning,) = teaching_warnings(config_of(tmp_path, "teach.max_train_steps=50"))
    assert warning.startswith("teach.lr_warmup_steps: 50, but the run has 50 updates")
    assert teaching_warnings(config_of(tmp_path, "teach.max_train_steps=51")) == []


def test_idle_streams_are_those_that_are_drawn_and_have_no_weight(tmp_path: Path) -> None:
    no_bs = "objective.dmd_bs_weight=0"
    nothing = (no_bs, "objective.dmd_ts_weight=0", "objective.ta_fm_weight=0")

    def idle(*overrides: str, **values: Any) -> list[str]:
        return [
            fault.split("every weight of the ")[1].split()[0]
            for fault in idle_streams(config_of(tmp_path, *overrides, **values))
        ]

    assert idle(no_bs) == ["general"] and idle(*nothing) == ["effect", "general"]
    assert idle(*nothing, "objective.p_switch=1") == ["effect"] and idle(no_bs, "objective.p_switch=1") == []
    assert idle(*nothing, "objective.p_switch=0") == ["general"]
    assert idle(*nothing, "objective.imitation_weight=1") == []
    assert idle(*nothing, "objective.imitation_weight=1", "objective.imitation_below=0.6") == ["general"]
    assert idle(*nothing, "train.coarse_steps=5000") == []  # no full stage
    assert idle(no_bs, "train.coarse_steps=5000", effects=[]) == ["general"]  # without effects nothing is coarse

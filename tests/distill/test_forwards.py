"""The forwards of a distillation, by formula and as hooks count them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

import clora.method.imitation as imitation
import clora.method.objective as objective
from bench.training.cycle_counts import counted
from clora.config import build_config
from clora.distill.check import check_training
from clora.distill.forwards import (
    coarse_step_forwards,
    distillation_forwards,
    full_step_forwards,
    imitation_forwards,
    joint_step_forwards,
    steps_before,
)
from clora.distill.run import make_distillation, open_bank, targets_of
from clora.distill.step import train_step
from clora.distill.workspace import open_workspace
from clora.jobs.teach import teach, teach_joint
from tests.support.small_job import make_config, write_dataset

QUIET = Console(quiet=True)


def test_full_step_forwards_closed_forms() -> None:
    """Two samples, eight steps: rollouts of 4.5 forwards on average; guidance asks the teacher twice."""
    plain = ["objective.guidance=1", "train.batch_size=2", "train.critic_updates=3", "train.anchor_batch_size=5"]
    plain.append("schedule.step_counts=null")
    config = build_config({"preset": "clora", "output_dir": "o"}, Path(), [*plain, "objective.critic_target_share=0.5"])
    assert full_step_forwards(config, "general") == 2 * (3 * (4.5 + 3) + 4.5 + 2 + 2)
    effect = 2 * (3 * (0.5 + 0.5 * 4.5 + 3) + (4.5 + 2 + 2) + (1 + 2 + 2)) + 5 * 3
    assert full_step_forwards(config, "effect") == effect and joint_step_forwards(config) == 15
    guided = build_config({"preset": "clora", "output_dir": "o"}, Path(), [*plain[1:], "objective.guidance=4"])
    assert full_step_forwards(guided, "effect") == effect + 2 * 2
    steps = ["train.coarse_steps=4", "train.max_train_steps=10", "objective.p_switch=1"]
    effects = [{"name": "a", "prompt": "p", "lora": "a.safetensors"}]
    images = [*plain, *steps, "train.coarse_target=images"]
    whole = build_config({"preset": "clora", "output_dir": "o", "effects": effects}, Path(), images)
    assert distillation_forwards(whole) == 4 * 15 + 6 * effect
    follows = [*plain[1:], *steps, "train.coarse_target=velocity"]
    for guidance, of_sample in ((1, 1 + 2 + 1), (4, 1 + 2 + 2)):
        given = {"preset": "clora", "output_dir": "o", "effects": effects}
        velocity = build_config(given, Path(), [*follows, f"objective.guidance={guidance}"])
        assert coarse_step_forwards(velocity) == 5 * of_sample and joint_step_forwards(velocity) == 15
        full = full_step_forwards(velocity, "effect")
        assert distillation_forwards(velocity) == 4 * 5 * of_sample + 6 * full
    # Without effects there is no coarse stage, and every step is general.
    alone = build_config({"preset": "clora", "output_dir": "o"}, Path(), [*plain, *steps])
    assert distillation_forwards(alone) == 10 * full_step_forwards(alone, "general")


def test_imitation_forwards_closed_forms() -> None:
    """Recipes A and B of one sample; the paper's is 56 with five critic updates and a guided teacher."""
    shared = {"preset": "segment_mean", "output_dir": "o", "train": {"anchor_batch_size": 1}}

    def of(step_counts: object = (4, 2), **objective: object) -> float:
        values = shared | {"objective": objective, "schedule": {"step_counts": step_counts}}
        return imitation_forwards(build_config(values, Path()), "effect")

    assert of(on_policy_share=0.0) == 1 + 2 + 2
    assert of(on_policy_share=0.0, guidance=1.0) == 1 + 2 + 1
    assert of(None, on_policy_share=1.0) == 1 + 2 + 2 + 3.5
    assert of([2], on_policy_share=0.5) == 1 + 2 + 2 + 0.5 * (3.5 + 0.5) / 2
    config = build_config(shared, Path())
    assert full_step_forwards(config, "effect") == imitation_forwards(config, "effect")
    assert imitation_forwards(config, "general") == 1 + 2 + 2 + (3.5 + 1.5 + 0.5) / 3  # always on policy
    # With a bound of .6 eight steps are matched at the first six, imitated at the last two; of four the last.
    bounded = build_config(shared | {"objective": {"imitation_below": 0.6, "on_policy_share": 1.0}}, Path())
    assert imitation_forwards(bounded, "effect") == 1 + 2 + 2 + (6.5 + 3) / 2
    assert steps_before(bounded) == (2.5 + 1 + 0.5) / 3
    assert full_step_forwards(bounded, "general") == 0
    paper = build_config({"preset": "paper", "output_dir": "o", "objective": {"critic_target_share": 0.0}}, Path())
    assert full_step_forwards(paper, "effect") / full_step_forwards(config, "effect") > 8


IMITATION = (
    *("objective.ta_fm_weight=0", "objective.dmd_ts_weight=0", "objective.dmd_bs_weight=0", "train.critic_updates=0"),
    *(
        "objective.imitation_weight=1",
        "objective.on_policy_share=1",
        "objective.guidance=2",
        "train.critic_reuse=false",
    ),
)
BELOW = ("objective.imitation_weight=1", "objective.imitation_below=0.6", "objective.on_policy_share=1",
         "schedule.num_steps=4", "objective.guidance=2")  # fmt: skip
FOLLOWING = ("train.coarse_target=velocity", "objective.guidance=2")


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides", [(), ("train.critic_reuse=true", "objective.guidance=2"), IMITATION, FOLLOWING, BELOW]
)
def test_distillation_forwards_equals_what_hooks_count(
    random_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: tuple[str, ...]
) -> None:
    """Three steps of the sampler, always left at the middle one, as on average; no chance in the critic's samples."""
    for module in (objective, imitation):
        monkeypatch.setattr(module, "exit_step", lambda num_steps, rng: num_steps // 2)
    fixed = ("objective.critic_target_share=0", "targets.source=pairs", "train.max_train_steps=8")
    fixed = (*fixed, "schedule.step_counts=null", *overrides)
    config = make_config(random_base, write_dataset(tmp_path / "data"), tmp_path / "run", *fixed)
    teach(config)
    workspace = open_workspace(check_training(config), QUIET)
    bank = open_bank(workspace)
    assert bank is not None
    workspace = replace(workspace, effects=targets_of(workspace, bank, QUIET))
    distillation = make_distillation(workspace, bank)
    assert {distillation.batches.stream(step) for step in range(2, 8)} == {"effect", "general"}
    with counted([workspace.backbone.transformer], []) as events:
        for step in range(8):
            train_step(distillation, step)
    assert forwards(events) == distillation_forwards(config)
    bank.close()
    with counted([workspace.backbone.transformer], []) as events:
        teach_joint(workspace, None, QUIET)
    assert forwards(events) == config.teach.max_train_steps * joint_step_forwards(config)


def forwards(events: list[tuple[str, int]]) -> int:
    return sum(samples * (2 if kind == "backward" else 1) for kind, samples in events)

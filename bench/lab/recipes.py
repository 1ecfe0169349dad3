"""Which recipe turns N teachers into few steps? `python -m bench.lab.recipes --run runs/recipes [--figures F]`.

All arms start from one coarse student (flow matching on the teachers' images) and train at about equal cost, counted in
forwards of a sample (a backward is two). The controls have no distillation: the coarse student, the same trained on for
the cost of an arm, both also with the base's acceleration LoRA on top. Arms `paper RATE` are preset `paper`'s recipe:
no coarse stage, no acceleration LoRA, and three times the cost of another arm with the coarse stage.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from bench.lab.study import Arm, Row, Study, judge, machine, write_figures
from clora.config import load_preset
from clora.tiny.dataset import effect_names

COARSE = 600  # updates
IMAGES = "train.coarse_target=images"
BUDGET = 20_000  # forwards of an arm after the coarse stage
PLAIN = ("student.acceleration=null", "train.critic_updates=0", "train.critic_reuse=false", "objective.ta_fm_weight=0",
         "objective.dmd_ts_weight=0", "objective.dmd_bs_weight=0", "objective.imitation_weight=0",
         "objective.imitation_below=null", "train.coarse_steps=0", "train.ema_start=0", "train.ema_decay=0.98",
         "train.lr_warmup_steps=20")  # fmt: skip
IMITATE = (*PLAIN, "objective.imitation_weight=1", "objective.p_switch=1", "train.learning_rate=2e-3",
           "schedule.sampler=euler")  # fmt: skip
MATCH = ("train.coarse_steps=0", "train.ema_start=0", "train.ema_decay=0.98")  # the rest is the preset's
THREE = ("train.critic_updates=3", "train.critic_reuse=false", "train.critic_learning_rate=1e-3")
# What preset `paper` says of the method; other settings (batch, rates, guidance) go by the base.
PAPER = {"objective": ("p_switch", "tau_max", "tau_min", "ts_sigma", "ts_critic_shift", "ta_fm_weight", "dmd_ts_weight",
                       "dmd_bs_weight", "ta_fm_sigma", "dmd_norm_floor", "critic_target_share"),
         "schedule": ("step_counts", "sampler"), "student": ("acceleration",),
         "train": ("coarse_steps", "critic_updates", "critic_reuse", "anchor_batch_size", "max_grad_norm",
                   "lr_scheduler", "lr_warmup_steps", "ema_decay", "ema_start")}  # fmt: skip
PAPER_COST = 3  # times the default recipe's


def paper_recipe(rate: float) -> tuple[str, ...]:
    """Preset `paper`'s method on the tiny base; student and critic learn at one rate, as there. The rank is that of the
    default's student with its acceleration LoRA."""
    preset = load_preset("paper")
    method = (f"{of}.{key}={json.dumps(preset[of][key])}" for of, keys in PAPER.items() for key in keys)
    return (*method, "student.rank=60", "student.alpha=60", f"train.learning_rate={rate}",
            f"train.critic_learning_rate={rate}")  # fmt: skip


ARMS = (
    Arm("coarse on", (*PLAIN, IMAGES, "train.coarse_steps=100000", "train.coarse_learning_rate=4e-3"), "coarse"),
    Arm("segment", (*IMITATE, "schedule.step_counts=[4,2]"), "coarse"),
    Arm("segment 2", (*IMITATE, "schedule.num_steps=2", "schedule.step_counts=null"), "coarse"),
    Arm("segment on policy", (*IMITATE, "schedule.step_counts=[4,2]", "objective.on_policy_share=0.5"), "coarse"),
    Arm("dmd", MATCH, "coarse"),
    Arm("dmd 8", (*MATCH, "schedule.step_counts=null"), "coarse"),
    Arm("dmd 2", (*MATCH, "schedule.num_steps=2", "schedule.step_counts=null"), "coarse"),
    Arm("dmd, step counts alike", (*MATCH, "schedule.step_counts=[4,2]"), "coarse"),
    Arm("dmd, slow critic", (*MATCH, "train.critic_learning_rate=1e-3"), "coarse"),
    Arm("dmd, three slow critic updates", (*MATCH, *THREE), "coarse"),
    Arm("dmd, hot student", (*MATCH, "train.learning_rate=3e-4"), "coarse"),
    *(Arm(f"paper {rate}", paper_recipe(rate)) for rate in (3e-4, 1e-3, 3e-3)),
)


def steps_for(study: Study, arm: Arm, forwards: float) -> Arm:
    """The arm with as many updates as so many forwards allow."""
    probe = Arm(arm.name, (*arm.overrides, "train.max_train_steps=200"), None)
    count = max(1, round(forwards * 200 / study.forwards(probe)))
    return Arm(arm.name, (*arm.overrides, f"train.max_train_steps={count}"), arm.start)


def measure(study: Study, chosen: list[str], budget: float) -> dict[str, Any]:
    study.teach()
    coarse = Arm("coarse", (*PLAIN, IMAGES, f"train.coarse_steps={COARSE}", f"train.max_train_steps={COARSE}"))
    study.train(coarse)
    whole = budget + study.forwards(coarse)
    rows = [Row("teacher", None), *(Row("teacher", n) for n in (8, 4, 2))]
    rows += [Row("teacher", n, "consistency", accelerated=True) for n in (8, 4, 2)]
    costs = {}
    for who in ("coarse", *chosen):
        if who != "coarse":
            arm = next(arm for arm in ARMS if arm.name == who)
            arm = steps_for(study, arm, budget if arm.start else PAPER_COST * whole)
            study.train(arm)
            costs[who] = round(study.forwards(arm))
        for n in (8, 4, 2):
            if who in ("coarse", "coarse on"):
                rows.append(Row(who, n, "consistency", accelerated=True))
            rows.append(Row(who, n, "consistency" if who.startswith(("dmd", "paper")) else "euler"))
    controls = {row.name: Row("coarse", row.num_steps or 8, "consistency", accelerated=True).name for row in rows}
    table = judge(study.sample(rows), controls)
    return {
        "effects": len(study.effects),
        "scenes": {"use": study.scenes, "count": study.num_scenes},
        "forwards": {"coarse": round(study.forwards(coarse)), **costs},
        "machine": machine(),
        "rows": table,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--effects", type=int, default=12)
    parser.add_argument("--scenes", choices=("tune", "judge"), default="tune")
    parser.add_argument("--num-scenes", type=int, default=4)
    parser.add_argument("--arms", nargs="*", default=[arm.name for arm in ARMS])
    parser.add_argument("--budget", type=float, default=BUDGET)
    parser.add_argument("--figures", type=Path)
    arguments = parser.parse_args()
    names = effect_names(arguments.effects)
    study = Study(arguments.run.resolve(), names, scenes=arguments.scenes, num_scenes=arguments.num_scenes)
    write_figures(arguments.figures, measure(study, arguments.arms, arguments.budget))


if __name__ == "__main__":
    main()

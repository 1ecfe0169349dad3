"""What does each part of the method add? `python -m bench.lab.ablation --run runs/ablation [--figures F]`.

The paper's Table 3, twice. On preset `tiny`: its full stage, whole (`whole`, the control) and with one part taken away
or put back, all from the file of one coarse student and for as many updates; without AOP the coarse stage is trained
anew, for it reads the same prompts. On preset `paper`'s recipe, at three times the cost: the paper's five rows, each
with what it names. Effects are judged in 8, 4 and 2 steps, with paired differences to `whole` (the paper's rows to the
last of them); *general edits*, which PDSR is to keep, by the PSNR of the base's own instructions on scenes of their
own. Everything is kept below the folder, and goes on where it was interrupted.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from bench.lab.extend import Examples, sample
from bench.lab.recipes import PAPER_COST, THREE, paper_recipe, steps_for
from bench.lab.study import SLOT, Arm, Row, Study, judge, machine, write_figures
from clora.config import acceleration_lora
from clora.data.image_grid import to_uint8
from clora.data.pairs import Pair
from clora.distill.opened import OpenBase
from clora.distill.workspace import open_base
from clora.evaluate.baselines import ACCELERATION, Method
from clora.evaluate.metrics.image import as_image, psnr
from clora.evaluate.statistics import bootstrap_interval
from clora.inference.sampling import few_step_sampling
from clora.lora.files import read_lora
from clora.tiny.dataset import EVAL_SCENES, effect_names
from clora.tiny.instructions import generic_edit
from clora.tiny.world.scenes import render, sample_scene

PRESET, PRESET_VAGUE, WHOLE = "preset", "preset, no AOP", "whole"
NO_AOP, NO_TS, NO_TA_FM = "objective.aop=false", "objective.dmd_ts_weight=0", "objective.ta_fm_weight=0"
NONE = f"{PRESET}:coarse"  # with the acceleration LoRA: no full stage
# From the preset's coarse student on.
FULL = ("train.coarse_steps=0", "train.ema_start=0", "train.max_train_steps=150")
PARTS: Mapping[str, tuple[str, ...]] = {
    WHOLE: (),
    "no PDSR": ("objective.p_switch=1",),
    "no target simulation": (NO_TS,),
    # The general stream has nothing else: so without PDSR as well.
    "no backward simulation, no PDSR": ("objective.dmd_bs_weight=0", "objective.p_switch=1"),
    "eight steps alone": ("schedule.step_counts=null",),
    "TA-FM at .1": ("objective.ta_fm_weight=0.1",),
    "TA-FM at 1": ("objective.ta_fm_weight=1",),
    "same-step imitation": ("objective.imitation=same_step", "objective.imitation_weight=1"),
    "imitation below .6": (
        "objective.imitation=same_step",
        "objective.imitation_weight=1",
        "objective.imitation_below=0.6",
        "train.anchor_batch_size=6",
    ),
    "three slow critic updates": THREE,
}
BASES = (Arm(PRESET, ()), Arm(PRESET_VAGUE, (NO_AOP,)))  # whose coarse students the arms start from
ARMS = (
    *(Arm(name, (*FULL, *settings), NONE) for name, settings in PARTS.items()),
    Arm("no AOP", (*FULL, NO_AOP), f"{PRESET_VAGUE}:coarse"),
)
PAPER = "paper, all"
PAPER_RATE = 1e-3  # not searched: the only one of bench.lab.recipes that has been run
# Table 3, in its order.
PAPER_PARTS: Mapping[str, tuple[str, ...]] = {
    "paper, PDSR": (NO_AOP, NO_TS, NO_TA_FM),
    "paper, PDSR, AOP": (NO_TS, NO_TA_FM),
    "paper, PDSR, AOP, TS": (NO_TA_FM,),
    "paper, AOP, TS, TA-FM": ("objective.p_switch=1",),
    PAPER: (),
}
NFE = (8, 4, 2)
GENERAL_SCENES = EVAL_SCENES + 40_000
Truth = NDArray[Any]


def paper_arms(study: Study) -> list[Arm]:
    """As many updates for all as the whole recipe makes at its cost."""
    whole = Arm(PAPER, paper_recipe(PAPER_RATE))
    steps = steps_for(study, whole, PAPER_COST * study.forwards(BASES[0])).overrides[-1:]
    return [Arm(name, (*whole.overrides, *settings, *steps)) for name, settings in PAPER_PARTS.items()]


def row(who: str, steps: int) -> Row:
    return Row(who, steps, "consistency", accelerated=who == NONE)


def general_edits(workspace: OpenBase, folder: Path, count: int) -> tuple[Examples, dict[tuple[str, int], Truth]]:
    """So many of the base's own instructions, every choice named, encoded, and what they ask for."""
    folder.mkdir(parents=True, exist_ok=True)
    examples, truths = {}, {}
    for scene in range(GENERAL_SCENES, GENERAL_SCENES + count):
        rendered, path = render(sample_scene(scene)), folder / f"{scene}.png"
        text, truths["general", scene] = generic_edit(rendered, np.random.default_rng(scene))
        Image.fromarray(to_uint8(rendered.image_HW3)).save(path)
        pair = Pair((path,), None, None, None, str(scene))
        examples["general", scene] = workspace.encoder.encode(pair, None, {"student": text})
    return examples, truths


def general_quality(study: Study, whos: Sequence[str], count: int, num_steps: int = 8) -> dict[str, dict[str, Any]]:
    """Of the base with its acceleration LoRA and of every arm: mean PSNR (dB) of general edits to their truths, and the
    difference to the base, paired by edit, with its 95 % interval."""
    config = study.arm_config(Arm("sampling", ()))
    workspace = open_base(config, study.console)
    examples, truths = general_edits(workspace, study.folder / "data" / "general_edits", count)
    fast = acceleration_lora(config.base.model)
    assert fast is not None
    workspace.adapters.add_lora(ACCELERATION, read_lora(fast, workspace.adapters.module_shapes).modules)
    sampling = few_step_sampling(num_steps, config.schedule.shift, "consistency")
    found: dict[str, NDArray[np.float64]] = {}
    for who in ("base", *whos):
        slots: list[Any] = [ACCELERATION] if who == "base" else [SLOT] if who != NONE else [(SLOT, ACCELERATION)]
        if who != "base":
            modules = read_lora(study.arm_file(who), workspace.adapters.module_shapes).modules
            workspace.adapters.add_lora(SLOT, modules)
        method = Method(who, 1, sampling, "student", lambda effects, slots=slots: slots * len(effects))
        images = sample(workspace, method, examples)
        found[who] = np.array([psnr(as_image(images[key][0]), truths[key]) for key in truths])
        if who != "base":
            workspace.adapters.remove_stack(SLOT)
    gaps = {who: values - found["base"] for who, values in found.items()}
    return {
        who: {
            "psnr": round(float(values.mean()), 2),
            "to_base": round(float(gaps[who].mean()), 2),
            "interval": [
                round(end, 2) for end in bootstrap_interval({(edit,): [gap] for edit, gap in enumerate(gaps[who])})
            ],
        }
        for who, values in found.items()
    }


def measure(study: Study, chosen: Sequence[str], num_general: int) -> dict[str, Any]:
    study.teach()
    papers = {PAPER} if PAPER_PARTS.keys() & set(chosen) else set()
    arms = [arm for arm in (*ARMS, *paper_arms(study)) if arm.name in {WHOLE, *papers, *chosen}]
    bases = [base for base in BASES if any(arm.start == f"{base.name}:coarse" for arm in arms)]
    for arm in (*bases, *arms):
        study.train(arm)
    whos = [PRESET, *(arm.name for arm in arms), NONE]
    rows = [row(who, steps) for who in whos for steps in NFE]
    parts = PAPER_PARTS.keys() - {PAPER}
    controls = {one.name: row(PAPER if one.who in parts else WHOLE, one.num_steps or 8).name for one in rows}
    return {
        "effects": list(study.effects),
        "scenes": {"use": study.scenes, "count": study.num_scenes},
        "settings": ["preset tiny", *study.settings],
        "arms": {arm.name: list(arm.overrides) for arm in (*bases, *arms)},
        "forwards": {arm.name: round(study.forwards(arm)) for arm in (*bases, *arms)},
        "machine": machine(),
        "rows": judge(study.sample(rows), controls),
        "general edits, 8 steps": general_quality(study, whos, num_general),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--effects", type=int, default=12)
    parser.add_argument("--arms", nargs="*", default=[*(arm.name for arm in ARMS), *PAPER_PARTS])
    parser.add_argument("--scenes", choices=("tune", "judge"), default="judge")
    parser.add_argument("--num-scenes", type=int, default=6)
    parser.add_argument("--num-general", type=int, default=96)
    parser.add_argument("--figures", type=Path)
    parser.add_argument("--set", nargs="*", default=[], metavar="key=value", help="other settings than the preset's")
    a = parser.parse_args()
    study = Study(a.run.resolve(), effect_names(a.effects), a.set, scenes=a.scenes, num_scenes=a.num_scenes)
    write_figures(a.figures, measure(study, a.arms, a.num_general))


if __name__ == "__main__":
    main()

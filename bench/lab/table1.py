"""What does distillation add? `python -m bench.lab.table1 --run runs/table1 [--effects N --figures F key=value ...]`.

The paper's Table 1 in 8, 4, 2 and 1 steps (rows "NAME, STEPS"), beside three controls, each with the base's
acceleration LoRA on top: the collection's own coarse stage; the same trained on until it has cost as much as the
collection (counted in forwards of a sample, a backward is two); and a student of flow matching on the teachers' images
alone, without distillation, for that cost. The collection is trained by preset `tiny` as it is, or with other
`key=value`, once a seed; rows that are trained pool their seeds' outputs. Differences to the coarse stage are paired by
effect, scene, noise and seed. Everything is kept below the folder, and goes on where it was interrupted.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.lab.recipes import IMAGES, PLAIN, steps_for
from bench.lab.study import Arm, Images, Row, Study, judge, machine, write_figures
from clora.jobs.demo import SCALES
from clora.tiny.dataset import effect_names

CONTROL = "coarse+accel"


def arms(study: Study, seed: int, recipe: Sequence[str]) -> tuple[Arm, Arm, Arm]:
    """The collection of one seed, and the controls: its coarse stage trained on for the cost of its full stage, and
    flow matching on images for the cost of both."""
    collection = Arm(f"collection {seed}", (*recipe, f"seed={seed}"))
    train = study.arm_config(collection).train
    coarse = study.forwards(Arm("", (*collection.overrides, f"train.max_train_steps={train.coarse_steps}")))
    rate = (train.coarse_learning_rate or train.learning_rate) / 2
    on = (*recipe, *PLAIN, f"seed={seed}", "train.coarse_steps=100000", f"train.coarse_learning_rate={rate}")
    longer = Arm(f"coarse on {seed}", on, f"{collection.name}:coarse")
    on_images = (*recipe, *PLAIN, f"seed={seed}", "train.coarse_steps=100000", IMAGES)
    images = Arm(f"images {seed}", on_images)
    whole = study.forwards(collection)
    return collection, steps_for(study, longer, whole - coarse), steps_for(study, images, whole)


def rows_in(steps: int, seeds: Sequence[int]) -> dict[str, list[Row]]:
    """The table's rows in so many steps: what each pools, a row of the study for every seed."""
    accelerated = {
        CONTROL: "collection {}:coarse",
        "coarse on+accel": "coarse on {}",
        "images+accel": "images {}",
        "teachers+accel": "teacher",
    }
    plain = {"coarse on": "coarse on {}", "teachers": "teacher"}
    rows = {"collection": [Row(f"collection {seed}", steps, "consistency") for seed in seeds]}
    for name, who in accelerated.items():
        rows[name] = [Row(who.format(seed), steps, "consistency", accelerated=True) for seed in seeds]
    for name, who in plain.items():
        rows[name] = [Row(who.format(seed), steps) for seed in seeds]
    return {f"{name}, {steps}": of_seeds for name, of_seeds in rows.items()}


def pooled(found: dict[str, Images], rows: Sequence[Row]) -> Images:
    """The rows' outputs of every effect and scene, one after the other."""
    return {key: [image for row in rows for image in found[row.name][key]] for key in found[rows[0].name]}


def measure(study: Study, seeds: Sequence[int], recipe: Sequence[str], nfe: Sequence[int]) -> dict[str, Any]:
    study.teach()
    trained = [arms(study, seed, recipe) for seed in seeds]
    for of_seed in trained:
        for arm in of_seed:
            study.train(arm)
    rows = {"teachers, as targets": [Row("teacher", None)] * len(seeds)}
    for steps in nfe:
        rows |= rows_in(steps, seeds)
    found = study.sample(list(dict.fromkeys(row for of_seeds in rows.values() for row in of_seeds)))
    images = {name: pooled(found, of_seeds) for name, of_seeds in rows.items()}
    controls = {name: f"{CONTROL}, {name.rpartition(', ')[2]}" for name in rows}
    collection, longer, flow = trained[0]
    return {
        "effects": list(study.effects),
        "scenes": {"use": study.scenes, "count": study.num_scenes},
        "seeds": list(seeds),
        "recipe": ["preset tiny", *study.settings, *recipe],
        "forwards": {
            "collection": round(study.forwards(collection)),
            "its full stage, and coarse on": round(study.forwards(longer)),
            "images": round(study.forwards(flow)),
        },
        "machine": machine(),
        "rows": judge(images, controls),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--effects", type=int, default=12)
    parser.add_argument("--size", choices=("full", "long"), default="full", help="the demo's")
    parser.add_argument("--seeds", type=int, default=3, help="collections trained, of seeds 0, 1, ...")
    parser.add_argument("--scenes", choices=("tune", "judge"), default="judge")
    parser.add_argument("--num-scenes", type=int, default=6)
    parser.add_argument("--nfe", type=int, nargs="*", default=[8, 4, 2, 1])
    parser.add_argument("--figures", type=Path)
    parser.add_argument("recipe", nargs="*", help="settings other than the preset's, key=value")
    a = parser.parse_args()
    scale = SCALES[a.size]
    study = Study(
        a.run.resolve(), effect_names(a.effects), scale.overrides, scale.pairs, scenes=a.scenes, num_scenes=a.num_scenes
    )
    write_figures(a.figures, measure(study, range(a.seeds), a.recipe, a.nfe))


if __name__ == "__main__":
    main()

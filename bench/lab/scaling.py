"""What does a collection lose as it grows? `python -m bench.lab.scaling --run runs/scaling [--figures F]`.

The paper's Table 4: collections of the world's first 10, 20 and 50 effects, from the same teachers and with as many
updates an effect, in 8, 4 and 2 steps, beside their coarse stages with the base's acceleration LoRA and the teachers.
The *shared* rows are of the ten effects that all collections hold, with paired differences to the smallest collection;
the *own* ones of everything that each holds, with those to its coarse stage. Everything is kept below the folder, and
goes on where it was interrupted.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.lab.study import Arm, Images, Row, Study, judge, machine, write_figures
from clora.config import Config
from clora.jobs.demo import SCALES
from clora.tiny.dataset import effect_names

NFE = (8, 4, 2)
SHARED = ("teachers", "data", "cache")  # by all the sizes' studies


def studies(run: Path, sizes: Sequence[int], scenes: int) -> list[Study]:
    """A study for each size, in increasing order; the largest one's teachers and data are all of theirs."""
    scale, most = SCALES["long"], max(sizes)
    for size in sizes:
        folder = run / str(size)
        folder.mkdir(parents=True, exist_ok=True)
        for name in SHARED:
            if size != most and not (folder / name).exists():
                (run / str(most) / name).mkdir(parents=True, exist_ok=True)
                (folder / name).symlink_to(Path("..") / str(most) / name)
    return [
        Study(run / str(size), effect_names(size), scale.overrides, scale.pairs, scenes="judge", num_scenes=scenes)
        for size in sorted(sizes)
    ]


def collection(config: Config, share: float) -> Arm:
    """The arm that trains for this share of the configuration's updates."""
    train = config.train
    counts = {key: round(share * getattr(train, key)) for key in ("max_train_steps", "coarse_steps", "ema_start")}
    return Arm("collection 0", tuple(f"train.{key}={count}" for key, count in counts.items()))


def rows_of(arm: Arm) -> dict[str, Row]:
    """A study's rows by the names that they have here."""
    rows = {"teachers, as targets": Row("teacher", None)}
    for steps in NFE:
        rows[f"collection, {steps}"] = Row(arm.name, steps, "consistency")
        rows[f"coarse+accel, {steps}"] = Row(f"{arm.name}:coarse", steps, "consistency", accelerated=True)
    return rows


def measure(run: Path, sizes: Sequence[int], scenes: int) -> dict[str, Any]:
    of_size = studies(run, sizes, scenes)
    of_size[-1].teach()
    smallest, largest = of_size[0], of_size[-1]
    shared: dict[str, Images] = {}
    own: list[dict[str, Any]] = []
    forwards = {}
    for study in of_size:
        size = len(study.effects)
        study.teach()
        arm = collection(study.config(), size / len(largest.effects))
        study.train(arm)
        forwards[str(size)] = round(study.forwards(arm))
        rows = rows_of(arm)
        found = study.sample(list(rows.values()))
        made = {f"{size} effects: {name}": found[row.name] for name, row in rows.items()}
        own += judge(made, {name: name.replace("collection", "coarse+accel") for name in made})
        for name, images in made.items():
            shared[name] = {key: images[key] for key in images if key[0] in smallest.effects}
    first = len(smallest.effects)
    controls = {name: f"{first} effects: {name.partition(': ')[2]}" for name in shared}
    return {
        "effects": list(largest.effects),
        "sizes": [len(study.effects) for study in of_size],
        "scenes": {"use": largest.scenes, "count": scenes},
        "seeds": [0],
        "settings": ["preset tiny", *largest.settings, "as many updates an effect"],
        "forwards": forwards,
        "machine": machine(),
        "shared": judge(shared, controls),
        "own": own,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--sizes", type=int, nargs="*", default=[10, 20, 50])
    parser.add_argument("--num-scenes", type=int, default=12)
    parser.add_argument("--figures", type=Path)
    a = parser.parse_args()
    write_figures(a.figures, measure(a.run.resolve(), a.sizes, a.num_scenes))


if __name__ == "__main__":
    main()

"""How does a collection become one? `python -m bench.lab.dynamics --run runs/dynamics [--figures F] [--picture F]`.

The paper's Fig. 10, on preset `tiny`: full stages of different lengths, each with a schedule of its own, all from the
file of one coarse student, in 8, 4 and 2 steps; length 0 is that student with the base's acceleration LoRA. Judged on
scenes that nothing was chosen on, with paired differences to length 0. Everything is kept below the folder, and goes on
where it was interrupted.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.lab.recipes import MATCH
from bench.lab.study import Arm, Row, Study, judge, machine, write_figures
from clora.tiny.dataset import effect_names

COARSE = "preset"
LENGTHS = (150, 600, 1200)
NFE = (8, 4, 2)


def full_stage(updates: int) -> Arm:
    return Arm(f"full {updates}", (*MATCH, f"train.max_train_steps={updates}"), f"{COARSE}:coarse")


def rows_of(lengths: Sequence[int]) -> dict[str, Row]:
    """Rows by their names: what is sampled, and in how many steps."""
    rows = {"teachers, as targets": Row("teacher", None)}
    for steps in NFE:
        rows[f"0 updates, {steps}"] = Row(f"{COARSE}:coarse", steps, "consistency", accelerated=True)
        rows |= {f"{n} updates, {steps}": Row(full_stage(n).name, steps, "consistency") for n in lengths}
        rows[f"teachers+accel, {steps}"] = Row("teacher", steps, "consistency", accelerated=True)
    return rows


def measure(study: Study, lengths: Sequence[int]) -> dict[str, Any]:
    study.teach()
    study.train(Arm(COARSE, ()))
    arms = [full_stage(n) for n in lengths]
    for arm in arms:
        study.train(arm)
    rows = rows_of(lengths)
    found = study.sample(list(rows.values()))
    images = {name: found[row.name] for name, row in rows.items()}
    controls = {name: f"0 updates, {row.num_steps or 8}" for name, row in rows.items()}
    return {
        "effects": list(study.effects),
        "scenes": {"use": study.scenes, "count": study.num_scenes},
        "seeds": [0],
        "lengths": list(lengths),
        "forwards": {arm.name: round(study.forwards(arm)) for arm in arms},
        "machine": machine(),
        "rows": judge(images, controls),
    }


def plot(rows: Sequence[Mapping[str, Any]], lengths: Sequence[int], path: Path) -> None:
    """BCR against updates, a line for each number of steps; the teachers' in 40 steps, and stacked, as levels."""
    from matplotlib.figure import Figure

    bcr = {row["row"]: row["bcr"] for row in rows}
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    for steps in NFE:
        rates = [bcr[f"{n} updates, {steps}"] for n in (0, *lengths)]
        (line,) = axes.plot([0, *lengths], rates, "o-", ms=4, label=f"one LoRA, {steps} steps")
        axes.axhline(bcr[f"teachers+accel, {steps}"], color=line.get_color(), ls=":", lw=1)
    axes.axhline(bcr["teachers, as targets"], color="0.4", lw=1, label="teachers, 40 steps")
    axes.plot([], [], ":", color="0.4", lw=1, label="teachers + acceleration LoRA")
    axes.set(xlabel="updates of the full stage", ylabel="bad-case rate", ylim=(0, None))
    axes.legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--effects", type=int, default=12)
    parser.add_argument("--lengths", type=int, nargs="*", default=list(LENGTHS))
    parser.add_argument("--scenes", choices=("tune", "judge"), default="judge")
    parser.add_argument("--num-scenes", type=int, default=12)
    parser.add_argument("--figures", type=Path)
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--set", nargs="*", default=[], metavar="key=value", help="other settings than the preset's")
    a = parser.parse_args()
    study = Study(a.run.resolve(), effect_names(a.effects), a.set, scenes=a.scenes, num_scenes=a.num_scenes)
    figures = measure(study, a.lengths)
    write_figures(a.figures, figures)
    if a.picture is not None:
        plot(figures["rows"], a.lengths, a.picture)


if __name__ == "__main__":
    main()

"""The tables of README and docs, from the results they quote: `python -m bench.lab.tables`.

A cell is a BCR and, in brackets, its paired difference to the table's control with the 95 % interval.
`tests/bench/test_tables.py` holds the documents to these lines.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "results"
Rows = Mapping[str, Mapping[str, Any]]  # by name

TABLE1 = {
    "images+accel, no distillation, the same cost": "images+accel, {}",
    "coarse+accel, no full stage": "coarse+accel, {}",
    "coarse on+accel, the same cost": "coarse on+accel, {}",
    "**collection**": "collection, {}",
    "teachers+accel, a LoRA more than effects": "teachers+accel, {}",
}
DEMO = {
    "flow matching on images, no distillation, equal cost": "joint-fm (student prompts)+accel",
    "coarse+accel, no full stage": "coarse+accel",
    "**collection**": "collection",
    "teacher+accel, 13 LoRAs": "teacher+accel",
    "one LoRA by flow matching, teachers' prompts": "joint-fm+accel",
}
RECIPES = {
    "no distillation (`coarse+accel`)": "coarse+accel, {} consistency",
    "the preset's full stage": "dmd, {} consistency",
    "8, 4 and 2 steps alike often": "dmd, step counts alike, {} consistency",
    "critic's rate 1e-3": "dmd, slow critic, {} consistency",
    "three critic updates at 1e-3": "dmd, three slow critic updates, {} consistency",
    "preset `paper`'s recipe, three times the cost": "paper 0.001, {} consistency",
    "teachers + acceleration": "teacher+accel, {} consistency",
}
DYNAMICS = {
    "none (`coarse+accel`)": "0 updates, {}",
    "150 updates, the preset's": "150 updates, {}",
    "600 updates": "600 updates, {}",
    "1,200 updates": "1200 updates, {}",
    "teachers + acceleration": "teachers+accel, {}",
}
LOW_NOISE = {
    "none (`coarse+accel`)": "preset:coarse+accel, {} consistency",
    "the preset's": "whole, {} consistency",
    "below .6 by imitation": "imitation below .6, {} consistency",
}
SERVED = {
    "a LoRA an effect, diffusers' hotswap (PEFT)": "hotswap",
    "the same, deleted and loaded": "delete_load",
    "collection, unmerged slots": "slots",
    "collection, merged, stock diffusers": "merged",
    "collection, `aoti`, one at a time": "aoti",
    "collection, `aoti`, step batches of 8": "aoti_batch8",
}
OVER = ("aoti_batch8_over", "end_to_end_aoti_batch8_over")  # how many times an arm's cost the batches' is below
ABLATION = {
    "**whole**: the preset's full stage": "whole, {} consistency",
    "no PDSR": "no PDSR, {} consistency",
    "no AOP": "no AOP, {} consistency",
    "no target simulation": "no target simulation, {} consistency",
    "TA-FM kept on at 1, as the paper has it": "TA-FM at 1, {} consistency",
    "no full stage (`coarse+accel`)": "preset:coarse+accel, {} consistency",
}


def read(name: str) -> dict[str, Any]:
    """A result."""
    found: dict[str, Any] = json.loads((RESULTS / name).read_text())
    return found


def read_rows(name: str) -> dict[str, Any]:
    """A result with its rows by name; a demo's report as well, its rows called as the others'."""
    found = read(name)
    if "rows" in found:
        return found | {"rows": {row["row"]: row for row in found["rows"]}}
    rows = {}
    for one in found["methods"]:
        method, _, steps = one["name"].partition(", ")
        rows[f"{method}, {steps.partition(' ')[0] or 8}"] = {"bcr": one["bcr"], "to_control": one["differences"]}
    return {"rows": rows}


def cell(row: Mapping[str, Any]) -> str:
    change = row["to_control"].get("bcr")
    if change is None or change["interval"] is None:
        return f"{row['bcr']:.3f}"
    low, high = change["interval"]
    if change["mean"] == low == high == 0:  # of a row that is its own control
        return f"{row['bcr']:.3f}"
    return f"{row['bcr']:.3f} ({change['mean']:+.3f}: {low:+.3f} to {high:+.3f})"


def matrix(
    rows: Rows, names: Mapping[str, str], steps: Sequence[int], more: Mapping[str, str] | None = None
) -> list[str]:
    """A line for each of `names` (what it is called: the row, with the steps in place of {}), a column for each number
    of steps. `more`: of a row, further cells."""
    lines = []
    for label, template in names.items():
        of = [rows[template.format(n) if "{}" in template else f"{template}, {n}"] for n in steps]
        cells = [cell(row) for row in of]
        lines.append(" | ".join([f"| {label}", *cells, *([more[label]] if more else [])]) + " |")
    return lines


def by_steps(rows: Rows, names: Mapping[str, str], steps: Sequence[int]) -> list[str]:
    """A line for each of `names` and number of steps, with every figure."""
    lines = []
    for n in steps:
        for label, template in names.items():
            row = rows[template.format(n)]
            reasons = ", ".join(str(row["reasons"].get(key, 0)) for key in ("wrong effect", "untouched", "too far"))
            figures = f"{row['vsa']:.2f} | {row['detail_error_db']:.2f} dB | {row['psnr']:.1f}"
            lines.append(f"| {label.partition(',')[0]} | {n} | {cell(row)} | {figures} | {reasons} |")
    return lines


def with_drift(rows: Rows, names: Mapping[str, str]) -> list[str]:
    """`matrix` with how many outputs went too far in eight steps, and their PSNR."""
    more = {}
    for label, template in names.items():
        row = rows[template.format(8)]
        more[label] = f"{row['reasons'].get('too far', 0)} | {row['psnr']:.1f}"
    return matrix(rows, names, (8, 4, 2), more)


def ablation(found: Mapping[str, Any]) -> list[str]:
    rows, general, more = found["rows"], found["general edits, 8 steps"], {}
    for label, template in ABLATION.items():
        detail = rows[template.format(4)]["detail_error_db"]
        edits = general[template.partition(", {}")[0].removesuffix("+accel")]
        more[label] = f"{detail:.2f} dB | {edits['psnr']:.1f} dB"
    return matrix(rows, ABLATION, (8, 4, 2), more)


def baselines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for each method of `bench.lab.baselines`, with what it costs."""
    lines = []
    for row in rows:
        change = ""
        if found := row["to_reference"].get("bcr"):
            change = f"{found[0]:+.3f} ({found[1][0]:+.3f} to {found[1][1]:+.3f})"
        low, high = row["bcr_interval"]
        cost = f"{row['num_loras']} | {row['storage_mb']:.1f} | {row['nfe']}"
        figures = f"{row['vsa']:.2f} | {row['detail_db']:.2f} dB | {row['psnr_truth']:.1f}"
        lines.append(f"| {row['name']} | {cost} | {row['bcr']:.3f} ({low:.2f} to {high:.2f}) | {figures} | {change} |")
    return lines


def deployment(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for each number of effects of `bench.lab.deployment`; beyond the world's there is nothing to route."""
    lines = []
    for row in rows:
        routing, right, collection = "–", "–", "–"
        if "routing_ms" in row:
            routing, right = f"{row['routing_ms']:.1f} ms", f"{row['routed_right']:.0%}"
            collection = "no router" if row["collections"] == 1 else f"{row['routed_right_collections']:.0%}"
        loads = f"{row['switches']} | {row['switches_collections']}"
        storage = f"{row['storage_gb']:.0f} | {row['storage_gb_collections']:.1f}"
        lines.append(f"| {row['effects']} | {routing} | {right} | {collection} | {loads} | {storage} |")
    return lines


def extension(found: Mapping[str, Any]) -> list[str]:
    """`bench.lab.extend`: a line for the old effects, one for each new one, and one for all of these."""
    of, (low, high) = {row["effects"]: row for row in found["rows"]}, found["old_bcr_change_interval"]
    before, after = of["old, before"], of["old, after"]
    change = f"{found['old_bcr_change']:+.3f} ({low:+.3f} to {high:+.3f})"
    colours = f"{before['psnr']:.1f} to {after['psnr']:.1f} dB"
    lines = [f"| the 50 old ones | {before['bcr']:.3f} | {after['bcr']:.3f} | {change} | {colours} | | |"]
    for name, row in found["new_bcr_by_effect"].items():
        rates = " | ".join(f"{row[key]:.2f}" for key in ("teacher", "teacher, accelerated"))
        lines.append(f"| `{name}` | | {row['after']:.2f} | | | {rates} |")
    new, *teachers = (of[name] for name in ("new, after", "new, teachers", "new, teachers, accelerated"))
    rates = " | ".join(f"{row['bcr']:.3f}" for row in teachers)
    return [*lines, f"| the new ones | | {new['bcr']:.3f} | | {new['psnr']:.1f} dB | {rates} |"]


def scaling(found: Mapping[str, Any], rows: str) -> list[str]:
    """A line for each number of effects of `bench.lab.scaling`, of those that it holds ("own") or that all hold
    ("shared"): the collection, its coarse stage, the teachers' targets."""
    of, lines = {row["row"]: row for row in found[rows]}, []
    for size in found["sizes"]:
        made = [cell(of[f"{size} effects: collection, {n}"]) for n in (8, 4, 2)]
        others = [f"{of[f'{size} effects: coarse+accel, {n}']['bcr']:.3f}" for n in (8, 4, 2)]
        teachers = f"{of[f'{size} effects: teachers, as targets']['bcr']:.3f}"
        lines.append(" | ".join([f"| {size}", *made, ", ".join(others), teachers]) + " |")
    return lines


def live_deployment(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for each number of effects of `bench.serving.deployment`."""
    lines = []
    for row in rows:
        swaps, one, many = row["router_and_swaps"], row["collection"], row["collection_at_once"]
        switches = f"{swaps['switches']} x {swaps['loading_ms']:.0f} ms | {one['switches']}"
        waits = " | ".join(f"{way['p50_ms']:.0f}, {way['p99_ms']:.0f}" for way in (swaps, one))
        rates = " | ".join(f"{way['requests_per_s']:.1f}" for way in (swaps, one, many))
        stored = " | ".join(f"{way['stored_bytes'] / 1e6:.1f}" for way in (swaps, one))
        right = f"{swaps['routing_accuracy']:.0%} in {swaps['routing_ms']:.1f} ms"
        lines.append(f"| {row['effects']} | {right} | {switches} | {waits} | {rates} | {stored} |")
    return lines


def served(found: Mapping[str, Any]) -> list[str]:
    """A line for each arm of `bench.serving.mixed_effects`: alone, what it waits at each load, and end to end."""
    lines = []
    for label, arm in SERVED.items():
        row, whole = found["saturated"][arm], found["end_to_end"].get(arm)
        over, over_whole = (found[key].get(arm, {}).get("cpu", 1.0) for key in OVER)
        waits = [at["rows"].get(arm) for at in found["paced"]]
        shown = [f"{wait['p50_ms']:.0f} / {wait['p99_ms']:.0f}" if wait else "" for wait in waits]
        ends = [f"{whole['cpu_ms']:.0f}", f"{over_whole:.2f}"] if whole else ["", ""]
        figures = [f"{row['requests_per_second']:.1f}", f"{row['cpu_ms']:.0f}", f"{over:.2f}"]
        lines.append(" | ".join([f"| {label}", *figures, *shown, *ends]) + " |")
    return lines


def tables() -> dict[tuple[str, str], list[str]]:
    """The lines of every table, by document and result."""
    twelve, imitating, fifty = (read_rows(f"lab/table1_{of}.json")["rows"] for of in ("12", "12_imitation", "50"))
    methods, sizes = read("lab/baselines.json"), read("lab/scaling.json")
    return {
        ("README.md", "lab/table1_12.json"): matrix(twelve, TABLE1, (8, 4, 2, 1)),
        ("docs/TINY_WORLD.md", "demo_12.json"): matrix(read_rows("demo_12.json")["rows"], DEMO, (8, 4, 2)),
        ("docs/TINY_WORLD.md", "lab/table1_50.json"): by_steps(fifty, TABLE1, (8, 4, 2, 1)),
        ("docs/METHOD.md", "lab/recipes.json"): with_drift(read_rows("lab/recipes.json")["rows"], RECIPES),
        ("docs/METHOD.md", "lab/dynamics.json"): with_drift(read_rows("lab/dynamics.json")["rows"], DYNAMICS),
        ("docs/METHOD.md", "lab/low_noise.json"): with_drift(read_rows("lab/low_noise.json")["rows"], LOW_NOISE),
        ("docs/METHOD.md", "lab/table1_12_imitation.json"): matrix(imitating, TABLE1, (8, 4, 2)),
        ("docs/METHOD.md", "lab/ablation.json"): ablation(read_rows("lab/ablation.json")),
        ("docs/METHOD.md", "extend.json"): extension(read("extend.json")),
        ("docs/METHOD.md", "extend_full.json"): extension(read("extend_full.json")),
        ("docs/METHOD.md", "lab/scaling.json, own"): scaling(sizes, "own"),
        ("docs/METHOD.md", "lab/scaling.json, shared"): scaling(sizes, "shared"),
        ("docs/EXPORT.md", "mixed_effects.json"): served(read("mixed_effects.json")),
        ("docs/SERVING.md", "deployment.json"): live_deployment(read("deployment.json")["rows"]),
        ("docs/EVALUATION.md", "lab/baselines.json"): baselines([*methods["one effect"], *methods["two effects"]]),
        ("docs/EVALUATION.md", "lab/deployment.json"): deployment(read("lab/deployment.json")["rows"]),
    }


def main() -> None:
    for (document, result), lines in tables().items():
        print(f"{document}, of {result}", *lines, "", sep="\n")


if __name__ == "__main__":
    main()

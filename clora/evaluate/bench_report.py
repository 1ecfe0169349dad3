"""A benchmark's report: `report.json` for machines, `report.html` to look at, made of rows and summaries.

The page has no script and asks for nothing from elsewhere; pictures are small PNG data.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from clora.data.image_grid import png_data_uri
from clora.data.images import load_image
from clora.evaluate.bench_rows import FIGURES, MethodSummary, Row, control_counts, control_faults
from clora.evaluate.bench_run import Measures
from clora.evaluate.benchmark import Benchmark
from clora.evaluate.judge import Judge
from clora.evaluate.metrics.edit_reward import FACTS as REWARD_FACTS
from clora.evaluate.metrics.flip import flip_facts
from clora.io.atomic import write_text

WORST = 24  # pictures in the gallery of bad cases
GRID_EFFECTS = 12
SIDE = 144
SOURCE_FACTS = (
    "to the source, cut and scaled to the result's size (Pillow, Lanczos), float32 sRGB in [0, 1]; L1 in [0, 1], 0 for "
    "equal pictures, lower is nearer; SSIM of brightness (Wang et al. 2004), in [-1, 1], 1 for equal pictures, higher "
    "is nearer"
)
TRUTH_FACTS = (
    "to the tiny world's truth (docs/METRICS.md), float32 sRGB in [0, 1]; PSNR of effects with one outcome, dB, at "
    "most 60, higher is nearer; detail error in dB, 0 is right"
)
COSTS = {"num_loras": "LoRAs kept", "storage_mb": "MB", "nfe": "forwards", "routed_right": "routed right"}


def write_bench_report(
    bench: Benchmark,
    rows: Sequence[Row],
    summaries: Sequence[MethodSummary],
    controls: Sequence[Row],
    judge: Judge | None,
    measures: Measures,
) -> dict[str, Any]:
    """Write both files into `output_dir` and return what the JSON holds; its `controls` are those that came out
    wrong."""
    faults = control_faults(controls)
    answer: dict[str, Any] = {
        "methods": [summary.model_dump() for summary in summaries],
        "controls": faults,
        "facts": _facts(bench, rows, controls, judge) | _measure_facts(bench, rows, measures),
    }
    write_text(bench.output_dir / "report.json", json.dumps(answer, indent=1, allow_nan=False) + "\n")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    page = environment.get_template("bench_report.html.j2").render(
        bench=bench,
        summaries=summaries,
        faults=faults,
        facts=answer["facts"],
        effects=[effect.name for effect in bench.effects],
        worst=[_card(bench.output_dir, row) for row in _worst(rows)],
        grid=_grid(bench, rows),
        methods=[summary.name for summary in summaries],
        figures={key: name for key, name in FIGURES.items() if any(key in one.figures for one in summaries)},
        costs=[key for key in COSTS if any(getattr(one, key) is not None for one in summaries)],
        cost_names=COSTS,
        judged_twice=any(one.agreement.asked for one in summaries),
    )
    write_text(bench.output_dir / "report.html", page)
    return answer


def _facts(bench: Benchmark, rows: Sequence[Row], controls: Sequence[Row], judge: Judge | None) -> dict[str, str]:
    facts = {"base": bench.base, "effects": str(len(bench.effects)), "results": str(len(rows))}
    if judge is None:
        known = "none: the tiny world's truth is known (docs/METRICS.md)"
        return facts | {"judge": known if bench.exact else "none: no verdicts"}
    models = sorted({row.judge for row in rows if row.judge})
    # Calls of this run are left out: a run that goes on must report what one that was never stopped does.
    return facts | {
        "judge": f"{judge.endpoint.model} at {judge.endpoint.shown}",
        "answers by": "; ".join(models) or "nobody",
        "prompts": "the paper's Fig. 11 and Fig. 12, pictures named in text, temperature 0",
        "controls": control_counts(controls),
    }


def _measure_facts(bench: Benchmark, rows: Sequence[Row], measures: Measures) -> dict[str, str]:
    facts = {"L1, SSIM": SOURCE_FACTS}
    if bench.exact:
        facts["PSNR, detail"] = TRUTH_FACTS
    facts |= {encoder.name: encoder.facts for encoder in measures.encoders}
    if measures.flip:
        facts["flip"] = flip_facts()
    if bench.edit_reward is not None and measures.rewards is not None:
        models, missing = sorted(measures.rewards.models), sum(row.edit_reward is None for row in rows)
        by = f"{bench.edit_reward.url}, by {', '.join(models) or 'nobody'}, {missing} missing"
        facts["EditReward"] = f"{by}; {REWARD_FACTS}"
    return facts


def _worst(rows: Sequence[Row]) -> list[Row]:
    """Bad cases, then the lowest scores; a few of each effect before more of one."""
    ranked = sorted((row for row in rows if row.score is not None and row.score < 4), key=lambda row: row.score or 0)
    seen: dict[tuple[str, str], int] = {}
    order = []
    for row in ranked:
        seen[row.method, row.effect] = seen.get((row.method, row.effect), 0) + 1
        order.append((seen[row.method, row.effect], row))
    return [row for _, row in sorted(order, key=lambda pair: pair[0])][:WORST]


def _card(root: Path, row: Row) -> dict[str, str]:
    says = f"bad {row.why}".rstrip() if row.bad else f"{row.vsa:.3g} of 5"
    what = f"{row.method} · {row.effect} · {row.key}: {says}"
    return {"what": what, "source": _small(root / row.source), "result": _small(root / row.path)}


def _grid(bench: Benchmark, rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The first result of each effect by every method."""
    lines = []
    for effect in bench.effects[:GRID_EFFECTS]:
        own = [row for row in rows if row.effect == effect.name]
        if not own:
            continue
        first = own[0]
        pictures = []
        for method in bench.methods:
            same = [row for row in own if row.method == method.name and row.key == first.key]
            pictures.append(
                {"src": _small(bench.output_dir / same[0].path), "bad": bool(same[0].bad)} if same else None
            )
        lines.append({"effect": effect.name, "source": _small(bench.output_dir / first.source), "pictures": pictures})
    return lines


def _small(path: Path) -> str:
    picture = load_image(path)
    picture.thumbnail((SIDE, SIDE))
    return png_data_uri(np.asarray(picture), scale=1)

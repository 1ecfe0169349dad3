"""The report of a run: report.json for machines, and one self-contained report.html to look at.

The page has no script and asks for nothing from elsewhere: pictures are PNG data, curves are inline SVG.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import jinja2
import numpy as np
from markupsafe import Markup
from pydantic import BaseModel, ConfigDict, Field

from clora.data.image_grid import Grid, Pixels, png_data_uri
from clora.evaluate.exact import MethodScores
from clora.evaluate.truths import Reason
from clora.io.atomic import write_text

REASONS = [reason for reason in get_args(Reason) if reason]
PALETTE = ("#c2410c", "#0f766e", "#1d4ed8", "#a16207", "#7e22ce", "#be123c", "#4d7c0f", "#475569")


class Change(BaseModel):
    """A paired difference, and its 95 % bootstrap interval (None for a single pair)."""

    model_config = ConfigDict(extra="forbid")

    mean: float
    interval: tuple[float, float] | None


class MethodRow(BaseModel):
    """One method of the comparison. Figures are None where they were not measured or are not defined."""

    model_config = ConfigDict(extra="forbid")

    name: str
    nfe: int = Field(description="network evaluations per image, guidance counted")
    num_loras: int = Field(description="LoRA files a server must hold to offer all effects")
    bcr: float = Field(description="bad-case rate in [0, 1]")
    bcr_interval: tuple[float, float] | None = Field(None, description="95 % bootstrap interval of bcr")
    vsa: float = Field(description="subject alignment in [0, 5]")
    detail_error: float | None = Field(None, description="dB: mean |10 log10| of output by output hf_ratio; 0 is right")
    l1: float | None = None
    psnr: float | None = Field(None, description="dB, deterministic effects only, as l1 and ssim")
    ssim: float | None = None
    hf_ratio: float | None = Field(None, description="high-frequency energy over the truth's, geometric mean")
    energy_distance: float | None = Field(None, description="random effects; 0 is right, 1 a single outcome")
    seconds_per_image: float | None = None
    num_outputs: int = 0
    left_out: list[tuple[str, int]] = Field(default_factory=list, description="ambiguous (effect, source) pairs")
    reasons: dict[str, int] = Field(default_factory=dict, description="bad cases by reason")
    confusions: dict[str, dict[str, int]] = Field(
        default_factory=dict, description="outputs nearest to another class, by effect and class"
    )
    effect_bcr: dict[str, float] = Field(default_factory=dict, description="bad-case rate of each effect")
    reference: str = Field("", description="the method that `differences` are to, on the same outputs")
    differences: dict[str, Change] = Field(
        default_factory=dict, description="this method's bcr, vsa and detail_error minus the reference's"
    )

    @classmethod
    def from_scores(
        cls,
        name: str,
        scores: MethodScores,
        *,
        nfe: int,
        num_loras: int,
        seconds_per_image: float | None = None,
    ) -> MethodRow:
        """A row from the figures of `clora.evaluate.exact.evaluate_outputs`."""
        return cls(
            name=name,
            nfe=nfe,
            num_loras=num_loras,
            bcr=scores.bcr,
            bcr_interval=scores.bcr_interval,
            vsa=scores.vsa,
            detail_error=scores.detail_error,
            l1=scores.l1,
            psnr=scores.psnr,
            ssim=scores.ssim,
            hf_ratio=scores.hf_ratio,
            energy_distance=scores.energy_distance,
            seconds_per_image=seconds_per_image,
            num_outputs=scores.num_outputs,
            left_out=list(scores.left_out),
            reasons=scores.reasons,
            confusions=scores.confusions,
            effect_bcr={effect: row.bcr for effect, row in scores.per_effect.items()},
            reference=scores.reference,
            differences={
                figure: Change(mean=change.mean, interval=change.interval)
                for figure, change in scores.differences.items()
            },
        )


class PhaseRow(BaseModel):
    """One phase of a run: wall-clock seconds, and the most memory in use in it (MiB)."""

    model_config = ConfigDict(extra="forbid")

    name: str
    seconds: float
    peak_memory_mb: float | None = None
    note: str = ""


class Curve(BaseModel):
    """A figure over training steps. Curves of the same `panel` are drawn in one diagram."""

    model_config = ConfigDict(extra="forbid")

    panel: str
    name: str
    steps: list[int]
    values: list[float]


class Report(BaseModel):
    """All that report.json holds. `facts` are shown as they are (device, seed, version ...)."""

    model_config = ConfigDict(extra="forbid")

    title: str
    summary: str = ""
    methods: list[MethodRow]
    phases: list[PhaseRow] = Field(default_factory=list)
    curves: list[Curve] = Field(default_factory=list)
    facts: dict[str, str] = Field(default_factory=dict)


# ---------------------------------------------------------------- curves


def _smoothed(steps: Sequence[int], values: Sequence[float], points: int = 160) -> tuple[Pixels, Pixels]:
    """Means over at most `points` equal runs of steps, so that a curve stays small and readable."""
    runs = np.array_split(np.arange(len(steps)), min(points, len(steps)))
    x, y = np.asarray(steps, np.float64), np.asarray(values, np.float64)
    return np.array([x[run].mean() for run in runs]), np.array([y[run].mean() for run in runs])


def curves_svg(curves: Sequence[Curve]) -> str:
    """One diagram of curves over steps as an inline `<svg>`, its labels text in the page's font.

    The axis is logarithmic where all values are positive and span more than a decade.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    style: Any = {"svg.fonttype": "none", "svg.hashsalt": "clora", "font.family": "sans-serif", "font.size": 9}
    with rc_context(style):
        figure = Figure(figsize=(5.2, 2.7), layout="constrained")
        axes = figure.subplots()
        low, high = math.inf, -math.inf
        for curve, color in zip(curves, PALETTE * (1 + len(curves) // len(PALETTE)), strict=False):
            if curve.steps:
                x, y = _smoothed(curve.steps, curve.values)
                low, high = min(low, float(np.nanmin(y))), max(high, float(np.nanmax(y)))
                axes.plot(x, y, color=color, linewidth=1.4, label=curve.name)
        if low > 0 and high > 10 * low:
            axes.set_yscale("log")
        axes.set_xlabel("step")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#e7e5e4", linewidth=0.6)
        if any(curve.steps for curve in curves):
            axes.legend(frameon=False, fontsize=8)
        buffer = io.StringIO()
        figure.savefig(
            buffer,
            format="svg",
            transparent=True,
            metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")),
        )
    svg = buffer.getvalue()
    return re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)


# ---------------------------------------------------------------- the table


class Measure(NamedTuple):
    """A column of the methods' table: what is best, and how a value is printed."""

    field: str
    label: str
    hint: str
    best: Literal["low", "high", "one"]
    style: str


MEASURES = (
    Measure("nfe", "NFE", "network evaluations per image", "low", "d"),
    Measure("num_loras", "LoRAs", "files held by a server to offer all effects", "low", "d"),
    Measure("bcr", "BCR", "bad-case rate: lower is better", "low", ".3f"),
    Measure("vsa", "VSA", "subject alignment, 0 to 5: higher is better", "high", ".2f"),
    Measure("detail_error", "Detail", "dB that fine detail is off by, either way: lower is better", "low", ".1f"),
    Measure(
        "hf_ratio", "HF", "high-frequency energy over the truth's, errors either way averaged: 1 is right", "one", ".2f"
    ),
    Measure("l1", "L1", "deterministic effects: lower is better", "low", ".4f"),
    Measure("psnr", "PSNR", "dB, deterministic effects: higher is better", "high", ".1f"),
    Measure("ssim", "SSIM", "deterministic effects: higher is better", "high", ".3f"),
    Measure("energy_distance", "Energy", "random effects: 0 is right, 1 a single outcome", "low", ".3f"),
    Measure("seconds_per_image", "s / image", "seconds per image", "low", ".3f"),
)


class Cell(NamedTuple):
    text: str
    best: bool = False
    note: str = ""


def _cost(value: float, best: Literal["low", "high", "one"]) -> float:
    """Smaller is better, whatever the measure; a ratio is judged by |log|."""
    if best == "one":
        return abs(math.log(max(value, 1e-9)))
    return value if best == "low" else -value


def method_table(methods: Sequence[MethodRow]) -> list[list[Cell]]:
    """Printed figures by method and by `MEASURES`; the best of each column, as printed, are marked."""
    columns = []
    for measure in MEASURES:
        values = [getattr(method, measure.field) for method in methods]
        texts = ["–" if value is None else format(value, measure.style) for value in values]
        costs = [math.inf if value is None else _cost(float(text), measure.best)
                 for value, text in zip(values, texts, strict=True)]  # fmt: skip
        least = min(costs, default=math.inf)
        marks = [least < math.inf and cost == least and len(set(costs)) > 1 for cost in costs]
        columns.append([Cell(text, mark) for text, mark in zip(texts, marks, strict=True)])
    for i, method in enumerate(methods):
        if method.bcr_interval is not None:
            low, high = method.bcr_interval
            column = columns[[measure.field for measure in MEASURES].index("bcr")]
            column[i] = column[i]._replace(note=f"{low:.2f} to {high:.2f}")
    return [list(row) for row in zip(*columns, strict=True)]


def difference_table(methods: Sequence[MethodRow]) -> tuple[str, list[str], list[tuple[str, list[Cell]]]]:
    """The references' names, the columns' labels, and (method, cells) of every method that has paired differences.

    A cell is marked where its interval leaves out 0: there the two methods differ by more than chance.
    """
    rows = [method for method in methods if method.differences]
    measures = [measure for measure in MEASURES if any(measure.field in row.differences for row in rows)]
    table = []
    for row in rows:
        cells = []
        for measure in measures:
            change = row.differences[measure.field]
            note, apart = "", False
            if change.interval is not None:
                low, high = change.interval
                note, apart = f"{low:+{measure.style}} to {high:+{measure.style}}", low > 0 or high < 0
            cells.append(Cell(f"{change.mean:+{measure.style}}", apart, note))
        table.append((row.name, cells))
    return "; ".join(dict.fromkeys(row.reference for row in rows)), [measure.label for measure in measures], table


def _shade(rate: float) -> str:
    """Background of a bad-case rate: white at 0 to a warm red at 1."""
    red, green, blue = (round(255 + rate * (end - 255)) for end in (214, 90, 60))
    return f"rgb({red},{green},{blue})"


def effect_table(methods: Sequence[MethodRow]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Rows (effect, [(printed rate, colour) per method]) of every effect's bad-case rate, the worst first."""
    names = list(dict.fromkeys(effect for method in methods for effect in method.effect_bcr))
    rates = {name: [method.effect_bcr.get(name) for method in methods] for name in names}
    names.sort(key=lambda name: -sum(rate or 0.0 for rate in rates[name]))
    return [
        (name, [("–", "#fff") if rate is None else (f"{rate:.2f}", _shade(rate)) for rate in rates[name]])
        for name in names
    ]


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


# ---------------------------------------------------------------- writing


def render_html(report: Report, grids: Sequence[Grid] = ()) -> str:
    """The page of a report."""
    folder = Path(__file__).parent
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    panels: dict[str, list[Curve]] = {}
    for curve in report.curves:
        panels.setdefault(curve.panel, []).append(curve)
    total = sum(phase.seconds for phase in report.phases)
    return environment.get_template("report.html.j2").render(
        report=report,
        measures=MEASURES,
        table=list(zip(report.methods, method_table(report.methods), strict=True)),
        differences=difference_table(report.methods),
        effects=effect_table(report.methods),
        reasons=REASONS,
        phases=[(phase, _duration(phase.seconds), phase.seconds / total if total else 0) for phase in report.phases],
        total=_duration(total),
        panels=[(title, Markup(curves_svg(curves))) for title, curves in panels.items()],
        grids=[(grid, _grid_rows(grid)) for grid in grids],
    )


def _grid_rows(grid: Grid) -> list[tuple[str, list[str | None]]]:
    rows = []
    for label, row in zip(grid.row_labels, grid.rows, strict=True):
        rows.append((label, [None if image is None else png_data_uri(image) for image in row]))
    return rows


def write_report(out_dir: Path, report: Report, images: Sequence[Grid] = ()) -> Path:
    """Write `report.json` and `report.html` into `out_dir` (made if missing); the path of the page."""
    write_text(out_dir / "report.json", report.model_dump_json(indent=1) + "\n")
    page = out_dir / "report.html"
    write_text(page, render_html(report, images))
    return page

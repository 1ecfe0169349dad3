"""A benchmark's results: one tidy row an image, and what they say of each method, with how sure that is.

A verdict that is missing is counted and never guessed: rates are over those that are there, and stand between the
bounds that they would have if all missing ones were good, or all bad.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict

from clora.evaluate.statistics import Difference, Groups, bootstrap_interval, paired_difference
from clora.io.atomic import replacing, write_text

UNTOUCHED, TRUTH = "control untouched", "control truth"  # the source as result; the template's result as result
CONTROLS_SHOULD_BE_BAD = {UNTOUCHED: True, TRUTH: False}

# Columns of a row that are numbers of their own, in the report's order, with their headings.
FIGURES = {
    "psnr_truth": "PSNR to truth, dB",
    "detail_db": "detail error, dB",
    "l1_source": "L1 to source",
    "ssim_source": "SSIM to source",
    "flip_source": "FLIP to source",
    "clip_source": "CLIP to source",
    "dino_source": "DINO to source",
    "efficientnet_source": "EfficientNet to source",
    "dreamsim_source": "DreamSim distance to source",
    "edit_reward": "EditReward",
    "seconds": "seconds",
}


class Row(BaseModel):
    """One result. `bad` and `vsa` None: missing (`why`), or for `vsa` not asked, because the result is bad.

    `vsa` is a whole number where a judge gave it; `why` also says why a result is bad where verdicts are exact. `path`
    and `source` are relative to the benchmark's `output_dir`.
    """

    model_config = ConfigDict(extra="forbid")

    method: str
    category: str
    effect: str
    key: str
    seed: int
    path: str
    source: str
    bad: bool | None = None
    vsa: int | float | None = None
    why: str = ""
    again_bad: bool | None = None  # the second answer, where one was asked for
    again_vsa: int | None = None
    judge: str = ""  # model as the server names it, and the rung
    psnr_truth: float | None = None  # where the truth is known
    detail_db: float | None = None
    l1_source: float | None = None  # distances to the source picture, at the result's size
    ssim_source: float | None = None
    clip_source: float | None = None  # cosines of embeddings of result and source
    dino_source: float | None = None
    efficientnet_source: float | None = None
    dreamsim_source: float | None = None  # a distance: 0 for equal pictures
    flip_source: float | None = None
    edit_reward: float | None = None  # the score, and the logarithm of its uncertainty
    edit_reward_log_uncertainty: float | None = None
    seconds: float | None = None

    @property
    def score(self) -> float | None:
        """Subject alignment with the gate: 0 for a bad case, None where a verdict is missing."""
        return 0.0 if self.bad else None if self.bad is None else self.vsa


class ExactVerdict(NamedTuple):
    """Of one result. `bad` None: the truth cannot be told from another effect's. `why`: the reason of a bad case.

    `psnr_truth` (dB) is of effects with one outcome, `detail_db` as `detail_error`.
    """

    bad: bool | None
    why: str
    vsa: float | None = None
    psnr_truth: float | None = None
    detail_db: float | None = None


class Agreement(BaseModel):
    """How far second answers agree with first ones: share of equal verdicts, mean gap of scores."""

    asked: int
    bad_equal: float | None
    vsa_gap: float | None


class Figure(BaseModel):
    """A mean over the results that have the figure, and its 95 % interval: None for fewer than two groups."""

    mean: float
    interval: tuple[float, float] | None


class MethodSummary(BaseModel):
    """Figures of one method. Bounds: were every missing verdict good (5), or bad (0); None where nobody was asked.

    `differences` to `reference` are of "bcr", "vsa" and `FIGURES`, over what both have.
    """

    name: str
    outputs: int
    missing: int
    bcr: float | None
    bcr_interval: tuple[float, float] | None
    bcr_bounds: tuple[float, float] | None
    vsa: float | None
    vsa_interval: tuple[float, float] | None
    vsa_bounds: tuple[float, float] | None
    figures: dict[str, Figure]
    agreement: Agreement
    num_loras: int | None = None
    storage_mb: float | None = None
    nfe: int | None = None
    routed_right: float | None = None
    reference: str = ""
    differences: dict[str, Figure] = {}
    effect_bcr: dict[str, float | None] = {}


def summarise(rows: Sequence[Row], reference: str) -> list[MethodSummary]:
    """A summary of each method, in the rows' order; differences are to `reference`, on what both were judged on."""
    names = list(dict.fromkeys(row.method for row in rows))
    base = {_pair_key(row): row for row in rows if row.method == reference}
    return [_method(name, [row for row in rows if row.method == name], reference, base) for name in names]


def _method(name: str, rows: list[Row], reference: str, base: dict[tuple[str, ...], Row]) -> MethodSummary:
    bad = [row for row in rows if row.bad is not None]
    scored = [row for row in rows if row.score is not None]
    missing_scores = len(rows) - len(scored)
    worst = sum(row.score or 0.0 for row in scored)
    best = worst + sum(5.0 for row in rows if row.score is None)
    num_bad = sum(bool(row.bad) for row in bad)
    asked = any(row.bad is not None or row.why for row in rows)  # also where every answer is missing
    differences = {}
    if name != reference:
        for figure, column in {"bcr": "bad", "vsa": "score", **{key: key for key in FIGURES}}.items():
            if (change := _difference(rows, base, column)) is not None:
                differences[figure] = Figure(mean=change.mean, interval=change.interval)
    effects = dict.fromkeys(row.effect for row in rows)
    return MethodSummary(
        name=name,
        outputs=len(rows),
        missing=missing_scores,
        bcr=num_bad / len(bad) if bad else None,
        bcr_interval=_interval(bad, "bad"),
        bcr_bounds=(num_bad / len(rows), (num_bad + len(rows) - len(bad)) / len(rows)) if asked else None,
        vsa=worst / len(scored) if scored else None,
        vsa_interval=_interval(scored, "score"),
        vsa_bounds=(worst / len(rows), best / len(rows)) if asked else None,
        figures={key: found for key in FIGURES if (found := _figure(rows, key)) is not None},
        agreement=_agreement(rows),
        reference=reference,
        differences=differences,
        effect_bcr={effect: _mean([_number(row.bad) for row in bad if row.effect == effect]) for effect in effects},
    )


def control_counts(rows: Sequence[Row]) -> str:
    """How many controls came out as they must, and how many did not or had no answer, for people."""
    right = sum(row.bad == CONTROLS_SHOULD_BE_BAD[row.method] for row in rows)
    missing = sum(row.bad is None for row in rows)
    return f"{right} as they must be, {len(rows) - right - missing} not, {missing} without an answer"


def control_faults(rows: Sequence[Row]) -> list[str]:
    """A sentence for each control whose verdict is wrong: the judge, or the order of its pictures, is not to be
    trusted then."""
    faults = []
    for row in rows:
        should = CONTROLS_SHOULD_BE_BAD[row.method]
        if row.bad is not None and row.bad != should:
            what = "an untouched source was judged good" if should else "the template's own result was judged bad"
            faults.append(f"effect {row.effect}, {row.key}: {what}")
    return faults


def _figure(rows: Sequence[Row], key: str) -> Figure | None:
    having = [row for row in rows if getattr(row, key) is not None]
    if not having:
        return None
    return Figure(mean=float(np.mean([getattr(row, key) for row in having])), interval=_interval(having, key))


def _agreement(rows: Sequence[Row]) -> Agreement:
    twice = [row for row in rows if row.again_bad is not None and row.bad is not None]
    gaps = [abs(row.vsa - row.again_vsa) for row in twice if row.vsa is not None and row.again_vsa is not None]
    return Agreement(
        asked=len(twice),
        bad_equal=_mean([float(row.bad == row.again_bad) for row in twice]),
        vsa_gap=_mean([float(gap) for gap in gaps]),
    )


def _pair_key(row: Row) -> tuple[str, ...]:
    return row.category, row.effect, row.key


def _number(value: float | bool | None) -> float | None:
    return None if value is None else float(value)


def _groups(rows: Sequence[Row], figure: str) -> Groups:
    """Values by effect and source, which are what is drawn anew; seeds of one picture stand together."""
    groups: dict[tuple[Hashable, ...], list[float]] = {}
    for row in rows:
        groups.setdefault((row.effect, (row.category, row.source)), []).append(float(getattr(row, figure)))
    return groups


def _interval(rows: Sequence[Row], figure: str) -> tuple[float, float] | None:
    groups = _groups(rows, figure)
    return bootstrap_interval(groups) if len(groups) > 1 else None


def _difference(rows: Sequence[Row], base: dict[tuple[str, ...], Row], figure: str) -> Difference | None:
    both = [(row, base[_pair_key(row)]) for row in rows if _pair_key(row) in base]
    both = [(a, b) for a, b in both if getattr(a, figure) is not None and getattr(b, figure) is not None]
    if not both:
        return None
    return paired_difference(_groups([a for a, _ in both], figure), _groups([b for _, b in both], figure))


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def write_rows(folder: Path, rows: Sequence[Row]) -> None:
    """Write `rows.csv`, and `rows.parquet` where pyarrow is installed, whole or not at all."""
    names = list(Row.model_fields)
    text = io.StringIO()
    table = csv.DictWriter(text, names, lineterminator="\n")
    table.writeheader()
    table.writerows({key: "" if value is None else value for key, value in row.model_dump().items()} for row in rows)
    write_text(folder / "rows.csv", text.getvalue())
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        return
    columns = {name: [getattr(row, name) for row in rows] for name in names}
    with replacing(folder / "rows.parquet") as file:
        pyarrow.parquet.write_table(pyarrow.table(columns, schema=_schema(pyarrow)), file)


def _schema(pyarrow: object) -> object:
    kinds = {"bad": "bool_", "again_bad": "bool_", "vsa": "float64", "again_vsa": "int64", "seed": "int64"}
    kinds |= dict.fromkeys((*FIGURES, "edit_reward_log_uncertainty"), "float64")
    fields = [(name, getattr(pyarrow, kinds.get(name, "string"))()) for name in Row.model_fields]
    return getattr(pyarrow, "schema")(fields)  # noqa: B009  (the package has no types)

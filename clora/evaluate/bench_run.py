"""Judging and measuring a benchmark's results, which lie on the disk by then: cells in, rows out."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import Tensor

from clora.data.images import cover_crop, load_image
from clora.evaluate.bench_rows import CONTROLS_SHOULD_BE_BAD, TRUTH, UNTOUCHED, ExactVerdict, Row
from clora.evaluate.benchmark import BenchEffect, Benchmark, Cell, JudgeSettings, cells
from clora.evaluate.judge import Answer, Judge, Limits
from clora.evaluate.metrics.edit_reward import RewardService
from clora.evaluate.metrics.encoders import Encoder
from clora.evaluate.metrics.flip import flip
from clora.evaluate.metrics.image import l1, ssim

Progress = Callable[[], None]
Embedded = Callable[[Encoder, Path], Tensor]


class Measures(NamedTuple):
    """What is measured of a result besides distances to its source."""

    encoders: Sequence[Encoder] = ()
    flip: bool = False
    rewards: RewardService | None = None


class Verdict(NamedTuple):
    """Both answers of one result: `alignment` None where it was not asked, because the gate said bad or nothing."""

    gate: Answer
    alignment: Answer | None


def open_judge(settings: JudgeSettings, folder: Path, rank: int = 0, world_size: int = 1) -> Judge:
    """A judge by its settings, its answers kept in `folder`: those that are there count towards its limits.

    Of `world_size` processes that judge at the same time each may spend its share of what the limits leave.
    """
    limits = Limits(settings.max_calls, settings.max_cost, settings.prompt_price, settings.answer_price)
    limits.add_kept(folder)
    return Judge(settings.endpoint, folder, limits.share(rank, world_size), settings.seed)


def control_cells(bench: Benchmark) -> list[Cell]:
    """Results whose verdict is known: sources untouched, which are bad, and each template's result, which is good."""
    count = bench.judge.controls if bench.judge else 0
    first = [cell for cell in cells(bench) if cell.method == bench.methods[0].name and cell.seed == bench.seeds[0]]
    controls = []
    for effect in bench.effects:
        own = [cell for cell in first if cell.effect == effect.name][:count]
        controls += [cell._replace(method=UNTOUCHED, path=cell.source) for cell in own]
        if count and effect.template is not None:
            source, result = effect.template
            controls.append(Cell(TRUTH, "template", effect.name, result.stem, source, bench.seeds[0], result))
    return controls


def judge_cell(judge: Judge, effect: BenchEffect, cell: Cell, repeat: int = 0) -> Verdict:
    """The gate's verdict and, for a good case, the alignment: the gate is asked once and holds for both figures."""
    assert effect.template is not None
    pair = (cell.source, cell.path)
    gate = judge.bad_case(effect.instruction, effect.criteria, effect.template, pair, repeat)
    if gate.value is not False:
        return Verdict(gate, None)
    return Verdict(gate, judge.alignment(effect.instruction, pair, repeat))


def score(
    bench: Benchmark,
    found: Sequence[Cell],
    judge: Judge | None,
    measures: Measures,
    on_done: Progress,
    seconds: dict[Path, float],
    exact: Mapping[Cell, ExactVerdict] | None = None,
    measured: Mapping[Cell, Row] | None = None,
) -> list[Row]:
    """A row for each cell, in order. Several results are judged at a time; `exact` holds verdicts that are known, and
    `measured` the rows of results that are not to be measured again."""
    effects = {effect.name: effect for effect in bench.effects}
    settings = bench.judge
    embedded = cache(_embedded)  # a source is compared with the results of every effect, method and seed

    def one(cell: Cell) -> Row:
        row = (measured or {}).get(cell)
        if row is None:
            row = _measured(cell, bench.output_dir, measures, embedded, seconds.get(cell.path))
        if measures.rewards is not None and cell.method not in CONTROLS_SHOULD_BE_BAD:
            effect = effects[cell.effect]
            asked = effect.student_prompt or effect.instruction
            found = measures.rewards.reward(asked, load_image(cell.source), load_image(cell.path))
            update = {"edit_reward": found.score, "edit_reward_log_uncertainty": found.log_uncertainty}
            row = row.model_copy(update=update)
        if exact is not None and cell in exact:
            row = row.model_copy(update=exact[cell]._asdict() | {"judge": "exact"})
        if judge is not None and settings is not None:
            effect = effects[cell.effect]
            row = with_verdict(row, judge_cell(judge, effect, cell))
            if _asked_twice(cell, settings):
                row = _with_second(row, judge_cell(judge, effect, cell, repeat=1))
        on_done()
        return row

    workers = settings.concurrency if settings is not None else 1
    with ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(one, cell) for cell in found]
        try:
            return [future.result() for future in futures]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def with_verdict(row: Row, verdict: Verdict) -> Row:
    """The row with its verdict put in."""
    gate, alignment = verdict
    last = alignment or gate
    update: dict[str, object] = {"bad": gate.value, "why": last.why if last.value is None else ""}
    if alignment is not None:
        update["vsa"] = alignment.value
    if last.value is not None:
        update["judge"] = f"{last.model or 'unnamed'}, {last.rung}"
    return row.model_copy(update=update)


def _with_second(row: Row, verdict: Verdict) -> Row:
    vsa = verdict.alignment.value if verdict.alignment else None
    return row.model_copy(update={"again_bad": verdict.gate.value, "again_vsa": vsa})


def _asked_twice(cell: Cell, settings: JudgeSettings) -> bool:
    """Whether a result is in the share that is judged again; the choice is the same in every run."""
    name = "/".join((cell.method, cell.category, cell.effect, cell.key))
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4]) < settings.repeat_share * 2**32


def _embedded(encoder: Encoder, path: Path) -> Tensor:
    return encoder.embed([load_image(path)])[0]


def _measured(cell: Cell, root: Path, measures: Measures, embedded: Embedded, seconds: float | None) -> Row:
    output = load_image(cell.path)
    source = cover_crop(load_image(cell.source), output.size)
    a, b = (np.asarray(image, np.float32) / np.float32(255) for image in (output, source))
    found = {one.name: one.compare(one.embed([output])[0], embedded(one, cell.source)) for one in measures.encoders}
    return Row(
        method=cell.method,
        category=cell.category,
        effect=cell.effect,
        key=cell.key,
        seed=cell.seed,
        path=os.path.relpath(cell.path, root),
        source=os.path.relpath(cell.source, root),
        l1_source=l1(a, b),
        ssim_source=ssim(a, b) if min(output.size) >= 11 else None,
        flip_source=flip(b, a) if measures.flip else None,
        clip_source=found.get("clip"),
        dino_source=found.get("dino"),
        efficientnet_source=found.get("efficientnet"),
        dreamsim_source=found.get("dreamsim"),
        seconds=seconds,
    )

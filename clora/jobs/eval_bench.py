"""`clora eval BENCH.yaml`: any methods on any effects: results are made, judged, measured and reported.

What is on the disk is not made or asked for again, so that an interrupted run goes on where it was; pictures that other
settings made are refused. Under torchrun each process makes, measures and judges its share; the first one writes the
tables.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image
from pydantic import TypeAdapter
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from clora.data.images import load_image
from clora.errors import InputError, raise_faults
from clora.evaluate.bench_made import Made, made_from, other_makers, png_info
from clora.evaluate.bench_methods import asked, cost_of, recipes
from clora.evaluate.bench_report import write_bench_report
from clora.evaluate.bench_rows import CONTROLS_SHOULD_BE_BAD, Row, summarise, write_rows
from clora.evaluate.bench_run import Measures, control_cells, open_judge, score
from clora.evaluate.benchmark import (
    Benchmark,
    BenchMethod,
    Cell,
    cells,
    missing_results,
    read_benchmark,
)
from clora.evaluate.exact_bench import check_scenes, exact_verdicts
from clora.evaluate.judge import Judge
from clora.evaluate.metrics.edit_reward import RewardService
from clora.evaluate.metrics.encoders import open_encoder
from clora.evaluate.metrics.flip import require_flip
from clora.inference.edit_prompts import Job
from clora.inference.editor import Editor, load_editor, swap_lora
from clora.io.atomic import replacing
from clora.training import distributed
from clora.training.device import base_dtype, pick_device

TIMEOUT_SECONDS = 3600.0
CHUNK = 16  # pictures in memory at once
ROWS = TypeAdapter(list[Row])


def is_benchmark(path: Path) -> bool:
    """Whether a YAML file is a benchmark rather than a training configuration: it has methods."""
    try:
        return any(line.startswith("methods:") for line in path.read_text("utf-8", "replace").splitlines())
    except OSError:
        return False


def evaluate_benchmark(path: Path, console: Console | None = None) -> dict[str, Any]:
    """Make, judge and measure a benchmark's results; returns what `report.json` holds.

    Raises `InputErrors` with every fault of the file, with every result that a method made elsewhere lacks, and with
    every method whose pictures are there by other settings, before a weight is loaded or a call is paid for.
    """
    console = console or Console(stderr=True)
    bench = read_benchmark(path)
    found = list(cells(bench))
    _check_methods(bench, found)
    if bench.exact:
        check_scenes(bench, found)
    if bench.flip:
        require_flip()
    with distributed.process_group(TIMEOUT_SECONDS):
        make_results(bench, _own(found), console)
        measured = _measured_by_all(bench, found, console)
        # Opened now, the judge counts what all processes were answered, and has what they left of its limits.
        # The others wait where the group ends, however long this takes.
        return _report(bench, found, measured, _open_judge(bench), console) if distributed.is_main() else {}


def benchmark_table(answer: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A line for each method, for people: rates with their intervals, what is missing, and where the pictures are."""

    def shown(value: float | None, interval: Sequence[float] | None, digits: int) -> str:
        if value is None:
            return "–"
        low_high = f" [{interval[0]:.{digits}f}, {interval[1]:.{digits}f}]" if interval else ""
        return f"{value:.{digits}f}{low_high}"

    return [
        {
            "method": one["name"],
            "results": one["outputs"],
            "missing": one["missing"],
            "bad cases": shown(one["bcr"], one["bcr_interval"], 3),
            "alignment": shown(one["vsa"], one["vsa_interval"], 2),
            "L1 to source": shown(one["figures"]["l1_source"]["mean"], None, 3),
        }
        for one in answer["methods"]
    ]


def _check_methods(bench: Benchmark, found: Sequence[Cell]) -> None:
    faults = []
    for method in bench.methods:
        own = [cell for cell in found if cell.method == method.name]
        if method.images is not None:
            faults += missing_results(bench, own)
            continue
        there = [cell for cell in own if cell.path.is_file()]
        try:
            for effect in bench.effects:
                asked(bench, method, effect.name)
            now = recipes(bench, method, [cell.effect for cell in there])  # reads LoRA files whole: only where needed
            raise_faults(other_makers(bench.output_dir / "results" / method.name, there, now))
        except InputError as error:
            faults += [f"method {method.name}: {fault}" for fault in error.faults]
    raise_faults(faults)


def make_results(bench: Benchmark, found: Sequence[Cell], console: Console) -> None:
    """Make the results of `found` that are not there yet, each written as soon as it is made."""
    todo = [cell for cell in found if not cell.path.is_file()]
    if not todo:
        return
    editor: Editor | None = None
    with _progress(console) as progress:
        task = progress.add_task("making results", total=len(found), completed=len(found) - len(todo))
        for method in bench.methods:
            own = [cell for cell in todo if cell.method == method.name]
            for lora, group in _by_lora(bench, method, own):
                # One base serves every method; only what is on it changes.
                editor = swap_lora(editor or _open(bench), bench.base, lora, method.accelerate)
                for _ in _make(bench, method, editor, group):
                    progress.advance(task)


def _by_lora(bench: Benchmark, method: BenchMethod, own: Sequence[Cell]) -> Iterator[tuple[Path, list[Cell]]]:
    files = {name: asked(bench, method, name).lora for name in {cell.effect for cell in own}}
    groups: dict[Path, list[Cell]] = {}
    for cell in own:
        groups.setdefault(files[cell.effect], []).append(cell)
    yield from groups.items()


def _open(bench: Benchmark) -> Editor:
    device = pick_device()
    return load_editor(bench.base, None, device, base_dtype("auto", device))


def _make(bench: Benchmark, method: BenchMethod, editor: Editor, group: Sequence[Cell]) -> Iterator[Cell]:
    prompts = {name: asked(bench, method, name).prompt for name in {cell.effect for cell in group}}
    by_effect = recipes(bench, method, [cell.effect for cell in group])
    sampling = editor.sampling.changed(method.steps, method.guidance)
    for start in range(0, len(group), CHUNK):
        chunk = group[start : start + CHUNK]
        sources = list(dict.fromkeys(cell.source for cell in chunk))
        images = [load_image(source) for source in sources]
        jobs = [Job(sources.index(cell.source), prompts[cell.effect], cell.seed) for cell in chunk]
        since = time.perf_counter()
        for place, picture in editor.run(images, jobs, sampling=sampling, batch_size=bench.batch_size):
            cell = chunk[place]
            _write(cell, picture, images[jobs[place].image], made_from(by_effect[cell.effect], cell))
            yield cell
        _note_seconds(bench, chunk, (time.perf_counter() - since) / len(chunk))


def _write(cell: Cell, picture: Image.Image, source: Image.Image, made: Made) -> None:
    """Source, then result with what made it: where the result is there, so is the other."""
    cell.path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(cell.source_copy) as file:
        source.save(file, "PNG")
    with replacing(cell.path) as file:
        picture.save(file, "PNG", pnginfo=png_info(made))


def _note_seconds(bench: Benchmark, made: Sequence[Cell], seconds: float) -> None:
    """Keep what each of these results took, on average: a batch has one time for all."""
    with (bench.output_dir / f"seconds-{distributed.rank()}.jsonl").open("a") as file:
        for cell in made:
            file.write(json.dumps([str(cell.path.relative_to(bench.output_dir)), round(seconds, 4)]) + "\n")


def _seconds(bench: Benchmark) -> dict[Path, float]:
    """Seconds a result, of those that were made here; the last where one was made twice."""
    found: dict[Path, float] = {}
    for path in sorted(bench.output_dir.glob("seconds-*.jsonl")):
        for line in path.read_text().splitlines():
            try:
                name, seconds = json.loads(line)
            except ValueError:  # a line that a kill cut short
                continue
            found[bench.output_dir / name] = float(seconds)
    return found


def _score(
    bench: Benchmark,
    found: Sequence[Cell],
    judge: Judge | None,
    measures: Measures,
    console: Console,
    measured: Mapping[Cell, Row],
) -> list[Row]:
    with _progress(console) as progress:
        exact = None
        if bench.exact:
            left = [cell for cell in found if cell not in measured]
            exact_task = progress.add_task("comparing with the truth", total=len(left))
            exact = exact_verdicts(bench, left, lambda: progress.advance(exact_task))
        task = progress.add_task("measuring" if judge is None else "judging", total=len(found))
        done = partial(progress.advance, task)
        return score(bench, found, judge, measures, done, _seconds(bench), exact, measured)


def _measured_by_all(bench: Benchmark, found: Sequence[Cell], console: Console) -> dict[Cell, Row]:
    """Of several processes each measures its own results and asks judge and reward service about them, whose answers
    are on the disk then; returns the rows of all. One process has nothing to share."""
    world_size = distributed.world_size()
    if world_size == 1:
        return {}
    judge = _open_judge(bench, distributed.rank(), world_size)
    rows = _score(bench, _own(found), judge, _open_measures(bench), console, {})
    texts = distributed.gather_texts(ROWS.dump_json(rows).decode())
    shares = ((found[rank::world_size], ROWS.validate_json(text)) for rank, text in enumerate(texts))
    return {cell: row for cells, rows in shares for cell, row in zip(cells, rows, strict=True)}


def _own(found: Sequence[Cell]) -> Sequence[Cell]:
    """This process's share."""
    return found[distributed.rank() :: distributed.world_size()]


def _open_rewards(bench: Benchmark) -> RewardService | None:
    settings, kept = bench.edit_reward, bench.output_dir / "edit_reward"
    if settings is None:
        return None
    return RewardService(settings.url, settings.timeout_seconds, settings.max_attempts, folder=kept)


def _open_measures(bench: Benchmark) -> Measures:
    encoders = [open_encoder(name, model) for name, model in bench.encoders.items()]
    return Measures(encoders, bench.flip, _open_rewards(bench))


def _open_judge(bench: Benchmark, rank: int = 0, world_size: int = 1) -> Judge | None:
    return None if bench.judge is None else open_judge(bench.judge, bench.output_dir / "judge", rank, world_size)


def _report(
    bench: Benchmark, found: Sequence[Cell], measured: Mapping[Cell, Row], judge: Judge | None, console: Console
) -> dict[str, Any]:
    measures = _open_measures(bench)
    rows = _score(bench, [*found, *control_cells(bench)], judge, measures, console, measured)
    own = [row for row in rows if row.method not in CONTROLS_SHOULD_BE_BAD]
    controls = [row for row in rows if row.method in CONTROLS_SHOULD_BE_BAD]
    costs = {method.name: cost_of(bench, method)._asdict() for method in bench.methods}
    summaries = [
        one.model_copy(update=costs[one.name]) for one in summarise(own, bench.reference or bench.methods[0].name)
    ]
    write_rows(bench.output_dir, rows)
    answer = write_bench_report(bench, own, summaries, controls, judge, measures)
    for fault in answer["controls"]:
        console.print(f"control: {fault}; do not trust this judge's figures", markup=False, soft_wrap=True)
    return answer


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True)

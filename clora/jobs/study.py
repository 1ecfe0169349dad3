"""`clora study`: a blind page of a benchmark's results, and the count of what people chose on it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from clora.evaluate.benchmark import read_benchmark
from clora.evaluate.study import Preference, build_study, read_answers, read_key, tally
from clora.io.output import check_output, write_output


def write_study(bench: Path, methods: Sequence[str], output: Path, num_items: int, seed: int) -> tuple[Path, Path]:
    """Write the page to `output` and its key beside it; returns both paths. `methods` empty: the first four.

    Raises `InputErrors` as `read_benchmark` and `build_study` do, and for an output that cannot be written.
    """
    key_path = output.with_suffix(".key.json")
    check_output(output)
    check_output(key_path)
    found = read_benchmark(bench)
    page, key = build_study(found, methods or [one.name for one in found.methods][:4], num_items, seed)
    write_output(output, page.encode())
    write_output(key_path, (key.model_dump_json(indent=1) + "\n").encode())
    return output, key_path


def count_study(key: Path, answers: Sequence[Path]) -> list[Preference]:
    """The preferences of all files of answers. Raises `InputError` for one that is not of this study."""
    known = read_key(key)
    return tally(known, [read_answers(path, known) for path in answers])

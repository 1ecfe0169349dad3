"""Mutation tests of the heart and of the metrics: one point of the package is changed at a time, and a test must fail.

    python -m tests.support.mutants [NAME ...]    # in a checkout of its own: files are changed, and put back

The points are in `mutants.yaml`. What survives is printed at the end, and the exit status is 1.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import yaml

ROOT = Path(__file__).resolve().parents[2]


class Mutant(NamedTuple):
    name: str
    file: str
    old: str
    new: str
    tests: str


def read_mutants() -> list[Mutant]:
    """The rows of `mutants.yaml`."""
    table = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
    return [Mutant(file=file, **row) for file, rows in table.items() for row in rows]


def survives(mutant: Mutant) -> bool:
    """Whether the tests pass with the change made; the file is put back in any case. ValueError where the text that is
    to be changed is not there once."""
    path = ROOT / mutant.file
    text = path.read_text(encoding="utf-8")
    if text.count(mutant.old) != 1:
        raise ValueError(f"{mutant.name}: {mutant.file} has its text {text.count(mutant.old)} times; mend the table")
    path.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")
    try:
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *mutant.tests.split()]
        return subprocess.run(command, cwd=ROOT, capture_output=True).returncode == 0
    finally:
        path.write_text(text, encoding="utf-8")


def main() -> int:
    wanted = sys.argv[1:]
    mutants = [mutant for mutant in read_mutants() if not wanted or mutant.name in wanted]
    survivors = []
    for mutant in mutants:
        alive = survives(mutant)
        print(f"{'SURVIVES' if alive else 'killed  '}  {mutant.file}: {mutant.name}", flush=True)
        if alive and mutant.name != "nothing":
            survivors.append(mutant.name)
    run = sum(mutant.name != "nothing" for mutant in mutants)
    print(f"{len(survivors)} of {run} survive{': ' + ', '.join(survivors) if survivors else ''}")
    return bool(survivors)


if __name__ == "__main__":
    sys.exit(main())

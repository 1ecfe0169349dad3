"""Runs the parts of `bench.gpu_plan`; `bench/gpu.sh` prepares the machine and calls it.

`python -m bench.gpu_session [first | second | PART ...] [--dry] [--plan] [--results DIR] [--seconds N]`.

A part that fails or takes longer than its limit is ended and told, and the next one runs. Where a list's time is nearly
up, parts that no longer fit are left out. Each result lies in DIR/NAME.json as soon as there is some of it;
DIR/summary.json has what ran, how long, and the bars met and missed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from bench.gpu_plan import BARS, BUDGETS, LISTS, PARTS, Part, command_line, planned_seconds
from clora.io.atomic import write_text

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "gpu"
FITS = 0.8  # of its planned seconds that must be left for a part to begin
DRY_LIMIT = 900  # seconds of a part on a CPU that others use too
TAIL = 60  # lines of its output that a part which failed shows


@dataclass(frozen=True)
class Outcome:
    """How a part ended: "ok", "failed", "over its limit"; or why it did not run: "no time left", "not installed", in
    a rehearsal "another's", which is the same at a small size."""

    part: str
    outcome: str
    seconds: float
    planned: int


def build(configure_only: bool) -> None:
    """clora._C into the tree, against the torch that this interpreter has. Raises CalledProcessError."""
    command = [sys.executable, "-m", "pybind11", "--cmakedir"]
    cmakedir = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    settings = ["-DCMAKE_BUILD_TYPE=Release", f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={cmakedir}"]
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    folder = str(BUILD / ("configured" if configure_only else "C"))
    subprocess.run(["cmake", "-S", ".", "-B", folder, *generator, *settings], cwd=ROOT, check=True)
    if not configure_only:
        subprocess.run(["cmake", "--build", folder], cwd=ROOT, check=True)
        subprocess.run(["cmake", "--install", folder, "--prefix", "."], cwd=ROOT, check=True)


def sanitize(arguments: Sequence[str]) -> int:
    """pytest under compute-sanitizer, for wrong accesses and for races; how many of the two failed."""
    failed = 0
    # Without torch's cache of memory each tensor is an allocation, whose ends are then known.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    for tool in ("memcheck", "racecheck"):
        command = ["compute-sanitizer", "--tool", tool, "--target-processes", "all", "--error-exitcode", "9"]
        command += [sys.executable, "-m", "pytest", "-q", *arguments]
        failed += subprocess.run(command, cwd=ROOT, env=environment).returncode != 0
    return failed


def end(process: subprocess.Popen[bytes]) -> None:
    """End a part and all that it started: asked first, then killed."""
    for signum in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, signum)
            process.wait(5)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue
    process.wait()


def run_part(part: Part, limit: float, results: Path, dry: bool) -> Outcome:
    """One part in a process group of its own; its output is shown when it has ended."""
    if part.needs is not None and shutil.which(part.needs) is None and not dry:
        return Outcome(part.name, "not installed", 0.0, part.seconds)
    out = results / f"{part.name}.json"
    if part.result:
        out.unlink(missing_ok=True)  # what lies there from before is not of this run
    started = time.perf_counter()
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            command_line(part, str(out), dry), cwd=ROOT, stdout=output, stderr=output, start_new_session=True
        )
        try:
            outcome = "ok" if process.wait(limit) == 0 else "failed"
        except subprocess.TimeoutExpired:
            outcome = "over its limit"
        finally:
            end(process)  # what it left behind as well
        took = time.perf_counter() - started
        show(part, outcome, took, output)
    return Outcome(part.name, outcome, round(took, 1), part.seconds)


def show(part: Part, outcome: str, took: float, output: IO[bytes]) -> None:
    output.seek(0)
    lines = output.read().decode(errors="replace").splitlines()
    print(f"== {part.name}: {outcome} after {took:.0f} s (planned {part.seconds}, at most {part.limit})")
    print("\n".join(lines[-TAIL:] if outcome != "ok" else lines[-8:]), flush=True)


def run_parts(names: Sequence[str], budget: float, results: Path, dry: bool) -> list[Outcome]:
    """All parts in order within `budget` seconds; on a CPU two at a time, for nothing is measured there."""
    results.mkdir(parents=True, exist_ok=True)
    deadline = time.perf_counter() + budget
    outcomes: list[Outcome] = []

    def run(part: Part) -> Outcome:
        if dry and not part.dry:
            return Outcome(part.name, "another's", 0.0, part.seconds)
        if dry:
            return run_part(part, DRY_LIMIT, results, dry)
        left = deadline - time.perf_counter()
        if left < FITS * part.seconds:
            return Outcome(part.name, "no time left", 0.0, part.seconds)
        return run_part(part, min(part.limit, left), results, dry)

    with ThreadPoolExecutor(2 if dry else 1) as ahead, ThreadPoolExecutor(1) as beside:
        waiting: list[Future[Outcome]] = []
        for part in (PARTS[name] for name in names):
            waiting.append((beside if part.beside else ahead).submit(run, part))
        for future in waiting:
            outcomes.append(future.result())
            write_text(results / "summary.json", json.dumps(summary(outcomes, results), indent=1) + "\n")
    return outcomes


def summary(outcomes: Sequence[Outcome], results: Path) -> dict[str, Any]:
    """What ran, and every bar whose part was to run, with its figure where there is one."""
    bars = []
    for bar in BARS:
        if bar.part not in {outcome.part for outcome in outcomes}:
            continue
        path = results / f"{bar.part}.json"
        document = json.loads(path.read_text()) if path.is_file() else {}
        on_gpu = "copy_gb_per_s" in document  # a CPU's figures are no figures of the ops
        value, met = (bar.value(document), bar.met(document)) if on_gpu else (None, None)
        limit = f"at {'most' if bar.at_most else 'least'} {bar.limit:.4g}"
        bars.append({"bar": bar.what, "limit": limit, "value": value, "met": met})
    return {"parts": [asdict(outcome) for outcome in outcomes], "bars": bars}


def report(document: dict[str, Any]) -> None:
    print(f"\n{'part':18s} {'outcome':15s} {'seconds':>8s} {'planned':>8s}")
    for part in document["parts"]:
        print("{part:18s} {outcome:15s} {seconds:8.1f} {planned:8d}".format(**part))
    for bar in document["bars"]:
        figure = "no figure" if bar["value"] is None else f"{bar['value']:.4g}"
        verdict = {True: "met", False: "MISSED", None: "not measured"}[bar["met"]]
        print(f"{verdict:13s} {bar['bar']:48s} {bar['limit']:16s} {figure}")


def print_plan(names: Sequence[str]) -> None:
    for name in names:
        part = PARTS[name]
        beside = ", beside the next ones" if part.beside else ""
        print(f"{name:18s} {part.seconds:4d} s, at most {part.limit:4d} s{beside}: {' '.join(part.command)[:90]}")
    print(f"{'in all':18s} {planned_seconds(tuple(names)):4d} s planned, one after the other")


def main() -> None:
    arguments = sys.argv[1:]
    if arguments[:1] == ["--build"]:
        build("--configure-only" in arguments)
        return
    if arguments[:1] == ["--sanitizer"]:
        sys.exit(sanitize(arguments[1:]))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="+", choices=[*LISTS, *PARTS], metavar="PART", help=", ".join([*LISTS, *PARTS]))
    parser.add_argument("--dry", action="store_true", help="rehearse at small sizes; needs no GPU")
    parser.add_argument("--plan", action="store_true", help="print the plan of seconds and stop")
    parser.add_argument("--results", type=Path, help="folder (bench/results/gpu, and build/gpu/dry with --dry)")
    parser.add_argument("--seconds", type=float, help="in all; left out: the list's own, none for named parts")
    options = parser.parse_args()
    names = list(dict.fromkeys(name for one in options.parts for name in LISTS.get(one, (one,))))
    print_plan(names)
    if options.plan:
        return
    budget = options.seconds or sum(BUDGETS.get(one, 100_000) for one in options.parts)
    results = options.results or (BUILD / "dry" if options.dry else ROOT / "bench" / "results" / "gpu")
    outcomes = run_parts(names, budget, results, options.dry)
    report(summary(outcomes, results))
    if failed := [outcome.part for outcome in outcomes if outcome.outcome in ("failed", "over its limit")]:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()

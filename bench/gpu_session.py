"""Runs the parts of `bench.gpu_plan`; `bench/gpu.sh` prepares the machine and calls it.

`python -m bench.gpu_session [first | second | PART ...] [--dry] [--plan] [--results DIR] [--seconds N]`.

A part that fails or takes longer than its limit is ended and told, and the next one runs. Where a list's time is nearly
up, parts that no longer fit are left out. A part that needs the build waits for it, and brings it along where it is not
named. Each result lies in DIR/NAME.json as soon as there is some of it; DIR/summary.json has what ran, how long, and
the bars met and missed. DIR/results.json has all of it in one file, for a machine that gives back few: the summary, and
under `parts` the result of each part that ran. DIR is $OUT where that is set, else bench/results/gpu.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from bench.gpu_plan import BARS, BUDGETS, LISTS, PARTS, Part, command_line, planned_seconds
from clora.io.atomic import write_text

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "gpu"
FITS = 0.8  # of its planned seconds that must be left for a part to begin
DRY_LIMIT = 900  # seconds of a part on a CPU that others use too
DID_NOT_RUN = ("no time left", "not installed", "another's")
TAIL = 60  # lines of its output that a part which failed shows


@dataclass(frozen=True)
class Outcome:
    """How a part ended: "ok", "failed", "over its limit"; or why it did not run, in `DID_NOT_RUN`: in a rehearsal
    "another's" is the same at a small size."""

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


def installed(name: str) -> bool:
    """Whether there is such a program, or such a package for this interpreter."""
    return shutil.which(name) is not None or importlib.util.find_spec(name) is not None


def run_part(part: Part, limit: float, results: Path, dry: bool) -> Outcome:
    """One part in a process group of its own; its output is shown when it has ended."""
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


def with_needed(names: Sequence[str]) -> list[str]:
    """The parts once each, in order, but first those that others come after."""
    needed = [PARTS[name].after for name in names]
    return list(dict.fromkeys([*filter(None, needed), *names]))


def run_parts(names: Sequence[str], budget: float, results: Path, dry: bool) -> list[Outcome]:
    """All parts in order within `budget` seconds, with those that they need; on a CPU two at a time, for nothing is
    measured there."""
    results.mkdir(parents=True, exist_ok=True)
    deadline = time.perf_counter() + budget
    outcomes: list[Outcome] = []
    waiting: dict[str, Future[Outcome]] = {}

    def run(part: Part) -> Outcome:
        if dry and not part.dry:
            return Outcome(part.name, "another's", 0.0, part.seconds)
        if not dry and not all(map(installed, part.needs)):
            return Outcome(part.name, "not installed", 0.0, part.seconds)
        if part.after is not None:
            wait([waiting[part.after]])  # a build that failed may have left the one of before
        if dry:
            return run_part(part, DRY_LIMIT, results, dry)
        left = deadline - time.perf_counter()
        if left < FITS * part.seconds:
            return Outcome(part.name, "no time left", 0.0, part.seconds)
        return run_part(part, min(part.limit, left), results, dry)

    with ThreadPoolExecutor(2 if dry else 1) as ahead, ThreadPoolExecutor(1) as beside:
        for part in (PARTS[name] for name in with_needed(names)):
            waiting[part.name] = (beside if part.beside else ahead).submit(run, part)
        for _ in as_completed(waiting.values()):
            outcomes = [future.result() for future in waiting.values() if future.done()]
            write_summary(outcomes, results)
    return outcomes


def documents(outcomes: Sequence[Outcome], results: Path) -> dict[str, Any]:
    """What the parts that ran have written, by name."""
    paths = {one.part: results / f"{one.part}.json" for one in outcomes if one.outcome not in DID_NOT_RUN}
    return {name: json.loads(path.read_text()) for name, path in paths.items() if path.is_file()}


def write_summary(outcomes: Sequence[Outcome], results: Path) -> None:
    """The summary so far, alone and with every result."""
    told = summary(outcomes, results)
    together = {"summary": told, "parts": documents(outcomes, results)}
    for name, document in (("summary", told), ("results", together)):
        write_text(results / f"{name}.json", json.dumps(document, indent=1) + "\n")


def summary(outcomes: Sequence[Outcome], results: Path) -> dict[str, Any]:
    """What ran, and every bar whose part was to run, with its figure where there is one."""
    bars, found = [], documents(outcomes, results)
    for bar in BARS:
        if bar.part not in {outcome.part for outcome in outcomes}:
            continue
        document = found.get(bar.part, {})
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
        when = ", beside the next ones" if part.beside else f", after {part.after}" if part.after else ""
        print(f"{name:18s} {part.seconds:4d} s, at most {part.limit:4d} s{when}: {' '.join(part.command)[:90]}")
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
    parser.add_argument("--results", type=Path, help="folder ($OUT or bench/results/gpu, and build/gpu/dry with --dry)")
    parser.add_argument("--seconds", type=float, help="in all; left out: the list's own, none for named parts")
    options = parser.parse_args()
    names = with_needed([name for one in options.parts for name in LISTS.get(one, (one,))])
    print_plan(names)
    if options.plan:
        return
    budget = options.seconds or sum(BUDGETS.get(one, 100_000) for one in options.parts)
    usual = BUILD / "dry" if options.dry else ROOT / (os.environ.get("OUT") or "bench/results/gpu")
    results = options.results or usual
    outcomes = run_parts(names, budget, results, options.dry)
    report(summary(outcomes, results))
    if failed := [outcome.part for outcome in outcomes if outcome.outcome in ("failed", "over its limit")]:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()

"""The quarter of an hour on a GPU: its plan, its bars, and that no part holds up the next. CI rehearses both lists."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from bench import gpu_session
from bench.gpu_plan import BARS, BUDGETS, LISTS, PARTS, Part, command_line, planned_seconds
from bench.gpu_session import run_part, run_parts, summary
from bench.kernels import forward, lora_linear
from bench.kernels.timing import Case, chosen
from bench.serving import tensorrt
from bench.training.cycle_models import SIZES

ROOT = Path(__file__).resolve().parents[2]


def test_the_first_list_fits_into_seven_minutes() -> None:
    assert planned_seconds(LISTS["first"]) <= BUDGETS["first"] == 7 * 60
    wanted = {"tests", "lora_linear", "block", "forward", "train_cycle", "renoise", "adaln"}
    assert wanted <= set(LISTS["first"])
    assert not set(LISTS["first"]) & set(LISTS["second"]) - {"build"}
    assert {*LISTS["first"], *LISTS["second"]} == set(PARTS)
    assert all(part.seconds < part.limit for part in PARTS.values())


@pytest.mark.parametrize("part", PARTS.values(), ids=lambda part: part.name)
def test_parts_name_modules_and_sizes_that_there_are(part: Part) -> None:
    sizes = {"bench.kernels.forward": forward.SIZES, "bench.training.train_cycle": SIZES}
    for module, *arguments in filter(None, (part.command, part.dry)):
        assert module == "pytest" or (ROOT / f"{module.replace('.', '/')}.py").is_file()
        if "--size" in arguments:
            assert arguments[arguments.index("--size") + 1] in sizes.get(module, ("small", "full"))
        assert not [a for a in arguments if a.startswith("tests/") and not (ROOT / a.partition("::")[0]).exists()]
    assert part.dry or part.name in ("forward_60", "train_cycle_20", "train_cycle_60", "sanitizer")


@cache
def own_imports(name: str) -> tuple[str, ...]:
    """What a module of ours imports as it is imported; nothing for one of others."""
    path = ROOT / name.replace(".", "/")
    source = path.with_suffix(".py") if path.with_suffix(".py").is_file() else path / "__init__.py"
    found: list[str] = []
    for node in ast.parse(source.read_text(encoding="utf-8")).body if source.is_file() else ():
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return tuple(found)


def imported_at_once(name: str) -> set[str]:
    """The names that a module imports as it is imported, itself or by what it imports, and the module's own."""
    seen: set[str] = set()
    ahead = [name]
    while ahead:
        parts = ahead.pop().split(".")
        for whole in {".".join(parts[: n + 1]) for n in range(len(parts))} - seen:
            seen.add(whole)
            ahead += own_imports(whole)
    return seen


def modules_of(part: Part) -> set[str]:
    """The module that a part runs, and the test modules that it collects."""
    module, *arguments = part.command
    places = {ROOT / one.partition("::")[0] for one in arguments if one.startswith("tests/")}
    files = {file for place in places for file in ([place] if place.is_file() else place.rglob("test_*.py"))}
    return {module} | {".".join(file.relative_to(ROOT).with_suffix("").parts) for file in files}


def test_what_imports_the_extension_waits_for_its_build() -> None:
    needing = {
        name for name, part in PARTS.items() if any("clora._C" in imported_at_once(one) for one in modules_of(part))
    }
    assert {"sampler", "tensorrt", "tests_all"} <= needing and "forward" not in needing
    assert needing == {name for name, part in PARTS.items() if part.after == "build"}
    assert {part.after for part in PARTS.values()} == {None, "build"}


def full_size_names() -> list[str]:
    """The names of lora_linear's cases at full size, from those at a small one."""
    names = [case.name for case in lora_linear.all_cases("cpu", "small")]
    found = []
    for K, N in lora_linear.WIDTHS:
        found += [re.sub(r"384->384 r16 (\d)x256", rf"{K}->{N} r128 \1x8192", name) for name in names]
    return found


def document_of(part: str, us: float) -> dict[str, Any]:
    """A result in which ours takes `us` microseconds, everything else 100, with the shares that follow."""
    names = {
        "lora_linear": full_size_names(),
        "block": [
            "3072 wide, 8192+512 tokens, rank 128 forward",
            "3072 wide, 8192+512 tokens, rank 128 forward and backward",
        ],
        "forward": ["20 layers, 3072 wide, 8704 tokens, rank 128", "20 layers, 3072 wide, 8704 tokens, merged"],
        "forward_60": ["60 layers, 3072 wide, 8704 tokens, merged"],
    }.get(part.removesuffix("_mixed"), ["any"])
    rows = []
    for name in names:
        ours = us if "slots 0,0,0" not in name else 100
        times = {way: {"median_us": 100} for way in ("gemm", "eager", "compiled")} | {"ours": {"median_us": ours}}
        rows.append({"case": name, "share_of_copy": 80 / ours, **times})
    return {"copy_gb_per_s": 4300, "rows": rows}


@pytest.mark.parametrize("bar", BARS, ids=lambda bar: bar.what)
def test_bars_are_met_by_a_fast_result_and_missed_by_a_slow_one(bar: Any) -> None:
    fast, slow = (document_of(bar.part, us) for us in (50.0, 1e6))
    assert bar.met(fast) is True and bar.met(slow) is False
    assert bar.met({"copy_gb_per_s": 4300, "rows": []}) is None
    if "over the bare product" in bar.what:
        assert bar.value(document_of(bar.part, 105.0)) == pytest.approx(1.05)


def test_bars_are_those_of_the_documentation() -> None:
    text = (ROOT / "docs" / "BENCHMARKS.md").read_text(encoding="utf-8")
    table = text[text.index("What a GPU must show") : text.index("## Kernels, compiled")]
    table = re.sub(r"\(PEFT: [^)]*\)", "", table).replace("85 %", "0.85")
    told = {float(number) for number in re.findall(r"\d\.\d+", table)}
    assert {bar.limit for bar in BARS if bar.part != "forward"} == told  # forward's is a third of forward_60's


def python(code: str, limit: int = 60, result: bool = False) -> Part:
    return Part("one", ("x",), 1, limit, ("timeit", "-n", "1", "-r", "1", code), result=result)


def test_run_part_ends_what_takes_too_long_with_all_that_it_started(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    child = (
        "import subprocess, time; p = subprocess.Popen(['sleep', '100']); "
        f"open({str(pid)!r}, 'w').write(str(p.pid)); time.sleep(100)"
    )
    started = time.monotonic()
    outcome = run_part(python(child), 5, tmp_path, dry=True)
    assert outcome.outcome == "over its limit" and time.monotonic() - started < 20
    with pytest.raises(ProcessLookupError):
        for _ in range(50):  # until the orphan is gone
            os.kill(int(pid.read_text()), signal.SIGCONT)
            time.sleep(0.1)


def test_run_parts_goes_on_after_a_failure_and_keeps_what_was_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    keeps = (
        "import sys, pathlib; pathlib.Path(sys.argv[sys.argv.index('--out') + 1]).write_text('{}'); raise SystemExit(3)"
    )
    monkeypatch.setattr(
        gpu_session, "command_line", lambda part, out, dry: [part.command[0], "-c", part.command[1], "--out", out]
    )
    python_path = command_line(PARTS["tests"], None, True)[0]
    fakes = {
        "bad": Part("bad", (python_path, keeps), 1, 60, ()),
        "good": Part("good", (python_path, "print('fine')"), 1, 60, ()),
        "long": Part("long", (python_path, "pass"), 1000, 2000, ()),
    }
    monkeypatch.setattr(gpu_session, "PARTS", fakes)
    outcomes = run_parts(list(fakes), 100, tmp_path / "results", dry=False)
    assert [one.outcome for one in outcomes] == ["failed", "ok", "no time left"]
    assert (tmp_path / "results" / "bad.json").read_text() == "{}"
    written = json.loads((tmp_path / "results" / "summary.json").read_text())
    assert [part["part"] for part in written["parts"]] == list(fakes) and written["bars"] == []
    assert "fine" in capsys.readouterr().out


def code(name: str, text: str, **fields: Any) -> Part:
    """A part of its own code, whose argument is the folder of results."""
    return Part(name, (text,), 1, 60, (text,), **fields)


@pytest.fixture
def fake_parts(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Part]]:
    """The session's parts, to be filled; their commands are code."""
    parts: dict[str, Part] = {}

    def line(part: Part, out: str, dry: bool) -> list[str]:
        return [sys.executable, "-c", part.command[0], str(Path(out).parent)]

    monkeypatch.setattr(gpu_session, "PARTS", parts)
    monkeypatch.setattr(gpu_session, "command_line", line)
    yield parts


MAKES = "import pathlib, sys, time; time.sleep(1); pathlib.Path(sys.argv[1], 'made').touch()"
USES = "import pathlib, sys; assert pathlib.Path(sys.argv[1], 'made').exists()"


@pytest.mark.parametrize("dry", [False, True])
@pytest.mark.parametrize("names", [["uses"], ["other", "uses", "makes"], ["makes", "uses"]])
def test_run_parts_waits_for_what_a_part_comes_after(
    tmp_path: Path, fake_parts: dict[str, Part], names: list[str], dry: bool
) -> None:
    makes = code("makes", MAKES, result=False, beside=True)
    others = (code("uses", USES, after="makes"), code("other", "pass"))
    fake_parts |= {part.name: part for part in (makes, *others)}
    outcomes = run_parts(names, 100, tmp_path, dry)
    assert [one.part for one in outcomes] == ["makes", *(name for name in names if name != "makes")]
    assert {one.outcome for one in outcomes} == {"ok"}


def test_a_part_runs_after_a_build_that_failed_and_not_where_the_wait_took_its_time(
    tmp_path: Path, fake_parts: dict[str, Part]
) -> None:
    makes = code("makes", MAKES + "; raise SystemExit(1)", result=False, beside=True)
    fake_parts |= {"makes": makes, "uses": code("uses", USES, after="makes")}
    assert [one.outcome for one in run_parts(["uses"], 100, tmp_path, False)] == ["failed", "ok"]
    assert [one.outcome for one in run_parts(["uses"], 1.5, tmp_path, False)][1] == "no time left"


def test_a_part_is_left_out_where_a_package_is_missing_and_waits_for_nothing(
    tmp_path: Path, fake_parts: dict[str, Part]
) -> None:
    fake_parts |= {
        "there": code("there", "pass", needs=("json", "sh")),
        "gone": code("gone", "pass", needs=("json", "no_such_package_or_program")),
    }
    outcomes = run_parts(list(fake_parts), 100, tmp_path, False)
    assert [one.outcome for one in outcomes] == ["ok", "not installed"]
    assert {one.outcome for one in run_parts(["gone"], 100, tmp_path, True)} == {"ok"}  # a rehearsal is not measured
    assert PARTS["tensorrt"].needs == ("tensorrt", "onnx", "onnxscript")


def test_one_file_holds_every_result_of_this_run(tmp_path: Path, fake_parts: dict[str, Part]) -> None:
    writes = "import pathlib, sys; pathlib.Path(sys.argv[1], '{}.json').write_text('[{}]')"
    fake_parts |= {
        "first": code("first", writes.format("first", 1)),
        "failed": code("failed", writes.format("failed", 2) + "; raise SystemExit(1)"),
        "silent": code("silent", "pass"),
        "gone": code("gone", "pass", needs=("no_such_package_or_program",)),
    }
    for stale in ("silent", "gone"):  # what lies there from before
        (tmp_path / f"{stale}.json").write_text("[0]")
    run_parts(list(fake_parts), 100, tmp_path, False)
    together = json.loads((tmp_path / "results.json").read_text())
    assert together["parts"] == {"first": [1], "failed": [2]}
    assert together["summary"] == json.loads((tmp_path / "summary.json").read_text())
    assert [part["part"] for part in together["summary"]["parts"]] == list(fake_parts)


@pytest.mark.parametrize(
    ("out", "arguments", "folder"),
    [
        (None, [], ROOT / "bench/results/gpu"),
        ("", [], ROOT / "bench/results/gpu"),
        ("/else/where", [], Path("/else/where")),
        ("/else/where", ["--results", "/here"], Path("/here")),
        ("/else/where", ["--dry"], ROOT / "build/gpu/dry"),
    ],
)
def test_results_lie_in_out_where_it_is_set(
    monkeypatch: pytest.MonkeyPatch, out: str | None, arguments: list[str], folder: Path
) -> None:
    monkeypatch.delenv("OUT", raising=False)
    if out is not None:
        monkeypatch.setenv("OUT", out)
    asked: list[tuple[Any, ...]] = []
    monkeypatch.setattr(gpu_session, "run_parts", lambda *given: asked.append(given) or [])
    monkeypatch.setattr("sys.argv", ["gpu_session", "sampler", *arguments])
    gpu_session.main()
    assert [(names, results) for names, _, results, _ in asked] == [(["build", "sampler"], folder)]


def test_the_engine_is_looked_for_before_eight_bits_are_simulated_and_each_phase_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "tensorrt.json"
    before: list[Any] = []

    def cost(size: str, precision: str) -> dict[str, Any]:
        before.append(json.loads(out.read_text()))
        return {"kept": precision}

    def nothing(options: Any) -> None:
        raise tensorrt.InputError("no such library")

    monkeypatch.setattr(tensorrt, "eight_bits_cost", cost)
    monkeypatch.setattr(tensorrt, "check_engine", nothing)
    monkeypatch.setattr(tensorrt.onnx_graph, "check_onnx", lambda: None)
    monkeypatch.setattr("sys.argv", ["tensorrt", "--out", str(out)])
    tensorrt.main()
    why = {"size": "small", "why_none": "no such library"}
    assert before == [why, why | {"simulated": {"fp8": {"kept": "fp8"}}}]
    assert json.loads(out.read_text())["simulated"] == {name: {"kept": name} for name in ("fp8", "int8")}


@pytest.mark.parametrize(("spare", "fits"), [(0, True), (-1, False)])
def test_wheels_must_fit_beside_what_git_tracks(tmp_path: Path, spare: int, fits: bool) -> None:
    """With stand-ins for git, which lists one file and one that is gone, and for pip, which fetches zeros."""
    for name in ("bench/gpu_wheels.sh", "requirements/cpu.lock"):
        (tmp_path / name).parent.mkdir()
        shutil.copy(ROOT / name, tmp_path / name)
    tracked, wheels = 30 << 20, (34 << 20) - spare
    with open(tmp_path / "a file", "wb") as file:
        file.truncate(tracked)
    fake_git, fake_python = tmp_path / "bin" / "git", tmp_path / "bin" / "python"
    fake_git.parent.mkdir()
    fake_git.write_text("#!/bin/sh\nprintf 'a file\\0gone\\0'\n")
    fetch = f"mkdir .wheels && truncate -s {wheels} .wheels/one.whl"
    fake_python.write_text(f'#!/bin/sh\nif [ "$1" = -m ]; then {fetch}; else exec {sys.executable} "$@"; fi\n')
    for program in (fake_git, fake_python):
        program.chmod(0o755)
    environment = os.environ | {"PATH": f"{fake_git.parent}:{os.environ['PATH']}", "PYTHON": str(fake_python)}
    script = [shutil.which("bash") or "bash", str(tmp_path / "bench" / "gpu_wheels.sh")]
    done = subprocess.run(script, env=environment, capture_output=True, text=True)
    assert (done.returncode == 0) is fits, done.stdout + done.stderr
    assert fits or "1 bytes too many" in done.stderr


def test_summary_judges_no_figure_of_a_cpu(tmp_path: Path) -> None:
    outcome = gpu_session.Outcome("block", "ok", 1.0, 1)
    document = document_of("block", 1e6)
    for on_gpu, met in ((True, False), (False, None)):
        if not on_gpu:
            del document["copy_gb_per_s"]
        (tmp_path / "block.json").write_text(json.dumps(document))
        assert [bar["met"] for bar in summary([outcome], tmp_path)["bars"]] == [met, met]


def test_chosen_keeps_ours_and_the_ways_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    cases = [
        Case(name, lambda: None, dict.fromkeys(("ours", "eager", "compiled"), lambda: None), 1, 1)
        for name in ("a 1", "b 2")
    ]
    assert [list(case.variants) for case in chosen(cases, "b", ["compiled"])] == [["ours", "compiled"]]
    assert chosen(cases, "", None) == cases

"""The quarter of an hour on a GPU: its plan, its bars, and that no part holds up the next. CI rehearses both lists."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from bench import gpu_session
from bench.gpu_plan import BARS, BUDGETS, LISTS, PARTS, Part, command_line, planned_seconds
from bench.gpu_session import run_part, run_parts, summary
from bench.kernels import forward, lora_linear
from bench.kernels.timing import Case, chosen
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

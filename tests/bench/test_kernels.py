"""The benches of the Triton ops where there is no GPU: every case is right and runs, and its row says so."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from bench.kernels import adaln, dmd_score, lora_linear, lora_qkv, renoise
from bench.kernels.timing import ON_CPU, Case, measure

# Of torch.compile, which each bench asks for and none of these tests runs.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")


@pytest.mark.parametrize("bench", [adaln, dmd_score, lora_linear, lora_qkv, renoise], ids=lambda bench: bench.__name__)
def test_all_cases_run_on_a_cpu(bench: ModuleType) -> None:
    cases = bench.all_cases("cpu", "small")
    assert len({case.name for case in cases}) == len(cases)
    for case in cases:
        case.gate()
        assert min(case.bytes, case.flops) > 0
        for way in ON_CPU:
            case.variants[way]()


def test_measure_compares_ours_with_eager_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    ran: list[str] = []
    variants = {way: lambda way=way: ran.append(way) for way in ("ours", "compiled", "eager")}
    (row,) = measure("bench", [Case("case", lambda: ran.append("gate"), variants, 12, 34)], 2)["rows"]
    assert ran == ["gate", *["ours", "eager"] * 5]  # three rounds to warm up
    assert row["bytes"] == 12 and row["flops"] == 34
    assert row["eager_over_ours"] == round(row["eager"]["median_us"] / row["ours"]["median_us"], 2)


def test_measure_stops_where_a_result_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def gate() -> None:
        raise AssertionError("y: error 1")

    with pytest.raises(AssertionError, match="y: error 1"):
        measure("bench", [Case("case", gate, {}, 1, 1)], 1)

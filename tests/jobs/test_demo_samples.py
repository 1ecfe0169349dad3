"""Which methods a demo samples, in which step counts, and in which order they stand."""

from __future__ import annotations

from typing import Any

from clora.config.load import build_config
from clora.evaluate.baselines import ACCELERATION, COARSE, methods
from clora.inference.sampling import Sampling
from clora.jobs.demo_samples import in_every_count, table_order


def test_in_every_count_samples_each_method_in_each_step_count() -> None:
    class Bank:
        def slots_for(self, effects: list[str]) -> list[str]:
            return effects

    bank: Any = Bank()
    schedule = {"num_steps": 8, "step_counts": [8, 4, 2]}
    config = build_config({"preset": "tiny", "base": "tiny", "output_dir": ".", "schedule": schedule})
    found = {m.name: m for m in in_every_count(config, lambda c: methods(c, bank, [ACCELERATION, COARSE]))}
    assert {name: method.nfe for name, method in found.items()} == {
        "teacher-40": 40, "teacher-8": 8, "teacher+accel": 8, "coarse+accel": 8, "collection": 8,
        "teacher-4": 4, "teacher+accel, 4 steps": 4, "coarse+accel, 4 steps": 4, "collection, 4 steps": 4,
        "teacher-2": 2, "teacher+accel, 2 steps": 2, "coarse+accel, 2 steps": 2, "collection, 2 steps": 2,
    }  # fmt: skip
    assert found["collection, 2 steps"].sampling == Sampling("consistency", 2, 3.0)
    order = list(found)
    assert table_order({name: found[name].nfe for name in reversed(order)}) == order

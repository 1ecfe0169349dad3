"""How alike are the effects that share a collection? `python -m bench.lab.groups [--json]`.

The tiny world's effects split into 2, 3 and 4 groups by `clora.jobs.plan_groups.spread`, against their own order and
against putting similar ones together: the greatest similarity inside a group, its mean over the effects of the most
similar partner each has there, and how many pairs inside are nearly the same. By student prompts, by teacher prompts,
and by both, which is what is spread.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import numpy as np

from clora.jobs.plan_groups import Matrix, spread, text_similarity
from clora.tiny.dataset import effect_names
from clora.tiny.effects import EFFECTS

NEARLY = 0.9


def in_order(num_effects: int, num_groups: int) -> list[list[int]]:
    return [part.tolist() for part in np.array_split(np.arange(num_effects), num_groups)]


def inside(similarity: Matrix, groups: list[list[int]]) -> dict[str, float]:
    """Figures of one way to group, over the pairs inside groups."""
    blocks = [similarity[np.ix_(group, group)] for group in groups]
    partners = np.concatenate([block.max(axis=1) for block in blocks])
    return {
        "max": round(float(partners.max()), 3),
        "mean_closest": round(float(partners.mean()), 3),
        "pairs_nearly_the_same": int(sum((block >= NEARLY).sum() for block in blocks) // 2),
    }


def measure() -> dict[str, Any]:
    names = effect_names(len(EFFECTS))
    student = text_similarity([EFFECTS[name].student_prompt for name in names])
    teacher = text_similarity([EFFECTS[name].prompt for name in names])
    both = np.maximum(student, teacher)
    measures = {"student prompts": student, "teacher prompts": teacher, "both": both}
    for matrix in measures.values():
        np.fill_diagonal(matrix, 0.0)
    rows = []
    for count in (1, 2, 3, 4):
        ways = {"in order": in_order(len(names), count)}
        if count > 1:
            ways |= {"together": spread(1 - both, count), "apart": spread(both, count)}
        rows += [
            {"groups": count, "way": way, "by": by, **inside(matrix, groups)}
            for way, groups in ways.items()
            for by, matrix in measures.items()
        ]
    return {"effects": len(names), "nearly": NEARLY, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout instead of a table")
    figures = measure()
    if parser.parse_args().json:
        print(json.dumps(figures, indent=1))
        return
    for row in figures["rows"]:
        print(
            "{groups} groups, {way:9s} by {by:16s} max {max:.2f}  mean of the closest {mean_closest:.2f}"
            "  pairs nearly the same {pairs_nearly_the_same}".format(**row)
        )


if __name__ == "__main__":
    main()

"""Intervals of means, and of differences between two methods that made the same outputs."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

Groups = Mapping[tuple[Hashable, ...], Sequence[float]]
"""Outputs' values, a group for each level of one factor or combination of several: of an (effect, source)."""


def bootstrap_interval(
    groups: Groups, seed: int = 0, num_resamples: int = 2000, level: float = 0.95
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean over all values, the levels of every factor drawn with replacement.

    An effect drawn twice counts twice with all its sources, and a source with all its effects: outputs of one effect,
    or of one source, are not independent (the crossed bootstrap of Owen, Annals of Applied Statistics 1, 2007). It is
    not too narrow where there are many levels, still too narrow of a handful. A factor of one level is not drawn.
    Values of a group are drawn together, for they differ by seed alone; a group of many counts for as many.
    """
    rng = np.random.default_rng(seed)
    sums = np.array([np.sum(group) for group in groups.values()], dtype=np.float64)
    counts = np.array([len(group) for group in groups.values()], dtype=np.float64)
    weights = np.ones((num_resamples, len(groups)))
    for levels in zip(*groups, strict=True):
        place = {one: index for index, one in enumerate(dict.fromkeys(levels))}
        drawn = rng.multinomial(len(place), np.full(len(place), 1 / len(place)), num_resamples)
        weights *= drawn[:, [place[one] for one in levels]]
    totals = weights @ counts
    some = totals > 0  # where not all combinations are there, a draw may hold none
    low, high = np.quantile((weights @ sums)[some] / totals[some], [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


class Difference(NamedTuple):
    """A mean difference, and its interval: None where there are fewer than two groups, which say nothing of it."""

    mean: float
    interval: tuple[float, float] | None


def paired_difference(ours: Groups, reference: Groups, seed: int = 0, num_resamples: int = 2000) -> Difference:
    """The mean over outputs of ours minus the reference's, and its 95 % bootstrap interval.

    Group by group and output by output the two are of the same effect, source and noise, so that what makes one hard
    cancels: the interval is narrower than those of the two means suggest. Methods that are equal give exactly
    0 and (0, 0). Raises ValueError when there is no output, or the groups differ in name or length.
    """
    if {key: len(group) for key, group in ours.items()} != {key: len(group) for key, group in reference.items()}:
        raise ValueError("a paired difference needs as many outputs of every pair from both methods")
    gaps = {
        key: np.subtract(group, reference[key], dtype=np.float64).tolist() for key, group in ours.items() if len(group)
    }
    if not gaps:
        raise ValueError("a paired difference needs at least one output")
    mean = float(np.mean([gap for group in gaps.values() for gap in group]))
    return Difference(mean, bootstrap_interval(gaps, seed, num_resamples) if len(gaps) > 1 else None)

"""Intervals of means, and of differences between two methods that made the same outputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

Groups = Sequence[Sequence[float]]  # the outputs' values, a group a pair (effect, source)


def bootstrap_interval(
    groups: Groups, seed: int = 0, num_resamples: int = 2000, level: float = 0.95
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean over all values, whole groups drawn with replacement.

    The outputs of a pair differ by seed alone and are not independent, so a pair is one group; a group of many
    values counts for as many.
    """
    sums = np.array([np.sum(group) for group in groups], dtype=np.float64)
    counts = np.array([len(group) for group in groups], dtype=np.float64)
    picks = np.random.default_rng(seed).integers(0, len(groups), (num_resamples, len(groups)))
    means = sums[picks].sum(axis=1) / counts[picks].sum(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


class Difference(NamedTuple):
    """A mean difference, and its interval: None where there are fewer than two groups, which say nothing of it."""

    mean: float
    interval: tuple[float, float] | None


def paired_difference(ours: Groups, reference: Groups, seed: int = 0, num_resamples: int = 2000) -> Difference:
    """The mean over outputs of ours minus the reference's, and its 95 % bootstrap interval over whole groups.

    Group by group and output by output the two are of the same pair and noise, so that what makes a pair hard
    cancels: the interval is narrower than those of the two means suggest. Methods that are equal give exactly
    0 and (0, 0). Raises ValueError when there is no output, or the groups differ in number or length.
    """
    if [len(group) for group in ours] != [len(group) for group in reference]:
        raise ValueError("a paired difference needs as many outputs of every pair from both methods")
    gaps = [np.subtract(a, b, dtype=np.float64).tolist() for a, b in zip(ours, reference, strict=True) if len(a)]
    if not gaps:
        raise ValueError("a paired difference needs at least one output")
    mean = float(np.mean([gap for group in gaps for gap in group]))
    return Difference(mean, bootstrap_interval(gaps, seed, num_resamples) if len(gaps) > 1 else None)

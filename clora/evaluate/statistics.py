"""Intervals."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def bootstrap_interval(
    groups: Sequence[Sequence[float]], seed: int = 0, num_resamples: int = 2000, level: float = 0.95
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean over all values, whole groups drawn with replacement.

    The outputs of a pair differ by seed alone and are not independent, so a pair is one group.
    """
    sums = np.array([np.sum(group) for group in groups], dtype=np.float64)
    counts = np.array([len(group) for group in groups], dtype=np.float64)
    picks = np.random.default_rng(seed).integers(0, len(groups), (num_resamples, len(groups)))
    means = sums[picks].sum(axis=1) / counts[picks].sum(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)

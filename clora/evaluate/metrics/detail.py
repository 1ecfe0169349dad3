"""How much of the fine detail of a truth an output keeps, place by place: the measure behind "soft", "noisy" and VSA.

Images are (H, W, 3) float32 RGB in [0, 1], H = W. Shape legend: N outputs, K draws of the truth, w = H - 10 places of
the SSIM window.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from clora.evaluate.metrics.image import LUMA, Array, f32, gaussian_rows, ssim_window

FINE = 1.5  # detail is what this blur (sigma in pixels of 64) takes away
GRAIN = 4e-4  # variance of brightness that noise of .03 a channel makes: contrast below it counts for little


class Detail(NamedTuple):
    """`kept` in [-1, 1]: near 1 for a truth, 0 for none of its detail. `energy`: detail over that of a typical draw."""

    kept: float
    energy: float


def fine(images_NHW3: Array) -> Array:
    """Brightness without its coarse part: what a Gaussian blur of sigma `FINE` takes away, (..., H, W)."""
    grey, size = images_NHW3 @ LUMA, images_NHW3.shape[-2]
    sigma = FINE * size / 64
    rows = gaussian_rows(size, sigma, math.ceil(3 * sigma), False)
    return f32(grey - rows @ grey @ rows.T)


def detail(output: Array, draws_KHW3: Array, mask: Array | None = None) -> Detail:
    """The detail of an output against the draw that is most alike at each place.

    With v the variance of detail in the window of SSIM (u the output's, v the draw's, c their covariance), the draw
    at a place is the one of least u + v - 2 c, and

        kept = sum sqrt(v) 2 c / (u + v + GRAIN) / sum sqrt(v)        energy = sum u / median over draws of sum v

    sqrt(v) weighs places by how much there is to keep. With a mask (H, W) in [0, 1] only those places count. A soft
    picture has little covariance wherever the truth has detail, whichever draw it is compared with; so has one whose
    detail is another. A truth without any detail gives 0 and a great energy.
    """
    own, draws = fine(output), fine(draws_KHW3)
    u, v_K, c_K = ssim_window(own * own), ssim_window(draws * draws), ssim_window(own * draws)
    best = (u + v_K - 2 * c_K).argmin(axis=0)[None]
    v, c = (np.take_along_axis(values, best, axis=0)[0].astype(np.float64) for values in (v_K, c_K))
    where = np.ones_like(u) if mask is None else ssim_window(mask)
    weights = where * np.sqrt(np.maximum(v, 0))
    kept = float((weights * 2 * c / (u + v + GRAIN)).sum() / max(float(weights.sum()), 1e-12))
    typical = float(np.median((where * v_K).sum(axis=(1, 2), dtype=np.float64)))
    return Detail(kept, float((where * u).sum(dtype=np.float64)) / max(typical, 1e-12))


def detail_nearby(output: Array, draws_KHW3: Array) -> Detail:
    """`detail`, the output moved by up to a pixel each way to where it keeps most: a shift is not softness."""
    moves = [(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1)]
    found = [detail(np.roll(output, move, axis=(0, 1)), draws_KHW3) for move in moves]
    return max(found, key=lambda one: one.kept)

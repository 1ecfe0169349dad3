"""Measures between images: L1, PSNR, SSIM, high-frequency energy, and the distance of the exact metrics.

docs/METRICS.md has the maths and the figures behind the constants; `clora.evaluate.truths` judges outputs with them.
Images are (H, W, 3) float32 RGB in [0, 1], of any size but where a function says otherwise.
Shape legend: N images, K truths or draws, F features, H W pixels, w = H - 10 places of the SSIM window.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]


def f32(values: Any) -> Array:
    """An array of float32; scalars become 0-d."""
    return np.asarray(values, np.float32)


LUMA = f32((0.299, 0.587, 0.114))
NUM_PROJECTIONS, NUM_QUANTILES, NUM_COLOR_DIRECTIONS = 24, 32, 8
COLOR_WEIGHT, PLACE_WEIGHT = 1.5, 0.7
PSNR_CAP = 60.0  # dB: what an exact copy counts in a mean
FLAT_ENERGY = 1e-6  # mean squared high frequencies of a grey level or so: below it a picture counts as flat


# ---------------------------------------------------------------- one image against another


def l1(output: Array, truth: Array) -> float:
    """Mean absolute difference, in [0, 1]."""
    return float(np.abs(output - truth).mean(dtype=np.float64))


def psnr(output: Array, truth: Array) -> float:
    """Peak signal to noise ratio in dB, 10 log10(1 / mean squared difference); inf for equal images."""
    error = float(np.square(output - truth).mean(dtype=np.float64))
    return 10.0 * math.log10(1.0 / error) if error > 0 else math.inf


@functools.lru_cache(maxsize=16)
def gaussian_rows(size: int, sigma: float, reach: int, valid: bool) -> Array:
    """A Gaussian filter along an axis of `size` as a matrix.

    (size - 2 reach, size) where `valid`, otherwise (size, size) with the rows at the ends renormalised.
    """
    centres = np.arange(reach, size - reach) if valid else np.arange(size)
    offset = np.arange(size)[None, :] - centres[:, None]
    rows = np.where(np.abs(offset) <= reach, np.exp(-0.5 * (offset / sigma) ** 2), 0.0)
    return f32(rows / rows.sum(axis=1, keepdims=True))


def ssim_window(images_NHW: Array) -> Array:
    """The 11 x 11 Gaussian window of SSIM (sigma 1.5) wherever it fits: (..., H, W) -> (..., w, w)."""
    height, width = images_NHW.shape[-2:]
    return f32(gaussian_rows(height, 1.5, 5, True) @ images_NHW @ gaussian_rows(width, 1.5, 5, True).T)


def ssim_map(output: Array, truths_KHW3: Array) -> Array:
    """Structural similarity of the brightness at every place, against each of K truths: (K, w, w) in [-1, 1].

    Wang et al. 2004: Gaussian window 11 x 11 of sigma 1.5, K1 = .01, K2 = .03, range 1, no padding.
    """
    x, y = output @ LUMA, truths_KHW3 @ LUMA
    c1, c2 = 0.01**2, 0.03**2
    mean_x, mean_y = ssim_window(x), ssim_window(y)
    var_x, var_y = ssim_window(x * x) - mean_x**2, ssim_window(y * y) - mean_y**2
    cov = ssim_window(x * y) - mean_x * mean_y
    similar = (2 * mean_x * mean_y + c1) * (2 * cov + c2)
    return f32(similar / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2)))


def ssim(output: Array, truth: Array) -> float:
    """Mean of `ssim_map`, in [-1, 1]; 1 for equal images."""
    return float(ssim_map(output, truth[None]).mean(dtype=np.float64))


def hf_energy(image: Array) -> float:
    """Mean square of the brightness above a quarter of a cycle per pixel (half of Nyquist), along x or y.

    The image is mirrored first, so that its borders are not edges.
    """
    grey = (image @ LUMA).astype(np.float64)
    tiled = np.block([[grey, grey[:, ::-1]], [grey[::-1], grey[::-1, ::-1]]])
    power = np.abs(np.fft.fft2(tiled, norm="forward")) ** 2
    fy, fx = np.abs(np.fft.fftfreq(tiled.shape[0])), np.abs(np.fft.fftfreq(tiled.shape[1]))
    return float(power[np.maximum(fy[:, None], fx[None, :]) > 0.25].sum())


def hf_ratio(output: Array, truth: Array) -> float:
    """High-frequency energy of the output over the truth's: 1 is right, less over-smoothed, more noisy."""
    return (hf_energy(output) + FLAT_ENERGY) / (hf_energy(truth) + FLAT_ENERGY)


def geometric_mean(ratios: Sequence[float]) -> float:
    """The geometric mean of positive ratios: which way they err, where they err alike."""
    return math.exp(float(np.mean(np.log(ratios))))


def detail_error(ratios: Sequence[float]) -> float:
    """Mean |10 log10 ratio| of `hf_ratio`s, dB: 0 is right, 3 half or twice; soft and noisy do not cancel."""
    return float(np.mean(np.abs(10 * np.log10(ratios))))


def disturbed(image: Array, rng: np.random.Generator, blur: float = 0.8, noise: float = 0.03,
              light: float = 0.06) -> Array:  # fmt: skip
    """The image as a small model gives it back: blurred (sigma in pixels of 64), noisy, its light changed."""
    size = image.shape[0]
    sigma = blur * size / 64
    rows = gaussian_rows(size, sigma, max(1, math.ceil(3 * sigma)), False)
    soft = np.einsum("ij,jkc,lk->ilc", rows, image, rows, optimize=True)
    lit = soft * (1 + rng.uniform(-light, light)) + rng.uniform(-light / 2, light / 2, 3)
    return f32(np.clip(lit + rng.normal(0, noise, image.shape), 0, 1))


def as_image(pixels: NDArray[Any]) -> Array:
    """uint8 in 0..255 or floats in [0, 1], as float32 in [0, 1]. Raises ValueError unless (H, W, 3)."""
    if pixels.ndim != 3 or pixels.shape[2] != 3:
        raise ValueError(f"an image must be (H, W, 3), got {pixels.shape}")
    return f32(pixels / 255.0) if pixels.dtype == np.uint8 else f32(pixels)


# ---------------------------------------------------------------- the distance

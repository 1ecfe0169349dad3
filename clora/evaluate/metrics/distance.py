"""Distances between images and sets of images by fixed random features."""

from __future__ import annotations

import functools

import numpy as np
import torch

from clora.evaluate.metrics.image import (
    COLOR_WEIGHT,
    NUM_COLOR_DIRECTIONS,
    NUM_PROJECTIONS,
    NUM_QUANTILES,
    PLACE_WEIGHT,
    Array,
    f32,
)

# The embedding: (pool, stride, weight) of each patch scale, and the weights of colour and place.
PATCH = 5

SCALES = ((1, 2, 1.0), (2, 1, 1.0), (4, 1, 2.0))

PLACE_SIZE = 16


@functools.cache
def random_directions() -> tuple[list[Array], Array]:
    """Fixed random directions: per scale (75, P) unit filters blind to flat colour, and (3, C) of colour."""
    rng = np.random.default_rng(20240611)
    filters = []
    for _ in SCALES:
        f = rng.normal(size=(PATCH * PATCH, 3, NUM_PROJECTIONS))
        f -= f.mean(axis=0)
        filters.append(f32((f / np.sqrt((f**2).sum(axis=(0, 1)))).reshape(-1, NUM_PROJECTIONS)))
    colors = rng.normal(size=(3, NUM_COLOR_DIRECTIONS))
    return filters, f32(colors / np.linalg.norm(colors, axis=0))


def _pooled(images_NHW3: Array, factor: int) -> Array:
    """Means of factor x factor blocks: (N, H, W, C) -> (N, H / factor, W / factor, C)."""
    corners = [images_NHW3[:, i::factor, j::factor] for i in range(factor) for j in range(factor)]
    return f32(functools.reduce(np.add, corners) / np.float32(factor * factor))


def _quantiles(values_NMP: Array) -> Array:
    """Sorted values of each projection P, averaged in NUM_QUANTILES bins: (N, P * NUM_QUANTILES)."""
    count = values_NMP.shape[1]
    ordered = np.sort(np.ascontiguousarray(values_NMP.transpose(0, 2, 1)), axis=-1)
    edges = np.linspace(0, count, NUM_QUANTILES + 1).astype(np.int64)
    bins = np.add.reduceat(ordered, edges[:-1], axis=-1) / np.diff(edges)
    return f32(bins.reshape(len(values_NMP), -1))


def _patches(images_NHW3: Array, stride: int) -> Array:
    """All 5 x 5 patches at a stride: (N, M, 75)."""
    reach = images_NHW3.shape[1] - PATCH + 1
    steps = [(i, j) for i in range(PATCH) for j in range(PATCH)]
    pixels = [images_NHW3[:, i : i + reach : stride, j : j + reach : stride] for i, j in steps]
    return np.stack(pixels, axis=3).reshape(len(images_NHW3), -1, PATCH * PATCH * 3)


def places(images_NHW3: Array) -> Array:
    """Colours averaged on a 16 x 16 grid: (N, 768)."""
    return _pooled(images_NHW3, images_NHW3.shape[1] // PLACE_SIZE).reshape(len(images_NHW3), -1)


def embed(images_NHW3: Array) -> Array:
    """Features (N, F) float32 such that D(a, b) = sum |embed(a) - embed(b)|.

    Three parts, each a mean of absolute differences times its weight: *place*, colours on a 16 x 16 grid;
    *colour*, the sliced Wasserstein distance of the colours of 2 x 2 blocks, wherever they are; *patches*,
    the sliced Wasserstein distance of 5 x 5 patches without their mean colour, at 1, 1/2 and 1/4 size.
    Raises ValueError when a size is not a multiple of 64 or a value is not finite.
    """
    images = f32(images_NHW3)
    if images.ndim != 4 or images.shape[1] != images.shape[2] or images.shape[1] % 64 or images.shape[3] != 3:
        raise ValueError(f"images must be (N, H, H, 3) with H a multiple of 64, got {images.shape}")
    if not np.isfinite(images).all():
        raise ValueError("an image holds values that are not finite")
    filters, colors = random_directions()
    chunks = [images[i : i + 32] for i in range(0, len(images), 32)]
    return np.concatenate([_embed_chunk(_pooled(chunk, images.shape[1] // 64), filters, colors) for chunk in chunks])


def _embed_chunk(images: Array, filters: list[Array], colors: Array) -> Array:
    parts = [(places(images), PLACE_WEIGHT)]
    parts.append((_quantiles(_pooled(images, 2).reshape(len(images), -1, 3) @ colors), COLOR_WEIGHT))
    for (pool, stride, weight), filter_bank in zip(SCALES, filters, strict=True):
        parts.append((_quantiles(_patches(_pooled(images, pool), stride) @ filter_bank), weight))
    return np.concatenate([part * np.float32(weight / part.shape[1]) for part, weight in parts], axis=1)


def cityblock(a_NF: Array, b_KF: Array) -> Array:
    """Pairwise sums of absolute differences: (N, K)."""
    distance: Array = torch.cdist(torch.from_numpy(a_NF), torch.from_numpy(b_KF), p=1.0).numpy()
    return distance


def image_distance(a: Array, b: Array) -> float:
    """D(a, b) of two images, about the scale of an L1 difference; see `embed`. A metric on embeddings."""
    return float(cityblock(embed(a[None]), embed(b[None]))[0, 0])


def distribution_distance(outputs_NHW3: Array, draws_KHW3: Array) -> float:
    """Energy distance between outputs of several seeds and draws of the truth, over the spread of the draws.

    (2 E D(output, draw) - E D(output, output') - E D(draw, draw')) / E D(draw, draw'), without bias (a fresh
    set of draws gives 0 on average and may be a little negative); one outcome repeated gives about 1. Energy
    distance: Szekely and Rizzo 2013; D is an L1 distance, so zero means equal distributions of embeddings.
    Raises ValueError for fewer than two outputs or draws, or draws that are all alike.
    """
    return energy_distance(embed(outputs_NHW3), embed(draws_KHW3))


def energy_distance(x_NF: Array, y_KF: Array) -> float:
    """`distribution_distance` of embeddings, outputs (N, F) and draws (K, F)."""
    if len(x_NF) < 2 or len(y_KF) < 2:
        raise ValueError("the energy distance needs at least two outputs and two draws")

    def within(z: Array) -> float:
        return float(cityblock(z, z).sum(dtype=np.float64)) / (len(z) * (len(z) - 1))

    spread = within(y_KF)
    if not spread > 0:
        raise ValueError("the draws are all alike: the effect has no randomness to compare")
    return (2 * float(cityblock(x_NF, y_KF).mean(dtype=np.float64)) - within(x_NF) - spread) / spread

"""Labelled grids of pictures."""

from __future__ import annotations

import numpy as np

from clora.data.image_grid import grid_image, to_uint8


def test_to_uint8_rounds_to_the_nearest_and_clips() -> None:
    image = np.array([[[-0.1, 0.0, 0.5 / 255 + 1e-4], [1.0, 1.2, 254.4 / 255]]], np.float32)
    assert to_uint8(image).tolist() == [[[0, 0, 1], [255, 255, 254]]]
    whole = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    assert to_uint8(whole) is whole


def test_grid_image_gives_every_picture_room() -> None:
    """Pictures of other shapes than the first, as effects whose pairs have other aspect ratios."""
    red, green, blue = (
        np.full((height, width, 3), color, np.uint8)
        for height, width, color in ((16, 16, (255, 0, 0)), (8, 24, (0, 255, 0)), (30, 10, (0, 0, 255)))
    )
    picture = np.asarray(grid_image([[red, green], [blue, None]], ["one", "two"], scale=2))
    for color, size in (((255, 0, 0), (32, 32)), ((0, 255, 0), (16, 48)), ((0, 0, 255), (60, 20))):
        where = np.argwhere((picture == color).all(-1))
        assert tuple(np.ptp(where, axis=0) + 1) == size and len(where) == size[0] * size[1]
    left = {c: np.argwhere((picture == c).all(-1))[:, 1].mean() for c in ((255, 0, 0), (0, 0, 255))}
    assert left[255, 0, 0] == left[0, 0, 255]  # both in the middle of their column

"""FLIP: how different two pictures look when one is flipped to the other on a screen.

Andersson et al. 2020 (doi 10.1145/3406183), LDR variant, by the authors' package `flip-evaluator` (extra `eval`): sRGB
in [0, 1], float32, 67 pixels a degree of sight, the mean over all pixels. In [0, 1]: 0 for equal pictures, lower is
nearer.
"""

from __future__ import annotations

from importlib.metadata import version

import numpy as np
from numpy.typing import NDArray

from clora.errors import InputError

PACKAGE = "flip-evaluator"


def flip_facts() -> str:
    """All that the figure depends on, and which way it goes, in a line."""
    how = "LDR, 67 pixels a degree, mean error, at the result's size, float32 sRGB in [0, 1]"
    return f"{PACKAGE} {version(PACKAGE)}, {how}; in [0, 1], 0 for equal pictures, lower is nearer"


def require_flip() -> None:
    """Raise `InputError` where the package is missing."""
    try:
        import flip_evaluator  # noqa: F401
    except ImportError as error:
        raise InputError(f"flip: needs the package {PACKAGE}; pip install 'clora[eval]'") from error


def flip(reference: NDArray[np.float32], test: NDArray[np.float32]) -> float:
    """Mean FLIP error of two pictures (H, W, 3) float32 in [0, 1] of equal size; raises ValueError for others."""
    for name, image in (("reference", reference), ("test", test)):
        if image.shape != reference.shape or image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.float32:
            raise ValueError(f"{name} must be float32 (H, W, 3) as the reference, got {image.dtype} {image.shape}")
        if not (0 <= image.min() and image.max() <= 1):
            raise ValueError(f"{name} must be in [0, 1], got {image.min()} to {image.max()}")
    import flip_evaluator

    pair = (np.ascontiguousarray(reference), np.ascontiguousarray(test))
    return float(flip_evaluator.evaluate(*pair, "LDR", applyMagma=False)[1])

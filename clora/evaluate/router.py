"""Which LoRA of a bank a request is about, by the letters that request and description share; and how alike texts are.

A router is what a system of many LoRAs needs and a collection does without (the paper's Table 2). The paper asks a
vision model; this is the cheapest that works.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray


def route(request: str, descriptions: Mapping[str, str]) -> str:
    """The name whose description is most like `request`; the first of equals. Raises ValueError for an empty bank."""
    if not descriptions:
        raise ValueError("there is nothing to route to; give descriptions")
    likeness = text_similarity([request, *descriptions.values()])[0, 1:]
    return list(descriptions)[int(likeness.argmax())]


def text_similarity(texts: Sequence[str]) -> NDArray[np.float64]:
    """Cosines (n, n) of the texts' character trigrams, counts weighted by log((1 + n) / (1 + texts that have it)) + 1.

    Case and runs of white space make no difference. Equal texts have 1, texts without a common trigram 0.
    """
    counts = [Counter(_trigrams(text)) for text in texts]
    spread_over = Counter(gram for count in counts for gram in count)
    column = {gram: index for index, gram in enumerate(sorted(spread_over))}
    vectors = np.zeros((len(texts), len(column)))
    for row, count in enumerate(counts):
        for gram, number in count.items():
            vectors[row, column[gram]] = number * (math.log((1 + len(texts)) / (1 + spread_over[gram])) + 1)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    cosines: NDArray[np.float64] = np.clip(vectors @ vectors.T, 0.0, 1.0)
    return cosines


def _trigrams(text: str) -> list[str]:
    padded = f" {' '.join(text.casefold().split())} "
    return [padded[i : i + 3] for i in range(len(padded) - 2)]

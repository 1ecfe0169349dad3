"""A router: which LoRA of a bank a request is about, by the words that request and description share.

What a system of many LoRAs needs and a collection does without (the paper's Table 2). The paper asks a vision model;
this is the cheapest that works: cosine of tf-idf vectors over words, with plural and tense endings cut.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping

_ENDINGS = ("ings", "ing", "ies", "es", "ed", "s", "y", "e")


def route(request: str, descriptions: Mapping[str, str]) -> str:
    """The name whose description is most like `request`; the first of equals. Raises ValueError for an empty bank."""
    if not descriptions:
        raise ValueError("there is nothing to route to; give descriptions")
    words = {name: Counter(stems(text)) for name, text in descriptions.items()}
    seen_in = Counter(word for counts in words.values() for word in counts)
    rarity = {word: math.log((1 + len(words)) / (1 + count)) + 1 for word, count in seen_in.items()}
    asked = _unit(Counter(stems(request)), rarity)
    scores = {name: _dot(asked, _unit(counts, rarity)) for name, counts in words.items()}
    return max(scores, key=lambda name: scores[name])


def stems(text: str) -> list[str]:
    """The words of a text in lower case, without common endings where three letters or more are left."""
    found = []
    for word in re.findall(r"[a-z0-9]+", text.lower()):
        ending = next((e for e in _ENDINGS if word.endswith(e) and len(word) - len(e) >= 3), "")
        found.append(word.removesuffix(ending))
    return found


def _unit(counts: Mapping[str, int], rarity: Mapping[str, float]) -> dict[str, float]:
    weights = {word: count * rarity[word] for word, count in counts.items() if word in rarity}
    length = math.sqrt(sum(weight**2 for weight in weights.values())) or 1.0
    return {word: weight / length for word, weight in weights.items()}


def _dot(a: Mapping[str, float], b: Mapping[str, float]) -> float:
    return sum(weight * b.get(word, 0.0) for word, weight in a.items())

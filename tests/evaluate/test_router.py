"""Likeness of texts worked out by hand, and the router on the tiny world's own descriptions."""

import math

import numpy as np
import pytest

from clora.evaluate.router import route, text_similarity
from clora.tiny.effects import EFFECTS


def test_text_similarity_is_the_cosine_of_weighted_trigrams() -> None:
    """'ab' has the trigrams ' ab', 'ab '; 'abc' has ' ab', 'abc', 'bc '. ' ab' is in both, the others in one of two."""
    both, one = 1.0, math.log(3 / 2) + 1
    expected = both * both / (math.hypot(both, one) * math.sqrt(both**2 + 2 * one**2))
    cosines = text_similarity(["ab", "abc"])
    np.testing.assert_allclose(cosines, [[1, expected], [expected, 1]], rtol=1e-12)
    same = text_similarity(["Change  the style", "change the Style", "xyzzy"])
    np.testing.assert_allclose(same, [[1, 1, 0], [1, 1, 0], [0, 0, 1]], atol=1e-12)


def test_route_takes_the_first_of_equals_and_needs_a_bank():
    assert route("anything", {"one": "x", "two": "y"}) == "one"
    with pytest.raises(ValueError, match="nothing to route to"):
        route("x", {})


def test_route_finds_most_effects_of_the_world_and_gets_worse_with_their_number():
    def right(names):
        bank = {name: EFFECTS[name].criteria for name in names}
        return sum(route(EFFECTS[name].student_prompt, bank) == name for name in names) / len(names)

    few, many = right(list(EFFECTS)[::6]), right(list(EFFECTS))
    assert 0.6 < many < few

"""The router against tf-idf worked out by hand, and on the tiny world's own descriptions."""

import math

import pytest

from clora.evaluate.router import route, stems
from clora.tiny.effects import EFFECTS


def test_stems_join_forms_of_a_word():
    assert stems("Tiles, tiled tiling") == ["til", "til", "til"]
    assert stems("as is on us") == ["as", "is", "on", "us"]  # too short to cut


def test_route_weighs_rare_words_by_hand():
    """`photo` is in all, `snow` in one: with idf ln(4/4) + 1 = 1 and ln(4/2) + 1 = 1.69 the rare word decides."""
    bank = {"a": "photo photo photo", "b": "snow photo", "c": "photo rain"}
    assert route("snow photo photo", bank) == "b"
    rare = math.log(4 / 2) + 1
    asked = {"snow": rare, "photo": 2.0}
    lengths = math.hypot(*asked.values()), math.hypot(rare, 1)
    cosine_b = (rare * rare + 2) / (lengths[0] * lengths[1])
    cosine_a = 2 / lengths[0]
    assert cosine_b > cosine_a
    assert route("snow photo photo photo photo", bank) == ("a" if 4 / math.hypot(rare, 4) > cosine_of(4, rare) else "b")


def cosine_of(photos: int, rare: float) -> float:
    return (rare * rare + photos) / (math.hypot(rare, photos) * math.hypot(rare, 1))


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

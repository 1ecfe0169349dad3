"""Routing as a function of (seed, step): statistics, balance, and sameness across calls and processes."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from clora.method import routing
from clora.method.routing import draw_effects, draw_stream, step_generator

ROOT = Path(__file__).parents[2]


def _clear_caches() -> None:
    for function in (routing._effect_steps_in_block, routing._stream_uniforms, routing._deck):
        function.cache_clear()


def _is_effect(seed: int, steps: range, p_switch: float) -> np.ndarray:
    return np.array([draw_stream(seed, step, p_switch) == "effect" for step in steps])


@pytest.mark.parametrize("p_switch", [0.2, 0.5, 0.9])
def test_draw_stream_has_probability_p_switch_and_no_memory(p_switch: float) -> None:
    n = 40_000
    effect = _is_effect(3, range(n), p_switch)
    deviation = (p_switch * (1 - p_switch) / n) ** 0.5
    assert abs(effect.mean() - p_switch) < 4 * deviation
    centred = effect - effect.mean()
    for lag in (1, 2, 20):  # the authors hold a stream for 20 steps: correlation 0.95 at lag 1
        assert abs((centred[lag:] * centred[:-lag]).mean() / centred.var()) < 4 / n**0.5
    held = np.repeat(effect[: n // 20], 20)
    centred = held - held.mean()
    assert (centred[1:] * centred[:-1]).mean() / centred.var() > 0.9


def test_draw_stream_is_certain_at_zero_and_one() -> None:
    assert not _is_effect(0, range(5000), 0.0).any()
    assert _is_effect(0, range(5000), 1.0).all()


def test_draw_stream_of_another_seed_is_independent() -> None:
    one, two = (_is_effect(seed, range(10_000), 0.5) for seed in (0, 1))
    assert abs((one == two).mean() - 0.5) < 0.02


def test_draws_do_not_depend_on_earlier_calls() -> None:
    steps = list(range(0, 20_000, 37))
    _clear_caches()
    forward = {s: (draw_stream(7, s, 0.5), draw_effects(7, s, 50, 3, 0.5)) for s in steps}
    _clear_caches()
    random.Random(0).shuffle(steps)
    for s in steps:
        assert forward[s] == (draw_stream(7, s, 0.5), draw_effects(7, s, 50, 3, 0.5))


def test_draws_are_pinned_across_processes_and_versions() -> None:
    code = (
        "from clora.method.routing import *\n"
        "print(''.join(draw_stream(0, s, 0.5)[0] for s in range(4090, 4102)),"
        " draw_effects(0, 100_000, 50, 4, 0.5), step_generator(0, 1, 'student', 'cpu').initial_seed())"
    )
    for hash_seed in ("0", "12345"):
        env = {"PYTHONHASHSEED": hash_seed, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", code]
        out = subprocess.run(command, capture_output=True, text=True, check=True, env=env, cwd=ROOT)
        assert out.stdout.strip() == "gggeegeggegg [42, 7, 15, 14] 8029621042462920524"


@pytest.mark.parametrize(("num_effects", "batch_size"), [(1, 2), (5, 1), (5, 3), (50, 7), (3, 8)])
def test_draw_effects_counts_differ_by_at_most_one_at_any_prefix(num_effects: int, batch_size: int) -> None:
    counts = Counter(dict.fromkeys(range(num_effects), 0))
    for step in range(3000):
        if draw_stream(1, step, 0.4) == "effect":
            for effect in draw_effects(1, step, num_effects, batch_size, 0.4):
                counts[effect] += 1
                assert max(counts.values()) - min(counts.values()) <= 1
    assert set(counts) == set(range(num_effects)) and min(counts.values()) > 10


def test_draw_effects_independent_draws_would_not_be_balanced() -> None:
    rng = random.Random(0)
    counts = Counter(rng.randrange(50) for _ in range(3000))
    assert max(counts.values()) - min(counts.values()) > 10


def test_draw_effects_continue_where_the_last_effect_step_ended() -> None:
    # Against counting by hand, across the boundary of a block.
    steps = [s for s in range(9000) if draw_stream(2, s, 0.3) == "effect"]
    dealt = [e for s in steps for e in draw_effects(2, s, 7, 3, 0.3)]
    decks = [dealt[i : i + 7] for i in range(0, len(dealt) - 6, 7)]
    assert all(sorted(deck) == list(range(7)) for deck in decks)
    assert len({tuple(deck) for deck in decks}) > 0.8 * min(len(decks), 5040) * 0.8
    firsts = Counter(deck[0] for deck in decks)
    assert all(abs(firsts[e] / len(decks) - 1 / 7) < 0.05 for e in range(7))


def test_draw_effects_parts_of_a_step_continue_one_sequence_of_their_own() -> None:
    # Five critic updates a step: dealt one after the other, and not the student's cards.
    counts, steps = Counter(dict.fromkeys(range(7), 0)), range(400)
    critic, student = [], []
    for step in steps:
        if draw_stream(4, step, 0.5) == "effect":
            student += draw_effects(4, step, 7, 2, 0.5)
            for part in range(5):
                dealt = draw_effects(4, step, 7, 2, 0.5, purpose="critic", part=part, parts=5)
                counts.update(dealt)
                critic += dealt
                assert max(counts.values()) - min(counts.values()) <= 1
    assert len(critic) == 5 * len(student) > 500
    assert critic[: len(student)] != student


def test_draw_effects_of_a_large_batch_is_the_ranks_slices() -> None:
    # A rank takes its slice of the step's batch; together they are one dealt sequence.
    step = next(s for s in range(100, 200) if draw_stream(0, s, 0.5) == "effect")
    batch = draw_effects(0, step, 8, 16, 0.5)
    assert Counter(batch) == dict.fromkeys(range(8), 2)


def test_draws_are_cheap_at_step_100000() -> None:
    _clear_caches()
    start = time.process_time()
    draw_effects(11, 100_000, 180, 8, 0.5)
    assert time.process_time() - start < 0.5  # about 5 ms; counting one step at a time takes seconds
    start = time.process_time()
    for step in range(100_000, 100_200):
        draw_effects(11, step, 180, 8, 0.5)
    assert time.process_time() - start < 1.0


def test_draw_effects_refuses_an_empty_bank_and_a_part_too_many() -> None:
    with pytest.raises(ValueError, match="num_effects must be at least 1"):
        draw_effects(0, 0, 0, 1, 0.5)
    with pytest.raises(ValueError, match="part is 5"):
        draw_effects(0, 0, 3, 1, 0.5, part=5, parts=5)


def test_draw_stream_refuses_a_negative_step() -> None:
    with pytest.raises(ValueError, match="negative"):
        draw_stream(0, -1, 0.5)


def test_step_generator_repeats_and_separates_uses() -> None:
    def draw(seed: int, step: int, purpose: str) -> torch.Tensor:
        return torch.randn(1000, generator=step_generator(seed, step, purpose, "cpu"))

    same = draw(0, 5, "student")
    assert torch.equal(same, draw(0, 5, "student"))
    for other in (draw(1, 5, "student"), draw(0, 6, "student"), draw(0, 5, "critic"), draw(0, 55, "student")):
        assert abs(float((same * other).mean())) < 0.15

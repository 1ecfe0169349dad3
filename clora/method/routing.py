"""Which stream, which effects and which random numbers a step gets (Sec. 4.2), as functions of (seed, step).

Nothing here keeps state: a resumed run, and every rank of a distributed one, arrives at the same draws from
the step number alone. Draws are raw Philox words, whose values numpy guarantees across versions (it does not
for `Generator.random` or `permutation`). The caches below hold only values that can be computed again.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

Stream = Literal["general", "effect"]

# Steps drawn at once. One block is 32 KiB; step 100,000 needs the counts of 25 blocks before it.
_BLOCK = 4096


def draw_stream(seed: int, step: int, p_switch: float) -> Stream:
    """Probabilistic dual-stream routing: p ~ U[0, 1) anew at each step, effect when p < p_switch.

    Args:
        step: >= 0.
        p_switch: in [0, 1]; 0 is always general, 1 always effect.
    """
    block, offset = _block_of(step)
    return "effect" if _stream_uniforms(seed, block)[offset] < p_switch else "general"


def draw_effects(
    seed: int,
    step: int,
    num_effects: int,
    batch_size: int,
    p_switch: float,
    *,
    purpose: str = "student",
    part: int = 0,
    parts: int = 1,
) -> list[int]:
    """The effects of the batch at `step`, each in 0 .. num_effects - 1.

    Effect steps deal from one sequence of shuffled decks, a fresh permutation of all effects per deck, so
    that after any number of effect steps the effects' counts differ by at most one. A general step takes
    nothing; asked about one, this answers with what the next effect step will get.

    Args:
        batch_size: samples of this step over all ranks; each rank takes its slice.
        p_switch: the probability that `draw_stream` was given; 1 where every step is an effect step.
        purpose: each purpose ("student", "critic") deals from a sequence of its own.
        part, parts: batch number `part` of the `parts` that every effect step deals for this purpose.

    Returns:
        batch_size indices.
    """
    if num_effects < 1:
        raise ValueError("no effects to draw from: num_effects must be at least 1")
    if not 0 <= part < parts:
        raise ValueError(f"part is {part}: it must be one of 0 .. parts - 1, with parts {parts}")
    first = (_effect_steps_before(seed, step, p_switch) * parts + part) * batch_size
    return [
        int(_deck(seed, position // num_effects, num_effects, purpose)[position % num_effects])
        for position in range(first, first + batch_size)
    ]


def step_generator(seed: int, step: int, purpose: str, device: torch.device | str) -> torch.Generator:
    """A torch.Generator for one use at one step, seeded by a hash that is stable across runs and machines.

    Args:
        purpose: names the use, e.g. "student/0"; different purposes give independent draws.
        device: where the generator draws. CPU and CUDA generators of one seed draw different numbers.
    """
    # manual_seed takes 64 bits but treats those above 63 as negative; 63 are plenty.
    return torch.Generator(device).manual_seed(_hash(seed, step, purpose) >> 1)


def _effect_steps_before(seed: int, step: int, p_switch: float) -> int:
    block, offset = _block_of(step)
    whole = sum(_effect_steps_in_block(seed, b, p_switch) for b in range(block))
    return whole + int((_stream_uniforms(seed, block)[:offset] < p_switch).sum())


@lru_cache(maxsize=4096)
def _effect_steps_in_block(seed: int, block: int, p_switch: float) -> int:
    return int((_stream_uniforms(seed, block) < p_switch).sum())


@lru_cache(maxsize=8)
def _stream_uniforms(seed: int, block: int) -> NDArray[np.float64]:
    """p of the `_BLOCK` steps of one block, in [0, 1) with 53 bits."""
    return (_philox(seed, block, "stream", _BLOCK) >> np.uint64(11)).astype(np.float64) * 2.0**-53


@lru_cache(maxsize=64)
def _deck(seed: int, index: int, num_effects: int, purpose: str) -> NDArray[np.intp]:
    return np.argsort(_philox(seed, index, f"effects/{purpose}", num_effects), kind="stable")


def _philox(seed: int, index: int, purpose: str, count: int) -> NDArray[np.uint64]:
    bits: NDArray[np.uint64] = np.random.Philox(key=_hash(seed, index, purpose)).random_raw(count)
    return bits


def _block_of(step: int) -> tuple[int, int]:
    if step < 0:
        raise ValueError(f"step must not be negative, got {step}")
    return divmod(step, _BLOCK)


def _hash(seed: int, index: int, purpose: str) -> int:
    text = f"clora/{seed}/{index}/{purpose}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")

"""Random numbers that belong to places of an order: numpy's own, for a whole batch at once.

`np.random.default_rng(key).random()` takes tens of microseconds for each key, more than all else that is done to a
small image. These are the same numbers: SeedSequence (O'Neill's seed_seq) and PCG64 (O'Neill 2014, XSL-RR 128/64), in
arrays.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np

_LOW = 0xFFFFFFFF
_POOL = 4  # words in a SeedSequence
_MULTIPLIER = 0x2360ED051FC65DA44385DF649FCCF645  # of PCG64

BLOCK = 4096  # neighbouring places whose numbers are computed at once

Pair = tuple[np.ndarray, np.ndarray]  # high and low 64 bits


def uniform_in_order(key: tuple[int, ...], places: np.ndarray, *more: int) -> np.ndarray:
    """`uniform` of ascending places, for an order that is walked through: the numbers of neighbours are kept."""
    first, last = int(places[0]) // BLOCK, int(places[-1]) // BLOCK
    drawn = [_block(key, number, more) for number in range(first, last + 1)]
    return (drawn[0] if first == last else np.concatenate(drawn))[places - first * BLOCK]


@lru_cache(maxsize=8)
def _block(key: tuple[int, ...], number: int, more: tuple[int, ...]) -> np.ndarray:
    return uniform(key, np.arange(number * BLOCK, (number + 1) * BLOCK), *more)


def uniform(key: Sequence[int], places: np.ndarray, *more: int) -> np.ndarray:
    """np.random.default_rng((*key, place, *more)).random() for each place: float64 [N].

    :param places: [N], each below 2^32.
    """
    words = [*_constants(key), np.asarray(places).astype(np.uint32), *_constants(more)]
    high, low, stream_high, stream_low = _seed_words(words)
    one = np.uint64(1)
    increment = (stream_high << one | stream_low >> np.uint64(63), stream_low << one | one)
    state = _advance(_add(increment, (high, low)), increment)  # PCG64's seeding
    high, low = _advance(state, increment)
    mixed, turn = high ^ low, high >> np.uint64(58)
    bits = mixed >> turn | mixed << (-turn & np.uint64(63))
    return (bits >> np.uint64(11)) * 2.0**-53


def _constants(numbers: Sequence[int]) -> list[np.ndarray]:
    """The 32-bit words of whole numbers, lowest first."""
    words = []
    for number in numbers:
        count = max(1, -(-number.bit_length() // 32))
        words += [number >> 32 * i & _LOW for i in range(count)]
    return [np.full(1, word, np.uint32) for word in words]


# SeedSequence


def _hasher(constant: int, multiplier: int) -> Callable[[np.ndarray], np.ndarray]:
    """A function that hashes words, another way at each call."""

    def hashed(word: np.ndarray) -> np.ndarray:
        nonlocal constant
        word = word ^ np.uint32(constant)
        constant = constant * multiplier & _LOW
        word = word * np.uint32(constant)
        return word ^ word >> np.uint32(16)

    return hashed


def _mix(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    mixed = x * np.uint32(0xCA01F9DD) - y * np.uint32(0x4973F715)
    return mixed ^ mixed >> np.uint32(16)


def _seed_words(words: list[np.ndarray]) -> list[np.ndarray]:
    """Four words of 64 bits, as SeedSequence(words).generate_state(4, np.uint64)."""
    hashed = _hasher(0x43B0D7E5, 0x931E8875)
    pool = [hashed(word) for word in [*words, *_constants([0] * _POOL)][:_POOL]]
    for source in range(_POOL):
        for target in range(_POOL):
            if source != target:
                pool[target] = _mix(pool[target], hashed(pool[source]))
    for word in words[_POOL:]:
        pool = [_mix(each, hashed(word)) for each in pool]
    hashed = _hasher(0x8B51F9DD, 0x58F38DED)
    halves = [hashed(pool[i % _POOL]).astype(np.uint64) for i in range(8)]
    return [low | high << np.uint64(32) for low, high in zip(halves[::2], halves[1::2])]


# 128-bit arithmetic


def _add(a: Pair, b: Pair) -> Pair:
    low = a[1] + b[1]
    return a[0] + b[0] + (low < b[1]), low


def _advance(state: Pair, increment: Pair) -> Pair:
    """state * _MULTIPLIER + increment."""
    (high, low), multiplier_low = state, np.uint64(_MULTIPLIER & (2**64 - 1))
    carried = high * multiplier_low + low * np.uint64(_MULTIPLIER >> 64) + _high_of_product(low, multiplier_low)
    return _add((carried, low * multiplier_low), increment)


def _high_of_product(a: np.ndarray, b: np.uint64) -> np.ndarray:
    """The high 64 bits of a * b."""
    half, low = np.uint64(32), np.uint64(_LOW)
    a_high, a_low, b_high, b_low = a >> half, a & low, b >> half, b & low
    middle = a_high * b_low + (a_low * b_low >> half)
    other = a_low * b_high + (middle & low)
    return a_high * b_high + (middle >> half) + (other >> half)

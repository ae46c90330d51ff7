"""Random draws that are functions of their key and of nothing else: the same on every rank, worker, platform and version.

``random`` and numpy promise that for their generators but not for what is derived from them (shuffles, bounded integers), and
a dataset's order must still be the same after an upgrade. So the few derivations that the data path needs are written out,
on SplitMix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, 2014).
"""

from __future__ import annotations

from collections.abc import MutableSequence
from hashlib import blake2b
from typing import Any

import numpy

_MASK = (1 << 64) - 1
GAMMA = 0x9E3779B97F4A7C15  # SplitMix64's step from one draw to the next


def hash64(*parts: str | int) -> int:
    """A 64-bit number of the parts; ``("a", "bc")`` and ``("ab", "c")`` differ."""
    key = "\0".join(map(str, parts)).encode("utf-8", "surrogatepass")
    return int.from_bytes(blake2b(key, digest_size=8).digest(), "little")


def mix(value: int) -> int:
    """SplitMix64's output function: a bijection of 64-bit numbers that looks random."""
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & _MASK
    return value ^ (value >> 31)


def mix_array(values: numpy.ndarray) -> numpy.ndarray:
    """``mix`` of every element of a uint64 array."""
    values = values ^ (values >> numpy.uint64(30))
    values *= numpy.uint64(0xBF58476D1CE4E5B9)
    values ^= values >> numpy.uint64(27)
    values *= numpy.uint64(0x94D049BB133111EB)
    return values ^ (values >> numpy.uint64(31))


class Keyed:
    """A stream of draws. The same parts give the same stream; draws follow each other, so their order matters."""

    def __init__(self, *parts: str | int):
        self._state = hash64(*parts)

    def bits(self) -> int:
        """64 random bits."""
        self._state = self._state + GAMMA & _MASK
        return mix(self._state)

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        """In [low, high), with 53 random bits."""
        return low + (high - low) * ((self.bits() >> 11) * 2.0**-53)

    def below(self, count: int) -> int:
        """A whole number in 0 .. count - 1. The bias is below count / 2^64."""
        assert count >= 1
        return self.bits() * count >> 64

    def shuffle(self, values: MutableSequence[Any]) -> None:
        """In place (Fisher-Yates)."""
        for last in range(len(values) - 1, 0, -1):
            other = self.below(last + 1)
            values[last], values[other] = values[other], values[last]

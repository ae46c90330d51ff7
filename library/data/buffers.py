"""Memory for batches, used again when nobody holds the last batch any more.

Memory fresh from the system costs as much as the reading: each of its pages has to be mapped and cleared first.
"""

from __future__ import annotations

import sys
import threading

import numpy
import torch

SMALL = 256 << 10  # the C library uses small blocks again by itself
LIMIT = 512 << 20


class Buffers:
    """Gives uninitialised uint8 tensors. A tensor, and every view of it, keeps its memory from being given to another."""

    def __init__(self, limit: int = LIMIT):
        self._limit, self._lock = limit, threading.Lock()
        self._arrays: list[numpy.ndarray] = []

    def empty(self, nbytes: int) -> torch.Tensor:
        """(nbytes,) uint8."""
        if nbytes < SMALL:
            return torch.empty(nbytes, dtype=torch.uint8)
        with self._lock:
            fitting = [index for index in self._idle() if nbytes <= self._arrays[index].nbytes <= 2 * nbytes]
            if not fitting:
                self._make_room(nbytes)
                self._arrays.append(numpy.empty(nbytes, dtype=numpy.uint8))
            index = min(fitting, key=lambda one: self._arrays[one].nbytes, default=len(self._arrays) - 1)
            return torch.from_numpy(self._arrays[index][:nbytes])  # its storage holds the slice, and that the array

    def _idle(self) -> list[int]:
        """Arrays that only the list refers to."""
        return [index for index in range(len(self._arrays)) if sys.getrefcount(self._arrays[index]) == _ALONE]

    def _make_room(self, nbytes: int) -> None:
        """Lets go of idle arrays, then of any: those are freed when their tensors are."""
        for index in reversed(self._idle()):
            if sum(array.nbytes for array in self._arrays) + nbytes <= self._limit:
                return
            del self._arrays[index]
        while self._arrays and sum(array.nbytes for array in self._arrays) + nbytes > self._limit:
            del self._arrays[0]


_probe = [numpy.empty(1, dtype=numpy.uint8)]
_ALONE = sys.getrefcount(_probe[0])  # what is counted for an element of a list differs between versions of Python

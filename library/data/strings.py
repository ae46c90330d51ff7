"""A column of texts without a Python object for each: UTF-8 bytes end to end, and where each begins."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy


@dataclass(frozen=True)
class Strings(Sequence[str]):
    """``blob`` uint8 and ``offsets`` int64 (N + 1); both may be memory-mapped. File names keep bytes that are not UTF-8."""

    blob: numpy.ndarray
    offsets: numpy.ndarray

    @classmethod
    def of(cls, texts: Iterable[str]) -> Strings:
        encoded = [text.encode("utf-8", "surrogateescape") for text in texts]
        offsets = numpy.zeros(len(encoded) + 1, dtype=numpy.int64)
        numpy.cumsum([len(text) for text in encoded], out=offsets[1:])
        return cls(numpy.frombuffer(b"".join(encoded), dtype=numpy.uint8), offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> str:  # type: ignore[override]  # no slices: nobody needs them
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self.blob[self.offsets[index]:self.offsets[index + 1]].tobytes().decode("utf-8", "surrogateescape")

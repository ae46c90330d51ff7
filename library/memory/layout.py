"""Tensors of different shapes and dtypes side by side in one flat region of bytes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

ALIGNMENT = 256  # what cudaMalloc gives: kernels choose their fastest variant by it


@dataclass(frozen=True)
class Place:
    """Where one tensor lies: ``offset`` in bytes."""

    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def size(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Layout:
    """Places in order without overlap, and the ``size`` of the region in bytes. Tensors are contiguous there."""

    places: tuple[Place, ...]
    size: int

    def views(self, region: Tensor) -> list[Tensor]:
        """``region`` (>= size,) uint8 -> a tensor for each place, all looking into it."""
        return [region[p.offset:p.offset + p.size].view(p.dtype).view(p.shape) for p in self.places]

    def host_views(self, region: Tensor) -> list[Tensor]:
        """The same for a region on the host, as tensors that seem to own their memory: what saves tensors (torch.save,
        safetensors) would otherwise take them for parts of one and write all of it, or refuse."""
        content = region.numpy()
        parts = (torch.from_numpy(content[p.offset:p.offset + p.size]) for p in self.places)
        return [part.view(p.dtype).view(p.shape) for part, p in zip(parts, self.places, strict=True)]


def aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def lay_out(specs: Iterable[tuple[Sequence[int], torch.dtype]]) -> Layout:
    """Shapes and dtypes in order -> their places, each at a multiple of ALIGNMENT."""
    places, offset = [], 0
    for shape, dtype in specs:
        place = Place(offset, tuple(shape), dtype)
        places.append(place)
        offset += aligned(place.size)
    return Layout(tuple(places), offset)


def lay_out_tensors(tensors: Iterable[Tensor]) -> Layout:
    return lay_out((tensor.shape, tensor.dtype) for tensor in tensors)

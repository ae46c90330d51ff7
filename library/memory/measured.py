"""What was found out about a model: its segments, what each keeps, computes and weighs. Plain records, without torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from library.memory.amounts import Work


@dataclass(frozen=True)
class Weight:
    """One parameter or buffer of a segment."""

    shape: tuple[int, ...]
    itemsize: int
    trained: bool
    parameter: bool = True

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    @property
    def size(self) -> int:
        """Bytes."""
        return self.count * self.itemsize


@dataclass(frozen=True)
class Segment:
    """A block, or what lies between two. Sets hold numbers of storages (see ``Measured.sizes``).

    ``saved``: what autograd keeps; ``inputs``: what it is called with (of blocks only); ``products``: results of matrix products,
    convolutions and attention; ``casts``: copies of weights in the dtype of autocast. ``forward_peak``: the most bytes above
    those at its beginning while it runs forward; ``backward_peak``: the same while it runs backward, when what it saved is
    there already and gradients of weights leave as soon as they are complete; ``carried``: bytes of gradients (and of the
    batch) that wait while it runs backward.
    """

    name: str
    weights: tuple[Weight, ...] = ()
    saved: frozenset[int] = frozenset()
    inputs: frozenset[int] = frozenset()
    products: frozenset[int] = frozenset()
    casts: frozenset[int] = frozenset()
    forward: Work = Work()
    backward: Work = Work()
    forward_peak: int = 0
    backward_peak: int = 0
    carried: int = 0
    output_bytes: int = 0

    def bytes_of(self, trained: bool | None = None) -> int:
        """Of parameters and buffers; only of those that train, or do not."""
        return sum(weight.size for weight in self.weights if trained is None or weight.trained == trained)

    @property
    def parameters(self) -> int:
        return sum(weight.count for weight in self.weights if weight.parameter)


@dataclass(frozen=True)
class Measured:
    """``segments`` in the order in which they run forward: gap, block, gap, block, ..., gap. ``sizes``: bytes of each storage."""

    segments: tuple[Segment, ...]
    sizes: tuple[int, ...]

    @property
    def blocks(self) -> tuple[Segment, ...]:
        return self.segments[1::2]

    @property
    def parameters(self) -> int:
        return sum(segment.parameters for segment in self.segments)

    def describe(self, j: int) -> str:
        """Segment ``j`` in words."""
        if j % 2:
            return f"block {(j + 1) // 2} of {len(self.blocks)} ({self.segments[j].name})"
        return f"what follows block {j // 2}" if j else "what precedes the blocks"

    def total(self, storages: frozenset[int] | set[int]) -> int:
        """Bytes of storages."""
        return sum(self.sizes[number] for number in storages)

    @property
    def saved_bytes(self) -> int:
        """All that autograd keeps when nothing is recomputed, casts of weights included."""
        return self.total(frozenset().union(*(segment.saved for segment in self.segments)))

    @property
    def forward(self) -> Work:
        return sum((segment.forward for segment in self.segments), Work())

    @property
    def backward(self) -> Work:
        """Without recompute."""
        return sum((segment.backward for segment in self.segments), Work())

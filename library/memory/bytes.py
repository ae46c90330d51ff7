"""What the memory engine needs and copies, as formulas of block sizes: for the planner, and held to what is counted in tests.

N streamed blocks, S = min(look_ahead + 1, N) slots, block ``i`` in slot ``i % S``. ``sizes[i]`` are the bytes of a block's flat
region (``region_bytes``), ``trained[i]`` those of its trained parameters at the front of it. "Per step" means in steady state.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from library.memory.layout import lay_out

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Copies:
    """Bytes over the bus: to the device and from it."""

    into: int
    out: int

    def __add__(self, other: Copies) -> Copies:
        return Copies(self.into + other.into, self.out + other.out)


def region_bytes(specs: Iterable[tuple[Sequence[int], torch.dtype]]) -> int:
    """Bytes of tensors side by side, each rounded up to the alignment: a block's region, on the host and in a slot."""
    return lay_out(specs).size


def slots(count: int, look_ahead: int) -> int:
    return min(look_ahead + 1, count)


def ring_bytes(sizes: Sequence[int], look_ahead: int) -> int:
    """Device bytes of a ring: every slot takes the largest block."""
    return slots(len(sizes), look_ahead) * max(sizes, default=0)


def host_bytes(sizes: Sequence[int]) -> int:
    """Pinned bytes of a ring."""
    return sum(sizes)


def weight_copies(sizes: Sequence[int], trained: Sequence[int], look_ahead: int, micro_batches: int = 1) -> Copies:
    """Per step. Forward finds blocks 0..S-1 in the ring, where the backward pass ended; backward finds the last S. Only the
    backward pass of the last micro-batch changes anything."""
    ring = slots(len(sizes), look_ahead)
    forward, backward = sum(sizes[ring:]), sum(sizes[:len(sizes) - ring])
    return Copies(micro_batches * (forward + backward), sum(trained))


def state_copies(sizes: Sequence[int], look_ahead: int) -> Copies:
    """Per step, for streamed optimizer states. They only take part in backward passes, so the ring starts from the blocks where
    the last one ended: 0..S-1, of which those that are also among the last S are found."""
    return Copies(_backward_only(sizes, look_ahead), sum(sizes))


def gradient_copies(trained: Sequence[int], look_ahead: int, micro_batches: int) -> Copies:
    """Per step, for the partial sums of streamed blocks: made by the first micro-batch, used up by the last one."""
    if micro_batches == 1:
        return Copies(0, 0)
    return Copies((micro_batches - 1) * _backward_only(trained, look_ahead), (micro_batches - 1) * sum(trained))


def forward_copies(sizes: Sequence[int], look_ahead: int) -> Copies:
    """For each of many forward passes without gradients: blocks that have a slot to themselves stay."""
    ring = slots(len(sizes), look_ahead)
    alone = [i for i in range(ring) if i + ring >= len(sizes)]
    return Copies(sum(sizes) - sum(sizes[i] for i in alone), 0)


def _backward_only(sizes: Sequence[int], look_ahead: int) -> int:
    ring = slots(len(sizes), look_ahead)
    return sum(sizes) - sum(sizes[len(sizes) - ring:ring])

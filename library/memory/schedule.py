"""Which streamed blocks should be on the device at which moment: pure functions of three numbers, made into tables once.

Block ``i`` of the N streamed ones always uses slot ``i % slots``. So the slots form a ring in both directions: forward, the
block that has just run frees the slot of the one ``slots`` places later; backward, of the one ``slots`` places earlier. The
last ``slots`` blocks of a forward pass are the first of the backward pass and stay where they are, as do the first ones from
the end of a backward pass to the next forward pass. Weights may therefore point into their slot for good.

The tables only say what to copy in ahead of time. Whoever needs a block that is not there gets it all the same, just later.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

Wanted = tuple[int, ...]
"""Numbers of streamed blocks (0 is the first one streamed), the most urgent first, each in a slot of its own."""


@dataclass(frozen=True)
class Schedule:
    """What to have when the model's block ``k`` is entered: ``table[k]``. A streamed block is the first of its own entry.

    ``forward``: a backward pass follows. ``forward_only``: another forward pass follows. ``turn``: what the backward pass
    needs first.
    """

    slots: int
    forward: tuple[Wanted, ...]
    forward_only: tuple[Wanted, ...]
    backward: tuple[Wanted, ...]

    @property
    def turn(self) -> Wanted:
        return self.backward[-1]


def evenly(count: int, chosen: int) -> tuple[int, ...]:
    """``chosen`` of the numbers 0..count-1, spread evenly: the middles of ``chosen`` equal parts."""
    assert 0 <= chosen <= count, (count, chosen)
    return tuple((2 * index + 1) * count // (2 * chosen) for index in range(chosen))


def make_schedule(count: int, streamed: Sequence[int], look_ahead: int) -> Schedule:
    """``count`` blocks of which those at the places ``streamed`` (ascending) are streamed, ``look_ahead`` copies under way while
    one block computes (0: no overlap)."""
    assert look_ahead >= 0 and list(streamed) == sorted(set(streamed)) and all(0 <= place < count for place in streamed)
    total = len(streamed)
    slots = min(look_ahead + 1, total)
    up, down = range(total), range(total - 1, -1, -1)
    before = [sum(place < k for place in streamed) for k in range(count + 1)]  # streamed blocks in front of block k
    return Schedule(slots,
                    tuple(_first_per_slot((*up[before[k]:], *down), slots) for k in range(count)),
                    tuple(_first_per_slot((*up[before[k]:], *up), slots) for k in range(count)),
                    tuple(_first_per_slot((*down[total - before[k + 1]:], *up), slots) for k in range(count)))


def _first_per_slot(sequence: Iterable[int], slots: int) -> Wanted:
    """The blocks of ``sequence`` that nobody uses the slot of earlier."""
    taken: dict[int, int] = {}
    for block in sequence:
        taken.setdefault(block % slots, block)
        if len(taken) == slots:
            break
    return tuple(taken.values())

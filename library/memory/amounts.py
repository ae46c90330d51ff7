"""Work, copies and time: what is added up. Plain records, without torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Work:
    """What a card has to do: ``flops`` in matrix products, convolutions and attention (2 for each multiplication with its
    addition), the ``traffic`` of all other operations, in bytes read from and written to memory, and the number of ``calls``,
    products included, each of which Python has to start."""

    flops: int = 0
    traffic: int = 0
    calls: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.traffic + other.traffic, self.calls + other.calls)


@dataclass(frozen=True)
class Copies:
    """Bytes over the bus in one pass: to the device and from it."""

    into: int = 0
    out: int = 0

    def __add__(self, other: Copies) -> Copies:
        return Copies(self.into + other.into, self.out + other.out)

    def seconds(self, bus: float) -> float:
        """Both ways at once, each at ``bus`` bytes per second."""
        return max(self.into, self.out) / bus


@dataclass(frozen=True)
class Time:
    """Seconds of one optimizer step on one card, and whether no copy is waited for."""

    forward: float
    backward: float
    update: float
    copies: float
    hidden: bool

    @property
    def total(self) -> float:
        return self.forward + self.backward + self.update

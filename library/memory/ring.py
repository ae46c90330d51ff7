"""The contents of N blocks in host memory, and a few slots of device memory through which they pass."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from library.memory.transport import Lane, Transport

_POISON = 0xFF  # bytes of which every floating-point format makes a NaN


class Ring:
    """Block ``i`` has ``host[i]`` (sizes[i],) uint8 for good, and while it is on the device ``device[i]``, the front of slot
    ``i % slots``. Of a changed block the first ``changing[i]`` bytes are copied out.

    A block that was never ``changed`` has no content unless ``filled`` is set: nothing is copied in for it. Every method only
    issues work and returns; none allocates. With ``poison`` (CPU, for tests) each block has a slot to itself, which is filled
    with NaN as long as another block would have it.
    """

    def __init__(self, host: Sequence[Tensor], changing: Sequence[int], slots: int, transport: Transport, poison: bool = False):
        self.host = tuple(host)
        self.filled = [False] * len(host)
        self.slots = slots
        self.active = True  # else the owner lets it rest
        self.bytes_in = self.bytes_out = 0
        self._transport = transport
        sizes = [region.numel() for region in host]
        places = [transport.space(size) for size in (sizes if poison else [max(sizes)] * slots)]
        self.device = tuple(places[i if poison else i % slots][:size] for i, size in enumerate(sizes))
        self._changing = tuple((self.host[i][:size], self.device[i][:size]) for i, size in enumerate(changing))
        self._occupant: list[int | None] = [None] * slots
        self._dirty = [False] * slots
        self._loaded = [transport.event() for _ in range(slots)]
        self._stored = [transport.event() for _ in range(slots)]
        self._poison = poison
        if poison:
            for place in places:
                place.fill_(_POISON)

    def bring(self, block: int) -> None:
        """Start the copy of ``block`` to the device, unless it is there. What compute has been given so far still sees its slot
        as it is."""
        slot = block % self.slots
        if self._occupant[slot] == block or not self.filled[block]:
            return
        self._clear(slot)
        # A block is only ever copied out of its own slot: once that is done, slot and host copy may both be used again.
        self._transport.copy(self.device[block], self.host[block], Lane.IN, self._stored[slot], self._loaded[slot])
        self._occupant[slot] = block
        self.bytes_in += self.host[block].numel()

    def use(self, block: int) -> None:
        """What compute is given from now on finds ``block`` on the device; without content, its slot is free to write to."""
        slot = block % self.slots
        self.bring(block)
        if self._occupant[slot] != block:
            self._clear(slot)
            self._occupant[slot] = block
            self._transport.wait(self._stored[slot])
        self._transport.wait(self._loaded[slot])

    def changed(self, block: int) -> None:
        """Compute has been told to write to the block, which is in use."""
        slot = block % self.slots
        assert self._occupant[slot] == block, "changed while it is not on the device"
        self._dirty[slot] = self.filled[block] = True

    def store(self, block: int) -> None:
        """Start the copy to the host if the block was changed."""
        slot = block % self.slots
        if self._occupant[slot] == block and self._dirty[slot]:
            target, source = self._changing[block]
            self._transport.copy(target, source, Lane.OUT, self._loaded[slot], self._stored[slot])
            self._dirty[slot] = False
            self.bytes_out += target.numel()

    def store_all(self) -> None:
        for occupant in self._occupant:
            if occupant is not None:
                self.store(occupant)

    def drop(self, block: int) -> None:
        """The block has no content any more."""
        self.filled[block] = False
        if self._occupant[block % self.slots] == block:
            self._dirty[block % self.slots] = False

    def forget(self) -> None:
        """What the slots hold is out of date: the host copies are what counts."""
        for slot in range(self.slots):
            self._dirty[slot] = False
            self._clear(slot)

    def _clear(self, slot: int) -> None:
        occupant = self._occupant[slot]
        if occupant is None:
            return
        self.store(occupant)  # nothing to do unless a step was broken off
        self._occupant[slot] = None
        if self._poison:
            self.device[occupant].fill_(_POISON)

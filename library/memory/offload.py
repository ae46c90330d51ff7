"""Inputs of recomputed blocks wait for the backward pass in pinned host memory, copied over a stream of their own."""

from __future__ import annotations

import weakref
from collections import defaultdict, deque
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from library.memory.transport import Lane, Transport

SMALLEST_BYTES = 1024**2  # modulation vectors and the like: not worth a copy


class Offload:
    """Keeps what blocks save of their inputs; give it to ``Recompute``. Works beside ``Streaming``, on lanes of its own.

    ``prefetch``: how many inputs are on their way back while a block is recomputed. Host buffers are made when they are first
    needed and used again for ever after.
    """

    def __init__(self, transport: Transport, prefetch: int = 2, smallest_bytes: int = SMALLEST_BYTES):
        self._transport, self._prefetch, self._smallest = transport, prefetch, smallest_bytes
        self._free: dict[int, list[_Buffer]] = defaultdict(list)
        self._kept: list[weakref.ref[_Kept]] = []  # in the order of the forward pass
        self._leaving: deque[_Kept] = deque()
        self.bytes_out = self.bytes_in = 0

    def inputs(self) -> AbstractContextManager:
        """To run ``torch.utils.checkpoint`` in, without re-entry: what it saves there are the inputs of the block alone."""
        return torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)

    def _pack(self, tensor: Tensor) -> Tensor | _Kept:
        size = tensor.numel() * tensor.itemsize
        if tensor.device != self._transport.device or size < self._smallest or isinstance(tensor, torch.nn.Parameter):
            return tensor
        again = next((k for k in (ref() for ref in self._kept[-4:]) if k is not None and k.is_of(tensor)), None)
        if again is not None:
            return again
        kept = _Kept(self, tensor.detach(), self._free[size].pop() if self._free[size] else _Buffer(self._transport, size))
        self._kept = [ref for ref in self._kept if ref() is not None] + [weakref.ref(kept)]
        self._leaving.append(kept)
        while len(self._leaving) > 2:  # by now the copy is done: nobody really waits
            self._leaving.popleft().let_go()
        self.bytes_out += size
        return kept

    def _unpack(self, packed: Tensor | _Kept) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        while self._leaving:
            self._leaving.popleft().let_go()
        order = [kept for ref in self._kept if (kept := ref()) is not None]
        here = order.index(packed)
        for kept in reversed(order[max(0, here - self._prefetch):here + 1]):
            kept.fetch()
        return packed.tensor()


class _Buffer:
    """Pinned bytes. Copies in both directions share a lane, so a buffer may be used again as soon as its copy is issued."""

    def __init__(self, transport: Transport, size: int):
        self.bytes = transport.host(size)
        self.out, self.back = transport.event(), transport.event()


class _Kept:
    """One tensor: on the device, on the host, or both. Belongs to the graph; with it the buffer becomes free again."""

    def __init__(self, owner: Offload, tensor: Tensor, buffer: _Buffer):
        self._owner, self._buffer = owner, buffer
        self._shape, self._dtype = tensor.shape, tensor.dtype
        self._address, self._version = tensor.data_ptr(), tensor._version
        self._here: Tensor | None = tensor
        self._fetched = False
        self._copied = tensor.contiguous()
        owner._transport.copy(buffer.bytes, _as_bytes(self._copied), Lane.ACTIVATIONS, None, buffer.out)

    def is_of(self, tensor: Tensor) -> bool:
        return (self._here is not None and not self._fetched and tensor.data_ptr() == self._address and
                tensor._version == self._version and tensor.shape == self._shape and tensor.dtype == self._dtype)

    def let_go(self) -> None:
        """Give up the device's copy: whoever gets its memory must wait until it has been read."""
        if self._copied is not None:
            self._owner._transport.wait(self._buffer.out)
            self._here = self._copied = None

    def fetch(self) -> None:
        if self._here is None:
            self._here = torch.empty(self._shape, dtype=self._dtype, device=self._owner._transport.device)
            self._owner._transport.copy(_as_bytes(self._here), self._buffer.bytes, Lane.ACTIVATIONS, self._buffer.out,
                                        self._buffer.back)
            self._fetched = True
            self._owner.bytes_in += self._buffer.bytes.numel()

    def tensor(self) -> Tensor:
        if self._fetched:
            self._owner._transport.wait(self._buffer.back)
        return self._here

    def __del__(self):
        self._owner._free[self._buffer.bytes.numel()].append(self._buffer)


def _as_bytes(tensor: Tensor) -> Tensor:
    return tensor.view(-1).view(torch.uint8)

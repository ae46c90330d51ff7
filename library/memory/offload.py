"""Inputs of recomputed blocks wait for the backward pass in pinned host memory, copied over a stream of their own."""

from __future__ import annotations

import weakref
from collections import defaultdict, deque
from contextlib import AbstractContextManager

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

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
        alive = [kept for ref in self._kept if (kept := ref()) is not None]
        again = next((kept for kept in alive if kept.is_of(tensor)), None)  # what all blocks get, as encoded text
        if again is not None:
            return again
        kept = _Kept(self, tensor.detach(), self._free[size].pop() if self._free[size] else _Buffer(self._transport, size))
        self._kept = [weakref.ref(one) for one in (*alive, kept)]
        self._leaving.append(kept)
        while len(self._leaving) > 2:  # by now the copy is done: nobody really waits
            self._leaving.popleft().let_go()
        self.bytes_out += size
        return kept

    def _unpack(self, packed: Tensor | _Kept) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        self._leaving.clear()  # the last ones of the forward pass are here still and are the first to be needed
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
        self._shape, self._dtype, self._stride = tensor.shape, tensor.dtype, tensor.stride()
        # Weak, so that it keeps no memory; while it is there, no other storage gets the same number.
        self._storage, self._version = StorageWeakRef(tensor.untyped_storage()), tensor._version
        self._offset = tensor.storage_offset()
        self._here: Tensor | None = tensor
        self._fetched = False
        # Strides come back as they were, so that the same kernels run again; gaps and overlaps do not.
        dense = torch.empty_like(tensor, device="meta").stride() == tensor.stride()
        self._copied = tensor if dense else tensor.contiguous()
        self._strides_back = self._copied.stride()
        owner._transport.copy(buffer.bytes, _as_bytes(self._copied), Lane.ACTIVATIONS, None, buffer.out)

    def is_of(self, tensor: Tensor) -> bool:
        return (tensor.untyped_storage()._cdata == self._storage.cdata and tensor.storage_offset() == self._offset and
                tensor._version == self._version and tensor.shape == self._shape and tensor.dtype == self._dtype and
                tensor.stride() == self._stride)

    def let_go(self) -> None:
        """Give up the device's copy: whoever gets its memory must wait until it has been read."""
        if self._copied is not None:
            self._owner._transport.wait(self._buffer.out)
            self._here = self._copied = None

    def fetch(self) -> None:
        if self._here is None:
            self._here = torch.empty_strided(self._shape, self._strides_back, dtype=self._dtype,
                                             device=self._owner._transport.device)
            self._owner._transport.copy(_as_bytes(self._here), self._buffer.bytes, Lane.ACTIVATIONS, self._buffer.out,
                                        self._buffer.back)
            self._fetched = True
            self._owner.bytes_in += self._buffer.bytes.numel()

    def tensor(self) -> Tensor:
        if self._fetched:
            self._owner._transport.wait(self._buffer.back)
        return self._here

    def __del__(self):
        if self._copied is not None:  # memory of the device is about to be given up, as in let_go
            self._owner._transport.wait(self._buffer.out)
        if self._fetched:
            self._owner._transport.wait(self._buffer.back)
        self._owner._free[self._buffer.bytes.numel()].append(self._buffer)


def _as_bytes(tensor: Tensor) -> Tensor:
    return tensor.as_strided((tensor.numel(),), (1,), tensor.storage_offset()).view(torch.uint8)

"""Copies between host and device: on a GPU over streams of their own, ordered by events; on a CPU plain memcpys.

Everything else of the memory engine is written against ``Transport``, so that it runs, and is tested, without a GPU. The host
never waits except in ``drain``.
"""

from __future__ import annotations

import enum
import mmap
import sys
from contextlib import suppress
from typing import Any, Protocol

import torch
from torch import Tensor

from library.errors import UserError


class Lane(enum.Enum):
    """The copies of one lane happen in the order in which they are asked for; lanes run beside each other."""

    IN = enum.auto()
    OUT = enum.auto()
    ACTIVATIONS = enum.auto()


class Transport(Protocol):
    """``compute`` below is the stream on which torch puts the kernels of the calling thread."""

    device: torch.device
    allocations: int
    """Host regions, device regions and events made so far: constant once training is in its stride."""

    def host(self, size: int) -> Tensor:
        """(size,) uint8 of host memory that the device can read, of exactly this size."""

    def space(self, size: int) -> Tensor:
        """(size,) uint8 of device memory."""

    def event(self) -> Any:
        """A point in the work of a stream, to be set again and again; until the first time nobody waits for it."""

    def copy(self, target: Tensor, source: Tensor, lane: Lane, after: Any, done: Any) -> None:
        """Copy once compute has done all that it was given so far and ``after`` has passed; then ``done`` passes."""

    def wait(self, event: Any) -> None:
        """What compute is given from now on runs after ``event``."""

    def drain(self) -> None:
        """The host waits until every copy is done."""

    def close(self) -> None:
        """Unpin the host regions. Their content stays, and they live as long as tensors look into them."""


def open_transport(device: torch.device) -> Transport:
    """The transport of ``device``, which is a CPU or a CUDA device (ROCm calls itself that)."""
    if device.type == "cpu":
        return CpuTransport()
    if device.type == "cuda":
        return CudaTransport(device)
    raise UserError(f"weights cannot be streamed to a device of type {device.type!r}", remedy="leave --blocks_to_swap out")


class CpuTransport:
    """Host and device are the same memory; a copy is done when ``copy`` returns."""

    def __init__(self):
        self.device = torch.device("cpu")
        self.allocations = 0

    def host(self, size: int) -> Tensor:
        self.allocations += 1
        return torch.empty(size, dtype=torch.uint8)

    def space(self, size: int) -> Tensor:
        return self.host(size)

    def event(self) -> None:
        return None

    def copy(self, target: Tensor, source: Tensor, lane: Lane, after: Any, done: Any) -> None:
        target.copy_(source)

    def wait(self, event: Any) -> None:
        pass

    def drain(self) -> None:
        pass

    def close(self) -> None:
        pass


class CudaTransport:
    """One stream for each lane. Regions are made once and outlive all copies, so the caching allocator needs no
    ``record_stream``: that one would keep freed blocks back until it happens to look at their events."""

    def __init__(self, device: torch.device):
        self.device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        self.allocations = 0
        self._streams = {lane: torch.cuda.Stream(self.device) for lane in Lane}
        self._boundary = torch.cuda.Event()
        self._pinned: list[Tensor] = []

    def host(self, size: int) -> Tensor:
        self.allocations += 1
        region = _pages(size)
        # torch.empty(pin_memory=True) would round up to a power of two: 38 GB for 22 GB of blocks (measured on FLUX.1's sizes).
        error = torch.cuda.cudart().cudaHostRegister(region.data_ptr(), region.numel(), 0)
        if int(error) != 0:
            raise UserError(f"{size / 1e9:.2f} GB of host memory could not be pinned ({error})",
                            remedy="stream fewer blocks, or close programs that use memory")
        self._pinned.append(region)
        return region[:size]

    def space(self, size: int) -> Tensor:
        self.allocations += 1
        return torch.empty(size, dtype=torch.uint8, device=self.device)

    def event(self) -> torch.cuda.Event:
        self.allocations += 1
        return torch.cuda.Event()

    def copy(self, target: Tensor, source: Tensor, lane: Lane, after: torch.cuda.Event | None, done: torch.cuda.Event) -> None:
        stream = self._streams[lane]
        self._boundary.record(torch.cuda.current_stream(self.device))
        stream.wait_event(self._boundary)
        if after is not None:
            stream.wait_event(after)
        with torch.cuda.stream(stream):
            target.copy_(source, non_blocking=True)
        done.record(stream)

    def wait(self, event: torch.cuda.Event) -> None:
        torch.cuda.current_stream(self.device).wait_event(event)

    def drain(self) -> None:
        torch.cuda.current_stream(self.device).synchronize()
        for stream in self._streams.values():
            stream.synchronize()

    def close(self) -> None:
        self.drain()
        for region in self._pinned:
            torch.cuda.cudart().cudaHostUnregister(region.data_ptr())
        self._pinned.clear()


def _pages(size: int) -> Tensor:
    """Whole pages of anonymous memory: two registered regions must not share a page. Given back when nobody looks at them."""
    length = max(1, -(-size // mmap.PAGESIZE)) * mmap.PAGESIZE
    if sys.platform == "win32":
        pages = mmap.mmap(-1, length)
    else:
        pages = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # the default would be shared memory
        # A forked process (a data loader's worker) would share the pages until one of the two writes: the writer then gets a
        # copy, and the device goes on with the original. Large pages are faulted in and pinned much faster.
        for advice in ("MADV_DONTFORK", "MADV_HUGEPAGE"):
            if hasattr(mmap, advice):
                with suppress(OSError):  # a kernel built without it
                    pages.madvise(getattr(mmap, advice))
    return torch.frombuffer(pages, dtype=torch.uint8)

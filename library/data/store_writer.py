"""Writes records of a store while the encoder goes on: a thread hashes, streams and seals shards."""

from __future__ import annotations

import errno
import queue
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import numpy
import torch

from library.atomic import atomic_file, sweep
from library.checkpoint.dtypes import DTYPE_NAMES
from library.data.keys import KEY_BYTES
from library.data.shards import ITEM_BYTES, Field, Layout, ShardBuilder, shard_name
from library.errors import UserError

# A shard is sealed at whichever comes first: what a kill can lose is at most one of them.
SHARD_BYTES, SHARD_RECORDS, SHARD_SECONDS = 256 << 20, 4096, 120.0
QUEUE_RECORDS = 64
_LATE = object()


def record(tensors: Mapping[str, torch.Tensor], full: Mapping[str, int]) -> tuple[Layout, list[numpy.ndarray]]:
    """Layout and bytes of CPU tensors; of contiguous ones nothing is copied."""
    fields, parts = [], []
    # Wider numbers first, so that each tensor is aligned within the record
    for name, tensor in sorted(tensors.items(), key=lambda pair: (-pair[1].element_size(), pair[0])):
        assert tensor.device.type == "cpu", f"{name} is on {tensor.device}"
        length = full.get(name)
        assert length is None or (tensor.ndim and tensor.shape[0] <= length), f"{name}: {tuple(tensor.shape)} of {length}"
        fields.append(Field(name, DTYPE_NAMES[tensor.dtype], tuple(tensor.shape), length))
        assert ITEM_BYTES[fields[-1].dtype] == tensor.element_size()
        parts.append(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())
    return tuple(fields), parts


class Writer:
    """Puts records into shards of one folder. Use it as a context manager; leaving the block seals what was put.

    Also after an exception: every record that was put is whole, and encoding it cost time.
    """

    def __init__(self, folder: Path, kind: str):
        self._folder, self._kind = Path(folder), kind
        self._queue: queue.Queue = queue.Queue(QUEUE_RECORDS)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name=f"writer of {kind}", daemon=True)

    def __enter__(self) -> Writer:
        sweep(self._folder, f"{self._kind}-")
        self._thread.start()
        return self

    def put(self, key: bytes, tensors: Mapping[str, torch.Tensor], full: Mapping[str, int] | None = None) -> None:
        """Hand over CPU tensors, which must not be changed afterwards; waits while ``QUEUE_RECORDS`` are in the queue.

        ``key``: 16 bytes. ``full``: length of dim 0 that readers see, by name; a shorter tensor reads as followed by zeros.
        Raises what stopped the thread: UserError for a full disk or a folder without write access.
        """
        assert len(key) == KEY_BYTES, len(key)
        if self._error is not None:
            raise self._error
        self._queue.put((key, *record(tensors, full or {})))

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._queue.put(None)
        self._thread.join()
        if self._error is not None and kind is None:
            raise self._error

    def _work(self) -> None:
        try:
            self._write()
        except UserError as error:
            self._error = self._explain(error.__cause__ or error)
        except OSError as error:
            self._error = self._explain(error)
        except BaseException as error:
            self._error = error
        if self._error is not None:
            while self._take() is not None:
                pass  # a thread that waits to put must not wait for ever; its next call tells the error

    def _write(self) -> None:
        item = self._take()
        while item is not None:
            with atomic_file(self._folder / shard_name(self._kind)) as file:
                shard, until = ShardBuilder(file, self._kind), time.monotonic() + SHARD_SECONDS
                while item is not None and item is not _LATE:
                    shard.add(*item)
                    item = _LATE if _is_full(shard) else self._next(until)
                shard.finish()
            if item is _LATE:
                item = self._take()

    def _next(self, until: float) -> object:
        """The next record, None at the end, or ``_LATE``: an encoder that pauses must not keep a shard from being sealed."""
        try:
            return self._take(max(0.0, until - time.monotonic()))
        except queue.Empty:
            return _LATE

    def _take(self, seconds: float | None = None) -> object:
        """From the queue. The end stays there: after an error while the last shard is sealed it is waited for once more."""
        item = self._queue.get(timeout=seconds)
        if item is None:
            self._queue.put(None)
        return item

    def _explain(self, error: BaseException) -> UserError:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", -1))
        reason = getattr(error, "strerror", None) or str(error)
        return UserError("no space left on the disk for the cache" if full else f"the cache cannot be written: {reason}",
                         place=str(self._folder),
                         remedy="free some space or choose another --cache_dir; what was sealed before is kept and will be used"
                         if full else "make the folder writable or choose another --cache_dir")


def _is_full(shard: ShardBuilder) -> bool:
    return shard.data_bytes >= SHARD_BYTES or shard.records >= SHARD_RECORDS

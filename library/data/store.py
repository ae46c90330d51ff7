"""Encoded pictures and captions under keys of everything that decides their value: in shards on disk, or in memory.

A changed picture, caption, encoder or setting has another key, so it is encoded anew and nothing else is. Any number of
processes may write to one folder at once, each its own shards; nobody changes a sealed one.
"""

from __future__ import annotations

import math
import threading
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy
import torch
import xxhash

from library.checkpoint.dtypes import TORCH_DTYPES
from library.data.buffers import Buffers
from library.data.keys import KEY_BYTES
from library.data.lookup import MISSING, Lookup
from library.data.open_files import OpenFiles
from library.data.shards import Damaged, Field, Foreign, Layout, Shard, mark_bad, open_shard, set_aside, shard_files
from library.data.store_writer import Writer, record
from library.errors import UserError
from library.log import log

_AGAIN = "start again: it will be encoded anew"


@dataclass(frozen=True)
class Record:
    """A record on its way from one rank's memory to another's."""

    key: bytes
    tensors: dict[str, torch.Tensor]
    full: dict[str, int]


class Sink(Protocol):
    """What ``Store.writer`` gives."""

    def __enter__(self) -> Sink: ...

    def __exit__(self, *args: object) -> None: ...

    def put(self, key: bytes, tensors: Mapping[str, torch.Tensor], full: Mapping[str, int] | None = None) -> None: ...


class Store:
    """Named tensors under 16-byte keys, in shards of one or more folders, or in memory when there are none.

    ``kind`` begins the shards' names. Folders may not exist yet, and may be read-only as long as nothing is written.
    Rows are numbers that ``find`` gives; they stay valid for the life of the object. Reading is thread-safe.
    """

    def __init__(self, folders: Sequence[Path], kind: str):
        self.folders, self.kind = tuple(Path(folder) for folder in folders), kind
        self._buffers = Buffers()
        self._source: _Memory | _Disk = _Disk(self.folders, kind) if folders else _Memory()
        self.refresh()

    @property
    def in_memory(self) -> bool:
        return isinstance(self._source, _Memory)

    def refresh(self) -> None:
        """See the shards that were finished since, by this process or by others."""
        self._source.refresh()

    def __len__(self) -> int:
        """Records known; equal keys in several shards count each."""
        return len(self._source)

    def find(self, keys: numpy.ndarray) -> numpy.ndarray:
        """(N, 16) uint8 -> (N,) int64 row numbers, -1 where a key is missing. A million keys take about a second."""
        return self._source.find(keys)

    def writer(self, folder: int = 0) -> Sink:
        """Records put into it are found after its block and ``refresh`` (in memory: at once)."""
        return self._source.writer(folder)

    def read(self, row: int) -> dict[str, torch.Tensor]:
        """One record."""
        return {name: tensor[0] for name, tensor in self.read_many([row]).items()}

    def read_many(self, rows: Iterable[int], absent: Mapping[str, float] | None = None) -> dict[str, torch.Tensor]:
        """Records stacked to (B, ...) per name; their bytes go from the file straight into the batch.

        Tensors stored shorter than their full length are followed by zeros. ``absent``: the value of a tensor in records
        that lack it while others have it. Raises UserError for a record that was damaged or went away since the start.
        """
        rows = [int(row) for row in rows]
        layouts = [self._source.layout(row) for row in rows]
        batch = _allocate(layouts, self._buffers)
        views = {name: tensor.view(len(rows), -1).view(torch.uint8).numpy() if tensor.numel() else None
                 for name, tensor in batch.items()}
        for index, (row, layout) in enumerate(zip(rows, layouts, strict=True)):
            parts = []
            for field in layout:
                view = views[field.name]
                if view is None:
                    continue
                if field.nbytes:
                    parts.append(view[index, :field.nbytes].data)
                view[index, field.nbytes:] = 0
            self._source.read(row, parts)
            if len(layout) < len(batch):
                for name in batch.keys() - {field.name for field in layout}:
                    batch[name][index] = _value(absent, name)
        return batch

    def export(self, rows: Iterable[int]) -> list[Record]:
        """Records of an in-memory store for ``absorb`` on another rank."""
        assert isinstance(self._source, _Memory), "shards are shared through the file system"
        return [self._source.records[int(row)] for row in rows]

    def absorb(self, records: Iterable[Record]) -> None:
        """Add what another rank's in-memory store exported; keys known here are passed over."""
        assert isinstance(self._source, _Memory), "shards are shared through the file system"
        for item in records:
            self._source.put(item.key, item.tensors, item.full)


def _allocate(layouts: Sequence[Layout], buffers: Buffers) -> dict[str, torch.Tensor]:
    """An uninitialised batch for records of these layouts."""
    fields: dict[str, Field] = {}
    for layout in dict.fromkeys(layouts):
        for field in layout:
            known = fields.setdefault(field.name, field)
            assert (known.dtype, known.full_shape) == (field.dtype, field.full_shape), (
                f"{field.name}: records of {known.full_shape} {known.dtype} and {field.full_shape} {field.dtype} in one batch")
    batch = {}
    for name, field in fields.items():
        shape, dtype = (len(layouts), *field.full_shape), TORCH_DTYPES[field.dtype]
        batch[name] = buffers.empty(math.prod(shape) * dtype.itemsize).view(dtype).view(shape)
    return batch


def _value(absent: Mapping[str, float] | None, name: str) -> float:
    assert absent is not None and name in absent, f"only some records of a batch have {name!r}"
    return absent[name]


class _Memory:
    """Records as tensors, in the order in which they came."""

    def __init__(self) -> None:
        self.records: list[Record] = []
        self._layouts: list[Layout] = []
        self._known: dict[bytes, int] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.records)

    def refresh(self) -> None:
        """Nothing can come from outside."""

    def find(self, keys: numpy.ndarray) -> numpy.ndarray:
        data, get = numpy.ascontiguousarray(keys, dtype=numpy.uint8).tobytes(), self._known.get
        return numpy.array([get(data[at:at + KEY_BYTES], MISSING) for at in range(0, len(data), KEY_BYTES)], dtype=numpy.int64)

    def layout(self, row: int) -> Layout:
        return self._layouts[row]

    def read(self, row: int, parts: Sequence[memoryview]) -> None:
        tensors = self.records[row].tensors
        stored = (tensors[field.name] for field in self._layouts[row] if field.nbytes)
        for part, tensor in zip(parts, stored, strict=True):
            torch.frombuffer(part, dtype=torch.uint8).copy_(tensor.reshape(-1).view(torch.uint8))

    def writer(self, folder: int) -> Sink:
        return _MemoryWriter(self)

    def put(self, key: bytes, tensors: Mapping[str, torch.Tensor], full: Mapping[str, int]) -> None:
        layout, _ = record(tensors, full)
        kept = {name: _owned(tensor) for name, tensor in tensors.items()}
        with self._lock:
            if key not in self._known:
                self.records.append(Record(key, kept, dict(full)))
                self._layouts.append(layout)
                self._known[key] = len(self.records) - 1


class _MemoryWriter:
    def __init__(self, memory: _Memory):
        self._memory = memory

    def __enter__(self) -> _MemoryWriter:
        return self

    def __exit__(self, *args: object) -> None:
        pass

    def put(self, key: bytes, tensors: Mapping[str, torch.Tensor], full: Mapping[str, int] | None = None) -> None:
        assert len(key) == KEY_BYTES, len(key)
        self._memory.put(key, tensors, full or {})


def _owned(tensor: torch.Tensor) -> torch.Tensor:
    """Contiguous, and not a view that keeps (and pickles) a whole batch."""
    tensor = tensor.detach().contiguous()
    return tensor.clone() if tensor.untyped_storage().nbytes() > tensor.nbytes else tensor


class _Disk:
    """Records in sealed shards. Row numbers count through the shards in the order in which they were seen."""

    def __init__(self, folders: Sequence[Path], kind: str):
        self._folders, self._kind = folders, kind
        self._shards: list[Shard] = []
        self._ends: list[int] = []  # the row number after each shard's last
        self._seen: set[Path] = set()
        self._lookup = Lookup()
        self._files = OpenFiles()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._lookup)

    def refresh(self) -> None:
        with self._lock:
            keys, rows = [], []
            for folder in dict.fromkeys(self._folders):
                for path in _listed(folder, self._kind):
                    if path in self._seen:
                        continue
                    self._seen.add(path)
                    shard = _opened(path, self._kind)
                    if shard is None:
                        continue
                    first = self._ends[-1] if self._ends else 0
                    good = ~shard.bad()
                    keys.append(shard.keys[good])
                    rows.append(numpy.arange(first, first + len(shard))[good])
                    self._shards.append(replace(shard, keys=None))  # the lookup has them
                    self._ends.append(first + len(shard))
            if keys:
                self._lookup = self._lookup.extended(numpy.concatenate(keys), numpy.concatenate(rows))

    def find(self, keys: numpy.ndarray) -> numpy.ndarray:
        return self._lookup.find(keys)

    def writer(self, folder: int) -> Sink:
        return Writer(self._folders[folder], self._kind)

    def layout(self, row: int) -> Layout:
        shard, at = self._locate(row)
        return shard.layouts[shard.layout[at]]

    def read(self, row: int, parts: Sequence[memoryview]) -> None:
        shard, at = self._locate(row)
        try:
            whole = self._files.read_into(shard.path, int(shard.offsets[at]), parts)
        except FileNotFoundError:
            raise UserError("this file of the cache is gone", place=str(shard.path), remedy=_AGAIN) from None
        except OSError as error:
            raise UserError(f"this file of the cache cannot be read: {error.strerror or error}", place=str(shard.path),
                            remedy="check the disk, or remove the file and start again") from None
        if not whole or _digest(parts) != int(shard.xxh3[at]):
            self._report_damage(row, shard, at)

    def _locate(self, row: int) -> tuple[Shard, int]:
        assert 0 <= row < (self._ends[-1] if self._ends else 0), f"no row {row}"
        number = bisect_right(self._ends, row)
        shard = self._shards[number]
        return shard, row - self._ends[number] + len(shard)

    def _report_damage(self, row: int, shard: Shard, at: int) -> None:
        with self._lock:
            self._lookup = self._lookup.without(row)
        try:
            noted = mark_bad(shard.path, open_shard(shard.path).keys[at].tobytes())
        except (OSError, Damaged, Foreign):
            noted = True  # cut off or gone: the next start sees that by itself
        raise UserError("a record of this file of the cache is damaged (its checksum does not match)", place=str(shard.path),
                        remedy=_AGAIN if noted else "the folder cannot be written: remove the file by hand, then start again")


def _digest(parts: Sequence[memoryview]) -> int:
    if len(parts) == 1:
        return xxhash.xxh3_64_intdigest(parts[0])
    digest = xxhash.xxh3_64()
    for part in parts:
        digest.update(part)
    return digest.intdigest()


def _listed(folder: Path, kind: str) -> list[Path]:
    try:
        return shard_files(folder, kind)
    except OSError as error:
        raise UserError(f"the folder of the cache cannot be read: {error.strerror or error}", place=str(folder),
                        remedy="change its permissions or choose another --cache_dir") from None


def _opened(path: Path, kind: str) -> Shard | None:
    """None, and one warning, for a file that cannot be used; its records count as missing."""
    try:
        shard = open_shard(path)
        if shard.kind != kind:
            raise Foreign(f"it holds {shard.kind}")
        return shard
    except FileNotFoundError:
        return None  # removed since the folder was listed
    except Damaged as error:
        aside = "set aside" if set_aside(path) else "passed over"
        log.warning("%s is damaged (%s); it was %s and what it held will be encoded anew", path, error, aside)
    except (Foreign, OSError) as error:
        log.warning("%s is not used as a cache: %s", path, error)
    return None

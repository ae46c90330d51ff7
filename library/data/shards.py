"""Shards: many records of named tensors in one safetensors file that is written once and never changed.

A shard is an ordinary safetensors file, so anyone can open it: ``data`` holds the bytes of all records end to end, the
other tensors are its index (a row per record): ``keys`` (16 bytes), ``offsets`` and ``lengths`` within ``data``, ``xxh3``
(xxh3_64 of the record's bytes) and ``layout``, the number of an entry of ``layouts`` (JSON: the tensors that stand in a
record, in order). The header has a fixed size, so that records can be streamed before their number is known. The file is
written aside, fsynced and renamed (library/atomic.py): a reader sees a whole shard or none.

Beside a shard may stand ``<shard>.bad``: keys, in hexadecimal, of records that were found damaged; they count as missing.
"""

from __future__ import annotations

import json
import math
import os
import re
import secrets
import struct
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy
import xxhash

from library.data.keys import KEY_BYTES

FORMAT = "kiln-shard-1"
HEADER_BYTES = 4096  # with the eight bytes of its length; the data then begins on a page
SUFFIX, BAD_SUFFIX, DAMAGED_SUFFIX = ".safetensors", ".bad", ".damaged"
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I64": 8, "I32": 4, "I16": 2, "I8": 1,
              "U8": 1, "BOOL": 1}
# Wider numbers first: every column is aligned when the data's length is a multiple of eight.
NAME = re.compile(r"([a-z]+)-\d{8}T\d{9}-\d+-[0-9a-f]{8}\.safetensors(\.bad|\.damaged)?")  # of shards and what stands beside
_COLUMNS = (("offsets", "I64", "<i8"), ("lengths", "I64", "<i8"), ("xxh3", "U64", "<u8"), ("layout", "I32", "<i4"),
            ("keys", "U8", "u1"), ("layouts", "U8", "u1"))


class Damaged(ValueError):
    """The file was one of ours and is cut off or altered."""


class Foreign(ValueError):
    """The file is not one of ours, or of a later version."""


@dataclass(frozen=True)
class Field:
    """One tensor of a record. ``full``: the length of dim 0 that readers see, when fewer rows are stored (the rest is zero)."""

    name: str
    dtype: str  # safetensors' name
    shape: tuple[int, ...]  # as stored
    full: int | None = None

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]

    @property
    def full_shape(self) -> tuple[int, ...]:
        return self.shape if self.full is None else (self.full, *self.shape[1:])


Layout = tuple[Field, ...]  # in the order of the bytes, without gaps


def layout_bytes(layout: Layout) -> int:
    return sum(field.nbytes for field in layout)


def shard_name(kind: str) -> str:
    """Unique on every machine that shares the folder; later ones sort later."""
    now = time.time()
    stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime(now)) + f"{int(now % 1 * 1000):03d}"
    return f"{kind}-{stamp}-{os.getpid()}-{secrets.token_hex(4)}{SUFFIX}"


class ShardBuilder:
    """Streams records into an open, empty file; ``finish`` adds the index and the header."""

    def __init__(self, file: BinaryIO, kind: str):
        self.file, self.kind = file, kind
        self.data_bytes = 0
        self._layouts: dict[Layout, int] = {}
        self._rows: list[tuple[bytes, int, int, int, int]] = []  # key, offset, length, xxh3, layout
        file.write(bytes(HEADER_BYTES))

    @property
    def records(self) -> int:
        return len(self._rows)

    def add(self, key: bytes, layout: Layout, parts: Sequence[memoryview | numpy.ndarray | bytes]) -> None:
        """``parts``: the bytes of the layout's tensors, in order; or the whole record in any division."""
        assert len(key) == KEY_BYTES, len(key)
        digest, length = xxhash.xxh3_64(), 0
        for part in parts:
            digest.update(part)
            length += memoryview(part).nbytes
            self.file.write(part)
        assert length == layout_bytes(layout), "the bytes are not those of the layout"
        number = self._layouts.setdefault(layout, len(self._layouts))
        self._rows.append((key, self.data_bytes, length, digest.intdigest(), number))
        self.data_bytes += length

    def finish(self) -> None:
        padding = -self.data_bytes % 8
        self.file.write(bytes(padding))
        keys, offsets, lengths, digests, numbers = zip(*self._rows)
        values = {"offsets": offsets, "lengths": lengths, "xxh3": digests, "layout": numbers}
        columns = {name: numpy.array(values[name], dtype=kind) for name, _, kind in _COLUMNS if name in values}
        columns["keys"] = numpy.frombuffer(b"".join(keys), dtype=numpy.uint8).reshape(-1, KEY_BYTES)
        layouts = [[[field.name, field.dtype, field.shape, field.full] for field in layout] for layout in self._layouts]
        columns["layouts"] = numpy.frombuffer(json.dumps(layouts, separators=(",", ":")).encode(), dtype=numpy.uint8)
        self.data_bytes += padding
        tensors = {"data": {"dtype": "U8", "shape": [self.data_bytes], "data_offsets": [0, self.data_bytes]}}
        position, checksum = self.data_bytes, xxhash.xxh3_64()
        for name, dtype, _ in _COLUMNS:
            column = columns[name]
            checksum.update(column)
            self.file.write(memoryview(column).cast("B"))
            tensors[name] = {"dtype": dtype, "shape": column.shape, "data_offsets": [position, position + column.nbytes]}
            position += column.nbytes
        metadata = {"kiln": FORMAT, "kind": self.kind, "records": str(self.records), "index_xxh3": checksum.hexdigest()}
        header = json.dumps({"__metadata__": metadata, **tensors}, separators=(",", ":")).encode()
        assert len(header) <= HEADER_BYTES - 8
        self.file.seek(0)
        self.file.write(struct.pack("<Q", HEADER_BYTES - 8) + header.ljust(HEADER_BYTES - 8))


@dataclass(frozen=True, eq=False)
class Shard:
    """The index of one shard, N records. 28 bytes a record, when ``keys`` is not held on to."""

    path: Path
    kind: str
    layouts: tuple[Layout, ...]
    offsets: numpy.ndarray  # (N,) int64, from the beginning of the file
    lengths: numpy.ndarray  # (N,) int64
    xxh3: numpy.ndarray  # (N,) uint64
    layout: numpy.ndarray  # (N,) int32
    keys: numpy.ndarray | None  # (N, 16) uint8

    def __len__(self) -> int:
        return len(self.offsets)

    def bad(self) -> numpy.ndarray:
        """(N,) bool: records that were reported as damaged. Needs ``keys``."""
        assert self.keys is not None
        known = bad_keys(self.path)
        if not known:
            return numpy.zeros(len(self), dtype=bool)
        return numpy.array([key.tobytes() in known for key in self.keys], dtype=bool)


def open_shard(path: Path) -> Shard:
    """Reads and checks the index, not the records. Raises Damaged, Foreign and OSError."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(HEADER_BYTES)
        header = _header(start, size)
        data_end = HEADER_BYTES + header["data"]["data_offsets"][1]
        file.seek(data_end)
        index = file.read()
    metadata = header["__metadata__"]
    if xxhash.xxh3_64_hexdigest(index) != metadata["index_xxh3"]:
        raise Damaged("the checksum of its index does not match")
    columns = {}
    for name, _, kind in _COLUMNS:
        begin, end = (HEADER_BYTES + offset - data_end for offset in header[name]["data_offsets"])
        columns[name] = numpy.frombuffer(index[begin:end], dtype=kind)  # a copy, so that ``index`` and unused columns go
    layouts = tuple(tuple(Field(name, dtype, tuple(shape), full) for name, dtype, shape, full in layout)
                    for layout in json.loads(columns["layouts"].tobytes()))
    offsets = columns["offsets"] + HEADER_BYTES
    return Shard(path, metadata["kind"], layouts, offsets, columns["lengths"], columns["xxh3"], columns["layout"],
                 columns["keys"].reshape(-1, KEY_BYTES))


def _header(start: bytes, size: int) -> dict:
    """The parsed header of a file that has the size it announces."""
    if len(start) < HEADER_BYTES or not any(start):
        raise Damaged("it is cut off")
    try:
        length = struct.unpack("<Q", start[:8])[0]
        header = json.loads(start[8:8 + length])
    except ValueError:
        # Only a file of ours has this length of header; of others we cannot tell what they are.
        raise (Damaged("its header is unreadable") if length == HEADER_BYTES - 8 else Foreign("it is not a shard")) from None
    metadata = header.get("__metadata__", {}) if isinstance(header, dict) else {}
    if metadata.get("kiln") != FORMAT:
        raise Foreign("it is not a shard of this version")
    try:
        expected = HEADER_BYTES + max(tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__")
        [header[name] for name, _, _ in _COLUMNS], header["data"], metadata["index_xxh3"], metadata["kind"]
    except (KeyError, TypeError):
        raise Damaged("its header is unreadable") from None
    if size != expected:
        raise Damaged(f"it has {size} bytes instead of {expected}")
    return header


def shard_files(folder: Path, kind: str | None = None) -> list[Path]:
    """Shards of a folder in the order of their names; none where the folder does not exist."""
    with suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder) as entries:
        matches = [match for entry in entries if (match := NAME.fullmatch(entry.name))]
        return sorted(Path(folder) / match[0] for match in matches if match[2] is None and kind in (None, match[1]))
    return []


def bad_keys(path: Path) -> set[bytes]:
    """Keys of the shard's records that were reported as damaged."""
    try:
        lines = path.with_name(path.name + BAD_SUFFIX).read_text("ascii", errors="replace").split()
    except OSError:
        return set()
    found = set()
    for line in lines:
        with suppress(ValueError):  # a line that a crash cut short
            found.add(bytes.fromhex(line))
    return found


def mark_bad(path: Path, key: bytes) -> bool:
    """Remember that the record is damaged. False where the folder cannot be written."""
    try:
        with open(path.with_name(path.name + BAD_SUFFIX), "ab") as file:  # one short append: whole, or a line cut short
            file.write(key.hex().encode() + b"\n")
    except OSError:
        return False
    return True


def set_aside(path: Path) -> bool:
    """Rename a damaged shard so that nobody opens it again. False where the folder cannot be written."""
    try:
        os.replace(path, path.with_name(path.name + DAMAGED_SUFFIX))
    except FileNotFoundError:
        return True  # another process did it
    except OSError:
        return False
    return True

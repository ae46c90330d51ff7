"""What a scan found out about a subset, kept for later runs in memory-mapped columns.

An index is a pair of files in the cache folder, ``index-<where>-<how>-<time>.safetensors`` with the columns and ``.content`` with
the hashes of the files' bytes, which are learnt later than the rest: those of all pictures, then those of all masks if the
subset has mask files. ``where`` stands for the folder of the pictures and ``how`` for the settings that decide captions, so two
subsets of one folder do not fight for it. The first file is never changed: what differs becomes a new pair with a later time,
written aside and renamed, and the old one goes when nobody has it open (Windows would not let go of a mapped file, and on a
network drive its removal would break those who read it).
"""

from __future__ import annotations

import json
import mmap
import os
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO

import numpy

from library.atomic import atomic_file, sweep, write_atomic
from library.data.keys import KEY_BYTES
from library.data.strings import Strings
from library.file_lock import try_lock, unlock

VERSION = 2
STALE_SECONDS = 30 * 24 * 3600  # an index of other settings that nobody opened for so long is removed
MAPPED_FROM = 4 << 20  # bytes; smaller files are read, since each mapping keeps a file open and processes may have few of those
_DTYPES = {"I64": "<i8", "U64": "<u8", "I32": "<i4", "F32": "<f4", "I16": "<i2", "U8": "<u1"}
_CODES = {numpy.dtype(dtype): code for code, dtype in _DTYPES.items()}
_TEXTS = ("names", "captions", "masks")


@dataclass(frozen=True)
class Columns:
    """All that is known of a subset's N pictures. ``stamps``, ``caption_stamps`` and ``mask_stamps`` are (-1, -1) where the file
    has to be looked at again; ``sources`` are as in ``listing.Found``. ``started`` is when the look began and ``saved`` when
    all was kept, in ns since 1970. ``masks`` and the columns about them are None when the subset has no mask files."""

    started: int
    names: Strings
    captions: Strings
    masks: Strings | None
    stamps: numpy.ndarray  # (N, 2) int64
    caption_stamps: numpy.ndarray  # (N, 2) int64
    mask_stamps: numpy.ndarray | None  # (N, 2) int64
    name_hash: numpy.ndarray  # (N,) uint64
    sizes: numpy.ndarray  # (N, 2) int32
    weights: numpy.ndarray | None  # (N,) float32
    sources: numpy.ndarray  # (N,) int16
    content: numpy.ndarray  # (N, 16) uint8, zero where unknown
    mask_content: numpy.ndarray | None  # (N, 16) uint8, zero where unknown
    sound: bool  # nothing was wrong with the folder, the metadata or the masks: what is listed here is all there is to say
    saved: int = 0

    def same(self, other: Columns) -> bool:
        """Everything but the time and the hashes of contents agrees."""
        return all(equal(getattr(self, name), getattr(other, name)) for name in (
            *_TEXTS, "stamps", "caption_stamps", "mask_stamps", "name_hash", "sizes", "weights", "sources")
                   ) and self.sound == other.sound


@dataclass
class Kept:
    """The index of one subset in ``folder``. Not locked here: whoever writes holds the lock on ``lock_path``."""

    folder: Path
    where: str
    how: str
    _files: list[BinaryIO] = field(default_factory=list)  # whose columns are mapped, with a shared lock on each
    _content: Path | None = None  # of the columns loaded last
    _count: int = 0  # their rows

    @property
    def lock_path(self) -> Path:
        return self.folder / f"index-{self.where}.lock"

    def load(self) -> Columns | None:
        """The newest index of these settings."""
        return self._first(self._paths(self.how))

    def load_other(self) -> Columns | None:
        """The newest index of other settings: its pictures are the same ones, its captions may not be."""
        return self._first(path for path in self._paths("*") if f"-{self.how}-" not in path.name)

    def save(self, columns: Columns) -> Columns:
        """Write a new index and return its columns, mapped. Raises OSError or UserError where it cannot be written."""
        self.detach()
        path = self.folder / f"index-{self.where}-{self.how}-{time.time_ns():016x}.safetensors"
        parts = [columns.content] if columns.mask_content is None else [columns.content, columns.mask_content]
        write_atomic(path.with_suffix(".content"), b"".join(part.tobytes() for part in parts))
        _write(path, columns)
        for file in self._files:
            with suppress(OSError):
                unlock(file.fileno())
        self._clear(path)
        return self._open_index(path) or columns

    def detach(self) -> None:
        """Remember nothing from here on: the rows in use are not those of the index that was loaded."""
        self._content = None

    def remember(self, rows: numpy.ndarray, content: numpy.ndarray, mask_content: numpy.ndarray | None = None) -> None:
        """Keep the content hashes (n, 16) uint8 of these rows' pictures, and of their masks where the subset has mask files.
        Each is 16 aligned bytes, so a killed run leaves whole ones, and another run that reads the same index writes the
        same."""
        if self._content is None or not len(rows):
            return
        order = numpy.argsort(rows, kind="stable")
        with suppress(OSError), open(self._content, "r+b") as file:  # not kept is not lost: it is only found out again
            _write_rows(file, rows[order], content[order])
            if mask_content is not None:
                _write_rows(file, rows[order] + self._count, mask_content[order])

    def _paths(self, how: str) -> list[Path]:
        paths = self.folder.glob(f"index-{self.where}-{how}-*.safetensors")
        return sorted(paths, key=lambda path: path.stem[-16:], reverse=True)

    def _first(self, paths: Iterable[Path]) -> Columns | None:
        return next(filter(None, map(self._open_index, paths)), None)

    def _open_index(self, path: Path) -> Columns | None:
        """None for a file that is gone, damaged or of another version: an index is never missed, only made again."""
        content = path.with_suffix(".content")
        try:
            with ExitStack() as opened:
                file = opened.enter_context(open(path, "rb"))
                columns = _read(file)
                hashes, mask_hashes = _read_content(content, len(columns.names), columns.masks is not None)
                columns = replace(columns, saved=int(path.stem[-16:], 16), content=hashes, mask_content=mask_hashes)
                if os.fstat(file.fileno()).st_size >= MAPPED_FROM:
                    with suppress(OSError):  # folders without locks
                        try_lock(file.fileno(), shared=True)
                    opened.pop_all()  # stays open, or the lock would go
                    self._files.append(file)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None
        self._content, self._count = content, len(columns.names)
        with suppress(OSError):
            os.utime(path)
        return columns

    def _clear(self, newest: Path) -> None:
        """Remove what ``newest`` replaces, and what has been left of other settings long ago."""
        sweep(self.folder, f"index-{self.where}")
        for path in self._paths("*"):
            with suppress(OSError):
                old = path.name.startswith(newest.name[:-len("0123456789abcdef.safetensors")])
                if path == newest or not (old or time.time() - path.stat().st_mtime > STALE_SECONDS):
                    continue
                with open(path, "rb") as file:
                    unused = try_lock(file.fileno())
                if unused:
                    path.unlink()
        for path in self.folder.glob(f"index-{self.where}-*.content"):
            with suppress(OSError):
                if not path.with_suffix(".safetensors").exists() and path.stem < newest.stem:
                    path.unlink()


def equal(one: Strings | numpy.ndarray | None, other: Strings | numpy.ndarray | None) -> bool:
    """The same values, or both None."""
    if one is other:
        return True
    if isinstance(one, Strings) and isinstance(other, Strings):
        return numpy.array_equal(one.offsets, other.offsets) and numpy.array_equal(one.blob, other.blob)
    return one is not None and other is not None and numpy.array_equal(one, other)


def join(parts: Sequence[Strings], part: numpy.ndarray, row: numpy.ndarray) -> Strings:
    """Texts picked from several columns: the i-th is ``parts[part[i]][row[i]]``. Neighbours that stay neighbours are copied in
    one piece."""
    offsets = numpy.zeros(len(row) + 1, dtype=numpy.int64)
    for number, texts in enumerate(parts):
        here = part == number
        offsets[1:][here] = numpy.diff(texts.offsets)[row[here]]
    numpy.cumsum(offsets, out=offsets)
    part, row = numpy.asarray(part, dtype=numpy.int64), numpy.asarray(row, dtype=numpy.int64)
    starts = numpy.flatnonzero((numpy.diff(part, prepend=-1) != 0) | (numpy.diff(row, prepend=-2) != 1))
    ends = numpy.append(starts[1:], len(row))[:len(starts)]
    blob = numpy.empty(int(offsets[-1]), dtype=numpy.uint8)
    for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
        texts = parts[part[start]]
        blob[offsets[start]:offsets[end]] = texts.blob[texts.offsets[row[start]]:texts.offsets[row[end - 1] + 1]]
    return Strings(blob, offsets)


def _write_rows(file: BinaryIO, rows: numpy.ndarray, hashes: numpy.ndarray) -> None:
    """Rows (n,) in order, hashes (n, 16); neighbours are written in one piece."""
    starts = numpy.flatnonzero(numpy.diff(rows, prepend=-2) != 1)
    for start, end in zip(starts.tolist(), [*starts[1:].tolist(), len(rows)], strict=True):
        file.seek(int(rows[start]) * KEY_BYTES)
        file.write(hashes[start:end].tobytes())


def _bytes(values: numpy.ndarray) -> memoryview:
    return memoryview(numpy.ascontiguousarray(values).reshape(-1).view(numpy.uint8))


def _write(path: Path, columns: Columns) -> None:
    """A safetensors file; wide columns first, so that each begins at a multiple of its own width."""
    arrays = {name: getattr(columns, name) for name in (
        "stamps", "caption_stamps", "mask_stamps", "name_hash", "sizes", "weights", "sources")
        if getattr(columns, name) is not None}
    for name in _TEXTS:
        texts = getattr(columns, name)
        if texts is not None:
            arrays |= {f"{name}.offsets": texts.offsets, f"{name}.blob": texts.blob}
    arrays = dict(sorted(arrays.items(), key=lambda pair: -pair[1].itemsize))
    header: dict = {"__metadata__": {"format": "kiln index", "version": str(VERSION), "started": str(columns.started),
                                    "sound": str(columns.sound)}}
    end = 0
    for name, values in arrays.items():
        header[name] = {"dtype": _CODES[values.dtype], "shape": list(values.shape), "data_offsets": [end, end + values.nbytes]}
        end += values.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-(len(text) + 8) % 64)
    with atomic_file(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for values in arrays.values():
            file.write(_bytes(values))


def _buffer(file: BinaryIO) -> mmap.mmap | bytes:
    """The whole file, mapped if it is large."""
    size = os.fstat(file.fileno()).st_size
    return file.read() if size < MAPPED_FROM else mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _read(file: BinaryIO) -> Columns:
    """The columns of an open index, without the hashes. Raises ValueError, KeyError or TypeError for whatever is not one."""
    mapped = _buffer(file)
    file_bytes, length = len(mapped), int.from_bytes(mapped[:8], "little")
    if 8 + length > file_bytes:
        raise ValueError("cut off")
    header = json.loads(mapped[8:8 + length])
    facts = header.pop("__metadata__")
    if facts.get("format") != "kiln index" or facts.get("version") != str(VERSION):
        raise ValueError("another version")
    arrays = {}
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        dtype = numpy.dtype(_DTYPES[entry["dtype"]])
        if not 0 <= start <= end <= file_bytes - 8 - length:
            raise ValueError("cut off")
        values = numpy.frombuffer(mapped, dtype, (end - start) // dtype.itemsize, 8 + length + start)
        arrays[name] = values.reshape(entry["shape"])
    texts = {name: Strings(arrays.pop(f"{name}.blob"), arrays.pop(f"{name}.offsets"))
             for name in _TEXTS if f"{name}.blob" in arrays}
    columns = Columns(started=int(facts["started"]), sound=facts["sound"] == "True", content=numpy.empty(0), mask_content=None,
                      **{"masks": None, "mask_stamps": None, "weights": None} | texts | arrays)
    _check(columns)
    return columns


def _check(columns: Columns) -> None:
    """That rows agree, and that no text reaches beyond its column."""
    count = len(columns.names)
    if (columns.masks is None) != (columns.mask_stamps is None):
        raise ValueError("half of the masks")
    for name in ("stamps", "caption_stamps", "mask_stamps", "name_hash", "sizes", "sources", "captions", "masks", "weights"):
        values = getattr(columns, name)
        if values is not None and len(values) != count:
            raise ValueError("rows do not agree")
    for texts in (columns.names, columns.captions, columns.masks):
        if texts is not None and (texts.offsets[0] != 0 or texts.offsets[-1] != len(texts.blob)
                                  or (numpy.diff(texts.offsets) < 0).any()):
            raise ValueError("texts do not fit")


def _read_content(path: Path, count: int, masks: bool) -> tuple[numpy.ndarray, numpy.ndarray | None]:
    """The content hashes (count, 16) of the pictures and, with ``masks``, of the masks; zeros without a file that fits. Mapped
    ones cannot be written to, but show what is written to the file."""
    hashes = numpy.zeros((count * (2 if masks else 1), KEY_BYTES), dtype=numpy.uint8)
    with suppress(OSError), open(path, "rb") as file:
        values = numpy.frombuffer(_buffer(file), numpy.uint8)
        if len(values) == hashes.nbytes:
            hashes = values.reshape(hashes.shape) if values.nbytes >= MAPPED_FROM else values.reshape(hashes.shape).copy()
    return hashes[:count], hashes[count:] if masks else None

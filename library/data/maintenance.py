"""What can be said about a folder of shards and done to it, without knowing the pictures: overview, check, tidying up."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy
import xxhash

from library.atomic import atomic_file, sweep
from library.data import store_writer
from library.data.keys import KEY_BYTES
from library.data.open_files import OpenFiles
from library.data.shards import (BAD_SUFFIX, DAMAGED_SUFFIX, NAME, SUFFIX, Damaged, Field, Foreign, Layout, Shard, ShardBuilder,
                                 layout_bytes, mark_bad, open_shard, set_aside, shard_files, shard_name)

Told = Callable[[str], None]


@dataclass(frozen=True)
class Overview:
    """Of the shards of one kind in one folder."""

    kind: str
    shards: int
    bytes: int
    records: int
    repeated: int  # records whose key an earlier shard has, or the same one
    bad: int  # records reported as damaged
    layouts: tuple[tuple[Layout, int], ...]  # as readers see them, the most frequent first


def caches_under(folder: Path) -> list[Path]:
    """``folder`` itself and the folders below it that hold shards or what became of them."""
    found = [Path(place) for place, _, names in os.walk(folder) if any(NAME.fullmatch(name) for name in names)]
    return sorted(found)


def overview(folder: Path, told: Told) -> list[Overview]:
    """One for each kind in ``folder``; files that cannot be used are told in a line each."""
    shards = _opened(folder, told)
    result = []
    for kind in sorted({shard.kind for shard in shards}):
        mine = [shard for shard in shards if shard.kind == kind]
        keys = numpy.concatenate([shard.keys for shard in mine])
        distinct = len(numpy.unique(keys.view(f"V{KEY_BYTES}")))
        counts: dict[Layout, int] = {}
        for shard in mine:
            for layout, count in zip(shard.layouts, numpy.bincount(shard.layout, minlength=len(shard.layouts)), strict=True):
                general = tuple(Field(one.name, one.dtype, one.full_shape) for one in layout)
                counts[general] = counts.get(general, 0) + int(count)
        result.append(Overview(
            kind, len(mine), sum(shard.path.stat().st_size for shard in mine), len(keys), len(keys) - distinct,
            sum(int(shard.bad().sum()) for shard in mine), tuple(sorted(counts.items(), key=lambda pair: -pair[1]))))
    return result


def verify(folder: Path, repair: bool, told: Told) -> int:
    """Read every record and compare its checksum; returns the number of faults, each told in a line.

    ``repair``: what is damaged is noted, so that the next run encodes it anew. Records noted before are no fault.
    """
    faults = 0

    def fault(line: str) -> None:
        nonlocal faults
        faults += 1
        told(line)

    for shard in _opened(folder, fault, aside=repair):
        files, bad = OpenFiles(), shard.bad()
        for row in numpy.flatnonzero(~bad).tolist():
            if _read(files, shard, row) is None:
                key = shard.keys[row].tobytes()
                noted = repair and mark_bad(shard.path, key)
                fault(f"{shard.path}: record {row} ({key.hex()}) is damaged" + ("; it will be encoded anew" if noted else ""))
        files.close()
    return faults


def compact(folder: Path, told: Told) -> tuple[int, int]:
    """Merge small shards and leave out what nobody will read: repeated, noted and damaged records. (bytes before, after).

    New shards are written first and old ones removed last, so that a crash loses nothing. Large shards without anything to
    leave out stay as they are. A run that is reading the folder may miss the old files: it says so, and can be started again.
    """
    before = _size(folder)
    for path in list(folder.glob(f"*{SUFFIX}{DAMAGED_SUFFIX}")):
        if NAME.fullmatch(path.name):
            path.unlink(missing_ok=True)
    shards = _opened(folder, told)
    for kind in sorted({shard.kind for shard in shards}):
        sweep(folder, f"{kind}-")
        _compact_kind(folder, kind, [shard for shard in shards if shard.kind == kind], told)
    for path in list(folder.glob(f"*{SUFFIX}{BAD_SUFFIX}")):
        if NAME.fullmatch(path.name) and not path.with_name(path.name.removesuffix(BAD_SUFFIX)).exists():
            path.unlink(missing_ok=True)
    return before, _size(folder)


def _compact_kind(folder: Path, kind: str, shards: list[Shard], told: Told) -> None:
    old, kept = _to_rewrite(shards), set()
    staying = [shard for shard in shards if shard not in old]
    if not old:
        return
    for shard in staying:
        kept.update(key.tobytes() for key in shard.keys)
    records = _survivors(old, kept, told)
    record = next(records, None)
    while record is not None:
        with atomic_file(folder / shard_name(kind)) as file:
            made = ShardBuilder(file, kind)
            while record is not None and made.data_bytes < store_writer.SHARD_BYTES and made.records < store_writer.SHARD_RECORDS:
                made.add(*record)
                record = next(records, None)
            made.finish()
    for shard in old:
        try:
            shard.path.unlink(missing_ok=True)
        except OSError as error:  # Windows: another process has it open. Its records are then there twice, which harms nobody
            told(f"{shard.path}: cannot be removed ({error.strerror or error}); its records were copied all the same")


def _to_rewrite(shards: list[Shard]) -> list[Shard]:
    """Those with something to leave out, and small ones when that makes fewer files of them."""
    seen: set[bytes] = set()
    wasteful, small = [], []
    for shard in shards:
        keys = [key.tobytes() for key in shard.keys]
        fresh = len(set(keys) - seen)
        seen.update(keys)
        if fresh < len(keys) or shard.bad().any():
            wasteful.append(shard)
        elif len(shard) < store_writer.SHARD_RECORDS // 2 and int(shard.lengths.sum()) < store_writer.SHARD_BYTES // 2:
            small.append(shard)
    return [shard for shard in shards if shard in wasteful or (shard in small and len(small) + len(wasteful) > 1)]


def _survivors(shards: list[Shard], kept: set[bytes], told: Told) -> Iterator[tuple[bytes, Layout, list[memoryview]]]:
    """Whole records, each key once; of equal ones the first that is whole."""
    for shard in shards:
        files, bad = OpenFiles(), shard.bad()
        for row in numpy.flatnonzero(~bad).tolist():
            key = shard.keys[row].tobytes()
            if key in kept:
                continue
            data = _read(files, shard, row)
            if data is None:
                told(f"{shard.path}: record {row} ({key.hex()}) is damaged and was left out")
                continue
            kept.add(key)
            yield key, shard.layouts[shard.layout[row]], [data]
        files.close()


def _read(files: OpenFiles, shard: Shard, row: int) -> memoryview | None:
    """The bytes of a record, or None when they are not what was written."""
    data = memoryview(bytearray(int(shard.lengths[row])))
    if layout_bytes(shard.layouts[shard.layout[row]]) != len(data):
        return None
    whole = files.read_into(shard.path, int(shard.offsets[row]), [data])
    return data if whole and xxhash.xxh3_64_intdigest(data) == int(shard.xxh3[row]) else None


def _opened(folder: Path, told: Told, aside: bool = False) -> list[Shard]:
    shards = []
    for path in shard_files(folder):
        try:
            shards.append(open_shard(path))
        except (Damaged, Foreign, OSError) as error:
            moved = aside and isinstance(error, Damaged) and set_aside(path)
            told(f"{path}: {error}" + ("; it was set aside and will be encoded anew" if moved else ""))
    return shards


def _size(folder: Path) -> int:
    total = 0
    for path in folder.iterdir():
        with suppress(OSError):
            total += path.stat().st_size if NAME.fullmatch(path.name) else 0
    return total

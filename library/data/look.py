"""Looks at the files of a subset, in this process or in several: the state and size of each picture, the words of each
caption, the state of each mask."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy

from library.data import problems
from library.data.caption_files import EmptyCaption, other_caption, read_caption
from library.data.cores import own_cores
from library.data.header import picture_size
from library.data.keyed import hash64
from library.data.listing import NO_FILE, caption_name
from library.data.problems import Problem, Tally
from library.data.spec import SubsetSpec
from library.data.strings import Strings
from library.errors import UserError

UNKNOWN = -1  # both numbers of the stamp of a file that has to be looked at
CHUNK = 8192  # pictures that one process looks at before it reports
MOST_PROCESSES = 16
# Starting processes takes about half a second. What one file costs, in microseconds on an old machine:
READ_COST, STAT_COST, WORTH_PROCESSES = 20, 3, 1_500_000


@dataclass(frozen=True)
class Rules:
    """What of a subset decides the words of its pictures; small, for it goes to other processes with every chunk."""

    root: str
    suffixes: tuple[str, ...]
    separator: str
    class_tokens: str | None
    place: str
    listed: str = ""  # the file or class that names the pictures, where it is not their folder

    @classmethod
    def of(cls, subset: SubsetSpec, root: Path) -> Rules:
        return cls(str(root), subset.caption_suffixes, subset.captions.separator, subset.class_tokens, subset.place,
                   str(subset.metadata_file or subset.source or ""))


@dataclass(frozen=True)
class Chunk:
    """Rows ``rows`` (n,) of a subset. Stamps (n, 2) int64, bytes and mtime in ns, are those of the last look or ``UNKNOWN``.
    ``sources`` (n,) as in ``listing.Found``, None where captions are not read from files. ``hashed``: name hashes are known.
    ``masks`` (n) and their stamps as in ``index.Columns``."""

    rules: Rules
    rows: numpy.ndarray
    names: Strings
    stamps: numpy.ndarray
    sources: numpy.ndarray | None
    caption_stamps: numpy.ndarray
    hashed: numpy.ndarray
    masks: Strings | None = None
    mask_stamps: numpy.ndarray | None = None


@dataclass(frozen=True)
class Looked:
    """What was new: ``rows`` with the stamps and sizes of their pictures ((0, 0) for one that cannot be read, whose stamp stays
    unknown), ``caption_rows`` with their captions, ``name_rows`` with their hashes, ``mask_rows`` with the stamps of their
    masks (unknown for one that is not there)."""

    rows: numpy.ndarray
    stamps: numpy.ndarray
    sizes: numpy.ndarray
    caption_rows: numpy.ndarray
    caption_stamps: numpy.ndarray
    captions: Strings
    name_rows: numpy.ndarray
    name_hash: numpy.ndarray
    mask_rows: numpy.ndarray
    mask_stamps: numpy.ndarray
    problems: tuple[Problem, ...]


def look(chunk: Chunk) -> Looked:
    """Stat every file of the chunk, read those that are not as they were."""
    rules, tally = chunk.rules, Tally()
    pictures: list[tuple[int, int, int, int, int]] = []
    captions: list[tuple[int, int, int]] = []
    texts: list[str] = []
    hashes: list[tuple[int, int]] = []
    stamps, caption_stamps = chunk.stamps.tolist(), chunk.caption_stamps.tolist()
    sources = None if chunk.sources is None else chunk.sources.tolist()
    hashed, root = chunk.hashed.tolist(), os.path.join(rules.root, "")
    for index, (row, name) in enumerate(zip(chunk.rows.tolist(), chunk.names, strict=True)):
        if not hashed[index]:
            hashes.append((row, hash64(name)))
        path = root + name if sources is not None else os.path.join(root, name)  # a listed one may lie elsewhere
        if not _unchanged(path, stamps[index]):
            pictures.append((row, *_picture(path, rules.listed, tally)))
            if pictures[-1][1] == UNKNOWN and sources is not None:  # one complaint is enough
                captions.append((row, UNKNOWN, UNKNOWN))
                texts.append("")
                continue
        if sources is None:
            continue
        source = sources[index]
        caption = None if source == NO_FILE else root + caption_name(name, source, rules.suffixes)
        if not _unchanged(caption, caption_stamps[index]):
            text, stamp = _caption(caption, path, rules, tally)
            captions.append((row, *stamp))
            texts.append(text)
    seen, worded, masked = _table(pictures, 5), _table(captions, 3), _table(_masks(chunk, tally), 3)
    named = numpy.array(hashes, dtype=numpy.uint64).reshape(-1, 2)
    return Looked(seen[:, 0], seen[:, 1:3], seen[:, 3:].astype(numpy.int32), worded[:, 0], worded[:, 1:], Strings.of(texts),
                  named[:, 0].astype(numpy.int64), named[:, 1], masked[:, 0], masked[:, 1:], tuple(tally.problems))


def _table(rows: list, columns: int) -> numpy.ndarray:
    return numpy.array(rows, dtype=numpy.int64).reshape(-1, columns)


def _unchanged(path: str | None, stamp: Sequence[int]) -> bool:
    """``path`` None is a caption or mask file that is not there; its stamp is 0, 0."""
    if stamp[0] == UNKNOWN:
        return False
    if path is None:
        return True
    try:
        state = os.stat(path)
    except OSError:
        return False
    return state.st_mtime_ns == stamp[1] and state.st_size == stamp[0]


def _picture(path: str, listed: str, tally: Tally) -> tuple[int, int, int, int]:
    try:
        (width, height), state = picture_size(path)
    except UserError as error:
        if listed and not os.path.lexists(path):  # a name that is wrong, rather than a file that was there a moment ago
            error = UserError(f"there is no such picture, but {listed} lists it", place=path,
                              remedy="correct its name there, correct image_dir, or remove the record")
        tally.add(problems.UNREADABLE, path, error)
        return UNKNOWN, UNKNOWN, 0, 0
    return state.st_size, state.st_mtime_ns, width, height


def _masks(chunk: Chunk, tally: Tally) -> list[tuple[int, int, int]]:
    """(row, bytes, mtime) of the mask files that are not as they were. They are not opened; a picture without a mask has the
    stamp 0, 0."""
    if chunk.masks is None or chunk.mask_stamps is None:
        return []
    changed = []
    for row, mask, stamp in zip(chunk.rows.tolist(), chunk.masks, chunk.mask_stamps.tolist(), strict=True):
        if _unchanged(mask or None, stamp):
            continue
        try:
            state = os.stat(mask) if mask else None
        except OSError as error:
            tally.add(problems.NO_MASK, mask, UserError(f"the mask cannot be read: {error.strerror or error}", place=mask,
                                                        remedy="put it back, or remove its picture from the dataset"))
            changed.append((row, UNKNOWN, UNKNOWN))
            continue
        changed.append((row, 0, 0) if state is None else (row, state.st_size, state.st_mtime_ns))
    return changed


def _caption(caption: str | None, picture: str, rules: Rules, tally: Tally) -> tuple[str, tuple[int, int]]:
    if caption is not None:
        try:
            text, state = read_caption(caption, rules.separator)
        except UserError as error:
            tally.add(problems.EMPTY_CAPTION if isinstance(error, EmptyCaption) else problems.BAD_CAPTION, caption, error)
            return "", (UNKNOWN, UNKNOWN)
        return text, (state.st_size, state.st_mtime_ns)
    if rules.class_tokens is not None:
        return rules.class_tokens, (0, 0)
    stem = os.path.splitext(os.path.basename(picture))[0]
    looked = " or ".join(stem + suffix for suffix in rules.suffixes)
    other, ending = other_caption(picture, rules.suffixes)
    tally.add(problems.NO_CAPTION, picture, UserError(
        f"the picture has no caption ({looked} beside it) and its subset no class_tokens", place=picture,
        remedy=f'there is {other}: set caption_extension = "{ending}" at {rules.place}' if other else
        f"write one, or set class_tokens at {rules.place}"))
    return "", (UNKNOWN, UNKNOWN)


def look_at(chunks: Sequence[Chunk]) -> Iterator[Looked]:
    """The chunks' results in order; in several processes where that is worth starting them."""
    chunks = [chunk for chunk in chunks if len(chunk.rows)]
    processes = min(own_cores(), len(chunks), MOST_PROCESSES)
    done = 0
    if processes > 1 and sum(map(_cost, chunks)) > WORTH_PROCESSES and not multiprocessing.current_process().daemon:
        # Spawned, as on every system: a fork would copy the locks of threads that are not there.
        pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), _ignore_interrupts)
        try:
            for looked in pool.map(look, chunks):
                yield looked
                done += 1
        except BrokenProcessPool:
            pass  # a system or a script that cannot start processes; what is left is done here
        finally:
            pool.shutdown(cancel_futures=True)
    for chunk in chunks[done:]:
        yield look(chunk)


def _cost(chunk: Chunk) -> int:
    unknown = int((chunk.stamps[:, 0] == UNKNOWN).sum() + (chunk.caption_stamps[:, 0] == UNKNOWN).sum())
    looks = (2 if chunk.masks is None else 3) * len(chunk.rows)
    return unknown * READ_COST + (looks - unknown) * STAT_COST


def _ignore_interrupts() -> None:
    """Ctrl-C is for the process that the user started; it stops the others."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

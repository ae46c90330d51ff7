"""What filling a cache takes whether pictures or captions are encoded: ranks that share the work, results that leave the device
while the next batch is computed, and questions asked before a disk is full."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy
import torch

from library.data.cores import own_cores
from library.data.keys import KEY_BYTES
from library.errors import UserError, UserErrors, raise_all

if TYPE_CHECKING:
    from library.data.store import Record, Store

Progress = Callable[[int, int, int], None]  # (looked at, to look at, encoded), of this rank's share
T, R = TypeVar("T"), TypeVar("R")

ROUNDS = 4  # a round that leaves something missing is followed by another one: shards can be deleted meanwhile
LAG_SECONDS = 90  # network file systems show a new file to other machines after up to a minute
EXCHANGED_BYTES = 64 << 20  # of tensors that each rank sends at a time


@dataclass(frozen=True)
class Ranks:
    """The processes of a run. ``exchange`` gives what every rank has, in their order; all ranks call it together."""

    rank: int = 0
    world_size: int = 1
    exchange: Callable[[object], list] = lambda value: [value]

    def together(self, work: Callable[[], T]) -> list[T]:
        """The results of all ranks. A UserError of any rank is raised on every rank: none waits for one that has stopped."""
        try:
            mine: tuple[object, list] = (work(), [])
        except UserError as error:
            mine = (None, flat(error))
        answers = self.exchange(mine)
        raise_all(errors_of(told for _, told in answers))
        return [value for value, _ in answers]


def flat(error: UserError) -> list[tuple[str, str, str]]:
    """The mistakes as texts: exceptions do not survive the way between processes."""
    return [(one.message, one.place, one.remedy) for one in (error.errors if isinstance(error, UserErrors) else (error,))]


def errors_of(told: Iterable[Iterable[tuple[str, str, str]]]) -> list[UserError]:
    """The mistakes of all ranks, each once."""
    distinct = dict.fromkeys(tuple(one) for some in told for one in some)
    return [UserError(message, place=place, remedy=remedy) for message, place, remedy in distinct]


def fill_rounds(ranks: Ranks, store: Store, missing: Callable[[], numpy.ndarray],
                work: Callable[[numpy.ndarray, list[bytes]], R], merge: Callable[[list[R]], None]) -> None:
    """Until ``missing()`` is empty on every rank: ``work`` on what the first rank misses, ``merge`` the results of all ranks.

    ``missing`` gives numbers, which mean the same on every rank; ``work`` takes all of them, does this rank's share and adds
    the keys that it stored to the list. UserError when values are encoded again and again and not found.
    """
    worked, waited = 0, 0.0
    while True:
        mine = missing()
        # Ranks may see different things for a moment. They all do what the first one misses, so that nothing is left out.
        seen = ranks.exchange(mine if ranks.rank == 0 else len(mine))
        todo, others = seen[0], sum(seen[1:])
        if not len(todo) and not others:
            return
        if worked == ROUNDS or waited > LAG_SECONDS:
            raise UserError(f"{len(todo) or others} encoded values cannot be found again in the cache",
                            place=str(store.folders[0]) if store.folders else "",
                            remedy="let nothing delete files there, and give all machines of a run the same --cache_dir")
        if len(todo):
            worked += 1
            written: list[bytes] = []
            results = ranks.together(lambda todo=todo, written=written: work(todo, written))
            if store.in_memory and ranks.world_size > 1:
                _share(ranks, store, written)
            merge(results)
        else:
            time.sleep(1.0)
            waited += 1.0
        store.refresh()


def share_of(ranks: Ranks, runs: Iterable[Sequence[int]], batch_size: int) -> list[int]:
    """This rank's part of ``runs``: each is cut into batches, and the batches are dealt out in turn."""
    batches = [run[start:start + batch_size] for run in runs for start in range(0, len(run), batch_size)]
    return [number for batch in batches[ranks.rank::ranks.world_size] for number in batch]


def ahead(pool: ThreadPoolExecutor, work: Callable[[T], R], inputs: Iterable[T], depth: int) -> Iterator[R]:
    """``map`` in order that holds at most ``depth`` results, so that decoded pictures do not pile up."""
    waiting = iter(inputs)
    futures = [pool.submit(work, one) for one in islice(waiting, depth)]
    while futures:
        yield futures.pop(0).result()
        futures += [pool.submit(work, one) for one in islice(waiting, 1)]


def thread_count() -> int:
    """Threads that decode: the cores of this process's share of its machine, within reason."""
    return max(2, min(8, own_cores()))


def leaving(values: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Start the way of ``values`` from the device to memory, floats as float16; call the result to have them there.

    On CUDA the copy is queued behind the kernels that are queued already and before any that follow, so the device goes on
    with the next batch while this one is written.
    """
    half = values.to(torch.float16) if values.is_floating_point() else values
    if not half.is_cuda:
        there = half.cpu()
        return lambda: there
    pinned = half.to("cpu", non_blocking=True)
    event = torch.cuda.Event()
    event.record()

    def arrived() -> torch.Tensor:
        event.synchronize()
        return pinned.clone()  # pinned memory is scarce
    return arrived


def require_finite(half: torch.Tensor, exact: torch.Tensor, what: str) -> None:
    """UserError that names ``what`` when its ``half`` precision is not finite; ``exact``: the same before rounding."""
    if half.is_floating_point() and not bool(torch.isfinite(half).all()):
        finite = bool(torch.isfinite(exact).all())
        reason = "exceed the range of half precision" if finite else "contain NaN or infinity"
        raise UserError(f"{what} {reason}",
                        remedy="remove or replace it; if it happens to all, encode in float32 (--mixed_precision no)")


def mask_to_bytes(cells: torch.Tensor) -> torch.Tensor:
    """Masks in 0..1 -> uint8, rounded."""
    return (cells * 255).round().to(torch.uint8)


class FolderWriter:
    """Writes to one folder of a store after the other: work is sorted by folder. Leaving it seals what was put; keys are added
    to ``written``."""

    def __init__(self, store: Store, written: list[bytes]):
        self.store, self.written = store, written
        self.folder, self.open = -1, None

    def __enter__(self) -> FolderWriter:
        return self

    def put(self, folder: int, key: bytes, tensors: dict[str, torch.Tensor], full: dict[str, int]) -> None:
        if folder != self.folder:
            self._close(None, None, None)
            self.folder, self.open = folder, self.store.writer(folder)
            self.open.__enter__()
        self.open.put(key, tensors, full)
        self.written.append(key)

    def __exit__(self, *exception: object) -> None:
        self._close(*exception)

    def _close(self, *exception: object) -> None:
        if self.open is not None:
            writer, self.open = self.open, None
            writer.__exit__(*exception)


def require_space(store: Store, wanted: dict[int, float]) -> None:
    """UserError when the disks cannot hold ``wanted`` more bytes in each folder (by its number)."""
    disks: dict[int, tuple[Path, float]] = {}
    for folder, size in wanted.items():
        whole = store.folders[folder].absolute()
        there = next(path for path in (whole, *whole.parents) if path.exists())
        device = there.stat().st_dev
        disks[device] = (there, disks.get(device, (there, 0.0))[1] + size)
    for there, size in disks.values():
        disk = shutil.disk_usage(there)
        if disk.total and size > disk.free:  # some network drives do not tell their size
            raise UserError(f"the cache of {store.kind} needs {_amount(size)} more, and this disk has {_amount(disk.free)}",
                            place=str(there), remedy="free some space, or choose another disk with --cache_dir")


def _amount(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.2g} MB"


def _share(ranks: Ranks, store: Store, keys: list[bytes]) -> None:
    """Memory stores: every rank gets what the others encoded, a piece at a time."""
    rows = store.find(numpy.frombuffer(b"".join(keys), dtype=numpy.uint8).reshape(-1, KEY_BYTES)).tolist()
    pieces = _pieces(store.export(rows))
    while True:
        part = next(pieces, None)
        parts = ranks.exchange(part)
        if all(one is None for one in parts):
            return
        for rank, one in enumerate(parts):
            if rank != ranks.rank and one is not None:
                store.absorb(one)


def _pieces(records: Iterable[Record]) -> Iterator[list[Record]]:
    piece: list[Record] = []
    size = 0
    for one in records:
        piece.append(one)
        size += sum(tensor.nbytes for tensor in one.tensors.values())
        if size >= EXCHANGED_BYTES:
            yield piece
            piece, size = [], 0
    if piece:
        yield piece

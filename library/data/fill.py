"""Fills the cache of latents: encodes what has no value yet, each distinct picture once, and nothing else.

Pictures are read and decoded by threads, encoded by the caller's function and written by the store's thread, all at the same
time. Several ranks share the work; what they wrote is seen by all of them when ``fill_latents`` returns.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy
import torch

from library.data.augment import plain_view
from library.data.filling import (
    FolderWriter,
    Progress,
    Ranks,
    ahead,
    errors_of,
    fill_rounds,
    flat,
    leaving,
    mask_to_bytes,
    require_finite,
    require_space,
    share_of,
    thread_count,
)
from library.data.image import load_view, mask_to_cells
from library.data.items import Items
from library.data.keys import KEY_BYTES, UNKNOWN, LatentKeys, as_keys, content_hash
from library.errors import UserError, raise_all

if TYPE_CHECKING:
    from library.data.store import Store

# (number of the listing, its rows (n,), hashes (n, 16) uint8 of pictures, those of masks or None for a listing without masks)
Remember = Callable[[int, numpy.ndarray, numpy.ndarray, numpy.ndarray | None], None]
Told = tuple[str, str, str]  # a UserError on its way between ranks
SHOWN = 5
REMEMBER_SECONDS = 120.0  # so much of the work of hashing is lost when a run is killed


def fill_latents(items: Items, store: Store, encode: Callable[[torch.Tensor], torch.Tensor], identity: str, batch_size: int, *,
                 folders: numpy.ndarray, flips: bool = True, ranks: Ranks = Ranks(), progress: Progress | None = None,
                 remember: Remember | None = None) -> numpy.ndarray:
    """(N, 2) int64: the rows of ``store`` with ``{"latents": (C, h, w) float16, "mask": (h, w) uint8}`` of each item, column 0
    as it is, column 1 flipped where its subset flips (else, and with ``flips`` False, -1). Items without a mask have none.

    ``encode``: (B, 3, H, W) uint8 on the CPU -> (B, C, h, w) on any device; pictures of one size. ``folders``: the folder of
    the store for each listing. ``remember`` is called with the hashes of files that had none or others: while the work goes on
    and when it ends, in whatever way, on each rank with its own, and on the first one with those of the others too. Raises
    UserErrors for pictures and masks that cannot be read or decoded (after all the others are done) and UserError naming the
    picture when the encoder's answer is not finite in half precision.
    """
    job = _Latents(items, store, encode, identity, batch_size, folders[items.listing], flips, ranks, progress, remember)
    job.agree()

    def merge(shares: list[_Share]) -> None:
        if ranks.rank == 0:
            for share in shares[1:]:  # who may have an index of their own, on another machine
                job.remember(share.rows, share.hashes)
        job.learn(shares)
        errors = errors_of(share.errors for share in shares)
        if len(errors) > SHOWN:
            errors = [*errors[:SHOWN], UserError(f"{len(errors) - SHOWN} more: pictures that cannot be decoded")]
        raise_all(errors)

    fill_rounds(ranks, store, job.missing, job.work, merge)
    return job.rows


@dataclass(frozen=True)
class _Share:
    """What one rank learned: content hashes of ``rows`` (n,), and which pictures cannot be decoded."""

    rows: numpy.ndarray
    hashes: numpy.ndarray  # (n, 2, 16) uint8: of the picture, of its mask file
    errors: list[Told]


@dataclass(frozen=True)
class _Decoded:
    """One picture from a thread. ``keys``: those of (plain, flipped) that have to be encoded, None for the others."""

    row: int
    path: str
    hashes: bytes  # 32: of the picture, of its mask file
    keys: tuple[bytes | None, bytes | None]
    pixels: torch.Tensor | None  # (3, H, W) uint8
    mask: torch.Tensor | None  # (H, W) uint8
    error: UserError | None = None


@dataclass(frozen=True)
class _ToEncode:
    folder: int
    key: bytes
    path: str
    pixels: torch.Tensor
    mask: torch.Tensor | None


class _Latents:
    """One call of ``fill_latents``. Columns are aligned with the items; keys (N, 16) are those of the contents as known. A row
    is known when the hashes of its picture and of its mask file, if it has one, are."""

    def __init__(self, items: Items, store: Store, encode: Callable[[torch.Tensor], torch.Tensor], identity: str, batch_size: int,
                 folder: numpy.ndarray, flips: bool, ranks: Ranks, progress: Progress | None, remember: Remember | None):
        self.items, self.store, self.encode, self.batch_size = items, store, encode, batch_size
        self.folder, self.ranks, self.progress, self._remember = folder, ranks, progress, remember
        self.hashes = numpy.zeros((len(items), 2, KEY_BYTES), dtype=numpy.uint8)  # of the picture, of its mask file
        self.hashes[:, 0] = items.column("content")
        self.masked = numpy.zeros(len(items), dtype=bool)  # rows that have a mask file
        self._take_masks()
        self.naming = LatentKeys(items, identity)
        flipping = numpy.array([flips and subset.augment.flip for subset in items.subsets])
        self.flipped = flipping[items.listing]
        self.rows = numpy.full((len(items), 2), -1, dtype=numpy.int64)
        self._stale = numpy.ones(len(items), dtype=bool)  # rows whose keys do not fit their content
        self._keys = [numpy.zeros((len(items), KEY_BYTES), dtype=numpy.uint8) for _ in range(2)]
        self._claimed: set[bytes] = set()
        self._lock = threading.Lock()

    def _take_masks(self) -> None:
        for number, (listing, subset) in enumerate(zip(self.items.listings, self.items.subsets, strict=True)):
            if listing.masks is None or subset.mask == "alpha":
                continue
            rows = numpy.flatnonzero(self.items.listing == number)
            at = self.items.row[rows]
            there = numpy.diff(listing.masks.offsets)[at] > 0
            self.masked[rows] = there
            self.hashes[rows[there], 1] = listing.mask_content[at[there]]

    def agree(self) -> None:
        """All ranks begin with what the first one knows: another run may have added to the index while they read it."""
        if len(set(self.ranks.exchange(content_hash(self.hashes.tobytes())))) > 1:
            self.hashes = self.ranks.exchange(self.hashes if self.ranks.rank == 0 else None)[0]

    def _known(self) -> numpy.ndarray:
        has = self.hashes.any(axis=2)
        return has[:, 0] & (has[:, 1] | ~self.masked)

    def missing(self) -> numpy.ndarray:
        """Rows to look at, sorted by folder, then by group, each distinct picture once; ``self.rows`` is up to date then."""
        known = self._known()
        changed = numpy.flatnonzero(self._stale & known)
        for flip in (False, True):
            some = changed[self.flipped[changed]] if flip else changed
            self._keys[flip][some] = self.naming.of_many(some, flip, self.hashes[some, 0], self.hashes[some, 1])
            wanted = numpy.flatnonzero(known & self.flipped if flip else known)
            self.rows[wanted, int(flip)] = self.store.find(self._keys[flip][wanted])
        self._stale[changed] = False
        lacking = numpy.flatnonzero(~known | (self.rows[:, 0] < 0) | (self.flipped & (self.rows[:, 1] < 0)))
        # Rows of equal content differ in nothing that is encoded, save where only one of them is flipped: that one comes first.
        order = lacking[numpy.lexsort((lacking, ~self.flipped[lacking]))]
        names = numpy.ascontiguousarray(self._keys[0][order]).view(f"V{KEY_BYTES}").reshape(-1)
        _, first = numpy.unique(names, return_index=True)
        todo = numpy.concatenate([order[first][known[order[first]]], order[~known[order]]])
        return todo[numpy.lexsort((todo, self.items.group[todo], self.folder[todo]))]

    def work(self, todo: numpy.ndarray, written: list[bytes]) -> _Share:
        """Encode this rank's share of ``todo``; what is learned of the files is kept every now and then, and at the end."""
        self._claimed.clear()
        run = self.folder[todo].astype(numpy.int64) << 32 | self.items.group[todo]
        runs = [part.tolist() for part in numpy.split(todo, numpy.flatnonzero(numpy.diff(run)) + 1)]
        mine = share_of(self.ranks, runs, self.batch_size)
        rows, hashes, errors = [], bytearray(), []
        kept, kept_at = 0, time.monotonic()

        def keep() -> None:
            nonlocal kept, kept_at
            self.remember(numpy.array(rows[kept:], dtype=numpy.int64), _pairs(hashes[2 * KEY_BYTES * kept:]))
            kept, kept_at = len(rows), time.monotonic()

        with FolderWriter(self.store, written) as writer, ThreadPoolExecutor(thread_count()) as pool:
            decoded = ahead(pool, self._decode, mine, 2 * thread_count() + 2 * self.batch_size)

            def told() -> Iterator[_Decoded]:
                for number, one in enumerate(decoded, 1):
                    if one.error is not None:
                        errors.extend(flat(one.error))
                    else:
                        rows.append(one.row)
                        hashes.extend(one.hashes)
                        if time.monotonic() - kept_at > REMEMBER_SECONDS:
                            keep()
                        yield one
                    if self.progress and number < len(mine):
                        self.progress(number, len(mine), len(written))

            try:
                self._encode_all(self._batches(told()), writer, todo)
            finally:
                pool.shutdown(cancel_futures=True)
                keep()
            if self.progress and mine:
                self.progress(len(mine), len(mine), len(written))
        return _Share(numpy.array(rows, dtype=numpy.int64), _pairs(hashes), errors)

    def remember(self, rows: numpy.ndarray, hashes: numpy.ndarray) -> None:
        """Keep what ``learn`` has not taken over yet of the hashes (n, 2, 16) of ``rows`` (n,)."""
        fresh = (self.hashes[rows] != hashes).any(axis=(1, 2))
        rows, hashes = rows[fresh], hashes[fresh]
        if self._remember is None or not len(rows):
            return
        order = numpy.argsort(rows)
        rows, hashes = rows[order], hashes[order]
        for listing in numpy.unique(self.items.listing[rows]).tolist():
            here = self.items.listing[rows] == listing
            masks = None if self.items.listings[listing].masks is None else hashes[here, 1]
            self._remember(listing, self.items.row[rows[here]].astype(numpy.int64), hashes[here, 0], masks)

    def learn(self, shares: Sequence[_Share]) -> None:
        """Take over what the ranks found in the files."""
        rows = numpy.concatenate([share.rows for share in shares])
        hashes = numpy.concatenate([share.hashes for share in shares])
        self._stale[rows[(self.hashes[rows] != hashes).any(axis=(1, 2))]] = True
        self.hashes[rows] = hashes

    def _decode(self, row: int) -> _Decoded:
        """One picture and its mask file: read once, hashed, looked up, and decoded when something of it has to be encoded. Runs
        in a thread."""
        item = self.items[row]
        path = str(item.path)
        try:
            mask, mask_content = item.mask, UNKNOWN
            if isinstance(mask, Path):
                mask = _read(mask, "mask")
                mask_content = content_hash(mask)
                known = self.hashes[row, 0].tobytes()  # of masks that were only copied or touched the pictures are not read
                if known != UNKNOWN and (self._find(self._names(row, known, mask_content)) >= 0).all():
                    return _Decoded(row, path, known + mask_content, (None, None), None, None)
            data = _read(item.path, "picture")
            content = content_hash(data)
            keys = self._wanted(row, content, mask_content)
            if keys == (None, None):
                return _Decoded(row, path, content + mask_content, keys, None, None)
            pixels, alpha = load_view(data, plain_view(item), path, mask)
            return _Decoded(row, path, content + mask_content, keys, pixels, alpha)
        except UserError as error:
            return _Decoded(row, path, b"", (None, None), None, None, error)

    def _names(self, row: int, content: bytes, mask_content: bytes) -> list[bytes]:
        """The keys of (plain[, flipped])."""
        flips = (False, True) if self.flipped[row] else (False,)
        return [self.naming.of(row, flip, content, mask_content) for flip in flips]

    def _find(self, names: list[bytes]) -> numpy.ndarray:
        return self.store.find(as_keys(b"".join(names)))

    def _wanted(self, row: int, content: bytes, mask_content: bytes) -> tuple[bytes | None, bytes | None]:
        """The keys that this row has to encode, None for the others."""
        names = self._names(row, content, mask_content)
        found = self._find(names).tolist()
        keys: list[bytes | None] = [None, None]
        with self._lock:  # two copies of a picture are encoded once
            for flip, at in enumerate(found):
                if at < 0 and names[flip] not in self._claimed:
                    self._claimed.add(names[flip])
                    keys[flip] = names[flip]
        return keys[0], keys[1]

    def _batches(self, decoded: Iterator[_Decoded]) -> Iterator[list[_ToEncode]]:
        """Batches of one folder and one size; pictures come sorted by both."""
        batch: list[_ToEncode] = []
        for one in decoded:
            for flip, key in enumerate(one.keys):
                if key is None:
                    continue
                pixels, mask = (value if value is None or not flip else value.flip(-1) for value in (one.pixels, one.mask))
                new = _ToEncode(int(self.folder[one.row]), key, one.path, pixels, mask)
                if batch and (new.folder, new.pixels.shape) != (batch[0].folder, batch[0].pixels.shape):
                    yield batch
                    batch = []
                batch.append(new)
                if len(batch) == self.batch_size:
                    yield batch
                    batch = []
        if batch:
            yield batch

    def _encode_all(self, batches: Iterator[list[_ToEncode]], writer: FolderWriter, todo: numpy.ndarray) -> None:
        """The device works on a batch while the one before is converted and written."""
        before = None
        for batch in batches:
            with torch.no_grad():
                latents = self.encode(torch.stack([one.pixels for one in batch]))
            assert len(latents) == len(batch), "encode must keep the batch"
            now = (batch, latents, leaving(latents))
            if before is None:
                self._require_space(latents, batch[0].pixels, todo)
            else:
                self._write(*before, writer)
            before = now
        if before is not None:
            self._write(*before, writer)

    def _write(self, batch: list[_ToEncode], latents: torch.Tensor, arrived: Callable[[], torch.Tensor],
               writer: FolderWriter) -> None:
        halves = arrived()
        for one, half, exact in zip(batch, halves, latents, strict=True):
            require_finite(half, exact, f"the latents of this picture ({one.path})")
            tensors = {"latents": half}
            if one.mask is not None:
                tensors["mask"] = mask_to_bytes(mask_to_cells(one.mask[None], *half.shape[1:]))[0, 0]
            writer.put(one.folder, one.key, tensors, {})

    def _require_space(self, latents: torch.Tensor, pixels: torch.Tensor, todo: numpy.ndarray) -> None:
        """Before the first batch is written. Files that have no hash yet may turn out to be cached, unless nothing is."""
        if self.store.in_memory:
            return
        sure = todo if len(self.store) == 0 else todo[self._known()[todo]]
        per_pixel = latents[0].numel() * 2 / (pixels.shape[1] * pixels.shape[2])
        area = numpy.array([width * height for _, (width, height) in self.items.groups], dtype=numpy.float64)
        sizes = area[self.items.group[sure]] * (1 + self.flipped[sure]) * per_pixel
        require_space(self.store, {int(folder): float(sizes[self.folder[sure] == folder].sum())
                                   for folder in numpy.unique(self.folder[sure])})


def _pairs(hashes: bytes | bytearray) -> numpy.ndarray:
    """Hashes of pictures and masks in turn -> (n, 2, 16) uint8."""
    return as_keys(hashes).reshape(-1, 2, KEY_BYTES)


def _read(path: Path, what: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"the {what} cannot be read: {error.strerror or error}", place=str(path),
                        remedy="put it back, or start again without it") from None

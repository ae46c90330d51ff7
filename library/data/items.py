"""All pictures of a run as columns. A million pictures cost some fifty bytes each; what one batch needs becomes objects."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy
import xxhash

from library.data.bucket import Placement, Size, resized
from library.data.spec import DatasetSpec, SubsetSpec
from library.data.strings import Strings


@dataclass(frozen=True)
class Listing:
    """The pictures of one subset, in the order of their names. N rows; arrays may be memory-mapped from a kept index.

    ``names`` are relative to ``root``, with ``/`` between folders. ``captions`` are the words as they stand in the caption
    source (all lines). ``masks`` are absolute paths of mask pictures, or empty texts; None when the subset has no mask files.
    ``content`` and ``mask_content`` hold 16-byte hashes of the files' bytes, all zero where not yet known (or no mask).
    """

    root: Path
    names: Strings
    captions: Strings
    sizes: numpy.ndarray  # (N, 2) int32: width, height after the EXIF orientation
    name_hash: numpy.ndarray  # (N,) uint64: keyed.hash64(name), for orders that do not change when a picture is added
    stamps: numpy.ndarray  # (N, 2) int64: bytes and mtime in ns of the picture file when it was looked at
    content: numpy.ndarray  # (N, 16) uint8
    weights: numpy.ndarray | None = None  # (N,) float32: a record's own loss weight; None: all 1
    masks: Strings | None = None
    mask_content: numpy.ndarray | None = None  # (N, 16) uint8; None exactly when ``masks`` is

    def __len__(self) -> int:
        return len(self.names)


@dataclass(frozen=True)
class Item:
    """One picture of one subset. ``sample_id`` (``<dataset>.<subset>/<name>``) does not depend on where the folder
    lies, save for a listed file outside of it."""

    sample_id: str
    path: Path
    size: Size
    caption: str
    repeats: int
    placement: Placement
    subset: SubsetSpec
    mask: Literal["alpha"] | Path | None  # where the loss mask comes from
    weight: float  # of the loss: the subset's times the record's own; prior_loss_weight is not in it


@dataclass(frozen=True)
class Items(Sequence[Item]):
    """Rows of the listings of all subsets. Columns have length N; ``take`` makes a selection, nothing changes in place."""

    specs: tuple[DatasetSpec, ...]
    listings: tuple[Listing, ...]  # one per subset, datasets in order
    listing: numpy.ndarray  # (N,) uint16: index into ``listings``
    row: numpy.ndarray  # (N,) int32: row of that listing
    repeats: numpy.ndarray  # (N,) int32
    group: numpy.ndarray  # (N,) int32: index into ``groups``
    groups: tuple[tuple[int, Size], ...]  # (dataset, bucket): pictures of one group can share a batch

    @cached_property
    def subsets(self) -> tuple[SubsetSpec, ...]:
        """Aligned with ``listings``."""
        return tuple(subset for dataset in self.specs for subset in dataset.subsets)

    def __len__(self) -> int:
        return len(self.row)

    def __getitem__(self, index: int) -> Item:  # type: ignore[override]  # selections are made with take()
        if not 0 <= index < len(self):
            raise IndexError(index)
        listing, subset, row = self._at(index)
        width, height = (int(side) for side in listing.sizes[row])
        mask: Literal["alpha"] | Path | None = None
        if subset.mask == "alpha":
            mask = "alpha"
        elif listing.masks is not None and listing.masks[row]:
            mask = Path(listing.masks[row])
        weight = subset.loss_weight * (1.0 if listing.weights is None else float(listing.weights[row]))
        return Item(self.sample_id(index), self.path(index), (width, height), listing.captions[row], int(self.repeats[index]),
                    self.specs[subset.dataset].rule.place((width, height)), subset, mask, weight)

    def path(self, index: int) -> Path:
        listing, _, row = self._at(index)
        return listing.root / listing.names[row]

    def sample_id(self, index: int) -> str:
        listing, subset, row = self._at(index)
        return f"{subset.dataset}.{subset.number}/{listing.names[row]}"

    def caption(self, index: int) -> str:
        listing, _, row = self._at(index)
        return listing.captions[row]

    def subset(self, index: int) -> SubsetSpec:
        return self.subsets[int(self.listing[index])]

    @property
    def sizes(self) -> numpy.ndarray:
        """(N, 2) int32."""
        return self.column("sizes")

    @property
    def dataset(self) -> numpy.ndarray:
        """(N,) int32: index into ``specs``."""
        return numpy.array([number for number, _ in self.groups], dtype=numpy.int32)[self.group]

    @property
    def buckets(self) -> numpy.ndarray:
        """(N, 2) int32."""
        return numpy.array([bucket for _, bucket in self.groups], dtype=numpy.int32).reshape(-1, 2)[self.group]

    @property
    def resized(self) -> numpy.ndarray:
        """(N, 2) int32: what pictures are scaled to before they are cut to their buckets."""
        dataset, sizes, buckets = self.dataset, self.sizes, self.buckets
        result = numpy.empty((len(self), 2), dtype=numpy.int32)
        for number, spec in enumerate(self.specs):
            here = dataset == number
            result[here] = resized(sizes[here], buckets[here], spec.rule)
        return result

    @property
    def kept_shares(self) -> numpy.ndarray:
        """(N,) float64: how much of the scaled picture's area lies inside its bucket."""
        return self.buckets.prod(axis=1, dtype=numpy.int64) / self.resized.prod(axis=1, dtype=numpy.int64)

    def column(self, name: str) -> numpy.ndarray:
        """A column of the listings, for the rows of this selection. A copy."""
        first = getattr(self.listings[0], name)
        values = numpy.empty((len(self), *first.shape[1:]), dtype=first.dtype)
        for index, listing in enumerate(self.listings):
            here = self.listing == index
            values[here] = getattr(listing, name)[self.row[here]]
        return values

    def take(self, which: numpy.ndarray) -> Items:
        """The rows of a boolean mask or of row numbers, in that order."""
        return replace(self, listing=self.listing[which], row=self.row[which], repeats=self.repeats[which],
                       group=self.group[which])

    def digest(self) -> str:
        """Of the names, sizes, captions and repeats: processes that agree on it make the same plan and read the same words."""
        state = xxhash.xxh3_128()
        for values in (self.listing, self.row, self.repeats, self.group):
            state.update(numpy.ascontiguousarray(values))
        for listing in self.listings:
            for values in (listing.name_hash, listing.sizes, listing.captions.offsets, listing.captions.blob):
                state.update(numpy.ascontiguousarray(values))
        return state.hexdigest()

    def _at(self, index: int) -> tuple[Listing, SubsetSpec, int]:
        number = int(self.listing[index])
        return self.listings[number], self.subsets[number], int(self.row[index])

"""Pictures that are the same file under several names. Only those of equal length and size are compared."""

from __future__ import annotations

from contextlib import suppress

import numpy

from library.data.items import Items
from library.data.keyed import hash64, mix_array
from library.data.keys import content_hash


def duplicates(items: Items, byte_budget: int) -> tuple[list[list[int]], int]:
    """(groups of rows with equal bytes, pictures that were not compared because ``byte_budget`` was spent).

    Hashes that are known from an earlier run cost nothing. A picture that several subsets name is no copy of itself.
    """
    rows = _distinct_files(items)
    stamps, sizes, content = (items.column(name)[rows] for name in ("stamps", "sizes", "content"))
    looks = numpy.column_stack([stamps[:, 0], sizes.astype(numpy.int64)])
    candidates = [group for group in _equal(looks) if stamps[group[0], 0] > 0]
    unread, spent, found = 0, 0, []
    for group in candidates:
        unknown = [index for index in group if not content[index].any()]
        cost = sum(int(stamps[index, 0]) for index in unknown)
        if spent + cost > byte_budget:
            unread += len(group)
            continue
        spent += cost
        hashes: dict[bytes, list[int]] = {}
        for index in group:
            row = int(rows[index])
            with suppress(OSError):  # it went away meanwhile; whoever trains on it will say so
                known = content[index].tobytes() if content[index].any() else content_hash(items.path(row).read_bytes())
                hashes.setdefault(known, []).append(row)
        found += [same for same in hashes.values() if len(same) > 1]
    return found, unread


def _distinct_files(items: Items) -> numpy.ndarray:
    """One row for each file, in order."""
    root = numpy.array([hash64(str(listing.root)) for listing in items.listings], dtype=numpy.uint64)
    # 64 bits tell names apart: two of a million names share a hash once in 10^7 folders.
    _, first = numpy.unique(mix_array(items.column("name_hash") ^ root[items.listing]), return_index=True)
    return numpy.sort(first)


def _equal(values: numpy.ndarray) -> list[list[int]]:
    """Groups of two and more rows of ``values`` (N, D) int64 that are equal (or, once in ages, share a 64-bit hash), in the order
    of their first members."""
    keys = numpy.zeros(len(values), dtype=numpy.uint64)
    for column in values.T:
        keys = mix_array(keys ^ column.astype(numpy.uint64))
    order = numpy.argsort(keys, kind="stable")
    ordered = keys[order]
    bounds = numpy.concatenate([[0], numpy.flatnonzero(ordered[1:] != ordered[:-1]) + 1, [len(order)]])
    several = numpy.flatnonzero(numpy.diff(bounds) > 1)
    return sorted(order[bounds[index]:bounds[index + 1]].tolist() for index in several)

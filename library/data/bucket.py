"""Which size each picture is trained at. Pure functions; sizes are (width, height) in pixels.

The rules are those of the dialect (``reference/peer-census.md`` 2.7) with two repairs: ratios are compared by their
logarithm, so that a portrait picture is treated exactly as its landscape mirror image, and a bucket's side is limited
by default only as far as the area asks for.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

import numpy

CHUNK = 1 << 18  # pictures looked at together: the columns of a chunk stay in the processor's cache
UNSURE = 1e-9  # relative; far above the rounding of a float64 and far below the difference of two real shapes

Size = tuple[int, int]


@dataclass(frozen=True)
class Placement:
    """A picture is scaled to ``resized``; the training picture is the ``bucket``-sized part at ``crop`` (left, top)."""

    bucket: Size
    resized: Size
    crop: tuple[int, int]


@dataclass(frozen=True)
class Rule:
    """How one dataset turns a picture's size into a placement. ``resolution`` is a size whose area is the budget, or
    without ``enable_bucket`` the one size of all pictures; limits are sides in pixels; every side is a multiple of
    ``step``."""

    resolution: Size
    enable_bucket: bool
    minimum: int
    maximum: int | None
    step: int
    no_upscale: bool

    def place(self, size: Size) -> Placement:
        """The placement of a picture of ``size`` pixels (after its EXIF orientation)."""
        if not self.enable_bucket:
            return _cover(size, self.resolution)
        if self.no_upscale:
            return _place_without_enlarging(size, self.resolution[0] * self.resolution[1], self.step)
        return _cover(size, _bucket_for(size, self.resolution, self.minimum, self.maximum, self.step))


@lru_cache(maxsize=64)
def bucket_sizes(resolution: Size, minimum: int, maximum: int | None, step: int) -> tuple[Size, ...]:
    """All buckets, sorted: for every width the largest height that keeps within the area, both ways round.

    ``maximum`` None lets the long side grow until the short one meets ``minimum``. Empty when nothing fits the limits.
    """
    area = resolution[0] * resolution[1]
    lowest = -(-minimum // step) * step
    highest = (area // lowest if maximum is None else maximum) // step * step
    square = min(math.isqrt(area) // step * step, highest)
    sizes = {(square, square)} if square >= lowest else set()
    for width in range(lowest, highest + 1, step):
        height = min(area // width // step * step, highest)
        if height >= lowest:
            sizes |= {(width, height), (height, width)}
    return tuple(sorted(sizes))


@lru_cache(maxsize=64)
def _by_ratio(resolution: Size, minimum: int, maximum: int | None, step: int) -> tuple[list[float], list[Size], frozenset[Size]]:
    """Rising log ratios, the bucket of each, and the set of all buckets.

    No two buckets have one shape: of two sizes h and k*h in whole steps, the smaller has room for (k*k - 1) * h more, which is
    more than two steps, so it would have been made longer.
    """
    every = bucket_sizes(resolution, minimum, maximum, step)
    assert every, "spec.load refuses limits that leave no bucket"
    shapes = {round(_log_ratio(size), 12): size for size in every}
    assert len(shapes) == len(every), "two buckets of one shape"
    ratios = sorted(shapes)
    return ratios, [shapes[ratio] for ratio in ratios], frozenset(every)


def _bucket_for(size: Size, resolution: Size, minimum: int, maximum: int | None, step: int) -> Size:
    """The bucket of exactly this size, else the one of the closest log ratio."""
    ratios, sizes, every = _by_ratio(resolution, minimum, maximum, step)
    if size in every:
        return size
    ratio = _log_ratio(size)
    above = bisect_left(ratios, ratio)
    return _closest(ratio, sizes[max(above - 1, 0):above + 1])


def _log_ratio(size: Size) -> float:
    return math.log(size[0]) - math.log(size[1])


def _closest(ratio: float, sizes: Iterable[Size]) -> Size:
    """The size of the closest log ratio; among equals the larger, then the less elongated, then (which only happens to
    square pictures) the landscape one."""
    def rank(each: Size) -> tuple:
        return round(abs(_log_ratio(each) - ratio), 12), -each[0] * each[1], max(each), -each[0]
    return min(sizes, key=rank)


def _cover(size: Size, bucket: Size) -> Placement:
    """Scale to the smallest size that covers the bucket, keep the middle."""
    width, height = size
    if width * bucket[1] >= height * bucket[0]:  # the picture is the wider one: match the heights
        resized = ((2 * bucket[1] * width + height) // (2 * height), bucket[1])
    else:
        resized = (bucket[0], (2 * bucket[0] * height + width) // (2 * width))
    return _centred(resized, bucket)


def _centred(resized: Size, bucket: Size) -> Placement:
    return Placement(bucket, resized, ((resized[0] - bucket[0]) // 2, (resized[1] - bucket[1]) // 2))


def _place_without_enlarging(size: Size, area: int, step: int) -> Placement:
    """A picture within the area keeps its size and loses less than a step from each side; a larger one is first
    scaled down to the area. The one exception to never enlarging: no side can be shorter than one step."""
    width, height = size
    if width * height <= area and min(size) >= step:
        return _centred(size, (width // step * step, height // step * step))
    candidates = set()
    for side, other, order in ((width, height, 1), (height, width, -1)):
        # Scale to the area, round one side down to the step, then the other one to what keeps the picture's shape.
        first = max(min(side, math.isqrt(side * area // other)) // step * step, step)
        second = max(first * other // side // step * step, step)
        if first * second > area:  # only for shapes so long that the short side had to be raised to one step
            first, second = (area // second // step * step, second) if first > second else (first, area // first // step * step)
        candidates.add((first, second)[::order])
    return _cover(size, _closest(_log_ratio(size), candidates))


def assign(sizes: numpy.ndarray, rule: Rule) -> tuple[numpy.ndarray, tuple[Size, ...]]:
    """The buckets of many pictures at once: for ``sizes`` (N, 2) an index (N,) int32 into the buckets in use, sorted.

    Exactly what ``Rule.place`` says. Floating point decides only where it can: what lies within one part in a thousand
    million of a border is given to ``Rule.place`` itself, once for each distinct size.
    """
    sizes = numpy.asarray(sizes)
    index = numpy.zeros(len(sizes), dtype=numpy.int32)
    if not rule.enable_bucket:
        return index, (rule.resolution,) if len(sizes) else ()
    found = _shrunken_buckets if rule.no_upscale else _listed_buckets
    tables: list[numpy.ndarray] = []  # the buckets of each chunk as codes, sorted; ``index`` counts within it for now
    for start in range(0, len(sizes), CHUNK):
        codes, index[start:start + CHUNK] = found(sizes[start:start + CHUNK], rule)
        tables.append(codes)
    every = numpy.unique(numpy.concatenate(tables)) if tables else numpy.empty(0, dtype=numpy.int64)
    for number, codes in enumerate(tables):
        here = slice(number * CHUNK, (number + 1) * CHUNK)
        index[here] = numpy.searchsorted(every, codes).astype(numpy.int32)[index[here]]
    return index, tuple(_decode(code) for code in every)


def resized(sizes: numpy.ndarray, buckets: numpy.ndarray, rule: Rule) -> numpy.ndarray:
    """``Rule.place(...).resized`` of many pictures: ``sizes`` and their ``buckets`` (N, 2) give (N, 2) int32. The middle
    crop begins at ``(resized - bucket) // 2``."""
    result = numpy.empty((len(sizes), 2), dtype=numpy.int32)
    for start in range(0, len(sizes), CHUNK):
        here = slice(start, start + CHUNK)
        width, height = numpy.asarray(sizes[here], dtype=numpy.int64).T
        wide, high = numpy.asarray(buckets[here], dtype=numpy.int64).T
        wider = width * high >= height * wide
        scaled = numpy.stack([numpy.where(wider, (2 * high * width + height) // (2 * height), wide),
                              numpy.where(wider, high, (2 * wide * height + width) // (2 * width))], axis=1)
        if rule.enable_bucket and rule.no_upscale:
            kept = _keeps_its_size(width, height, rule)
            scaled[kept] = sizes[here][kept]
        result[here] = scaled
    return result


def _encode(width: numpy.ndarray, height: numpy.ndarray) -> numpy.ndarray:
    """One int64 for each size; codes sort as the sizes do."""
    return width.astype(numpy.int64) << 32 | height.astype(numpy.int64)


def _decode(code: int) -> Size:
    return int(code) >> 32, int(code) & 0xFFFFFFFF


def _listed_buckets(sizes: numpy.ndarray, rule: Rule) -> tuple[numpy.ndarray, numpy.ndarray]:
    """(codes of the chunk's buckets, index into them (n,)) where the buckets are those of ``bucket_sizes``."""
    borders, codes = _borders(rule)
    # Borders come in pairs around the true ones, so an odd place says "too close to tell". No two buckets have one
    # shape (see _by_ratio), so the exact size needs no case of its own.
    place = numpy.searchsorted(borders, sizes[:, 0] / sizes[:, 1])
    bucket = codes[place >> 1]
    _settle(bucket, sizes, place & 1 == 1, rule)
    return _index_of(bucket)


@lru_cache(maxsize=64)
def _borders(rule: Rule) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Borders between neighbouring buckets as ratios of width to height, each twice; the codes of the buckets."""
    ratios, sizes, _ = _by_ratio(rule.resolution, rule.minimum, rule.maximum, rule.step)
    middle = numpy.exp((numpy.array(ratios[1:]) + numpy.array(ratios[:-1])) / 2)
    borders = numpy.stack([middle * (1 - UNSURE), middle * (1 + UNSURE)], axis=1).ravel()
    return borders, _encode(*numpy.array(sizes, dtype=numpy.int64).T)


def _shrunken_buckets(sizes: numpy.ndarray, rule: Rule) -> tuple[numpy.ndarray, numpy.ndarray]:
    """(codes of the chunk's buckets, index into them (n,)) by the rule of ``_place_without_enlarging``."""
    area, step = rule.resolution[0] * rule.resolution[1], rule.step
    width, height = sizes.astype(numpy.int64).T
    bucket = _encode(width // step * step, height // step * step)
    large = numpy.flatnonzero(~_keeps_its_size(width, height, rule))
    width, height = width[large], height[large]
    ratio, candidates, distances = numpy.log(width / height), [], []
    for side, other, turned in ((width, height, False), (height, width, True)):
        # float64 gives the whole part of a root exactly below 2**52, far more than side * area of any picture file
        longest = numpy.sqrt(side * area // other).astype(numpy.int64)
        first = numpy.maximum(numpy.minimum(side, longest) // step * step, step)
        second = numpy.maximum(first * other // side // step * step, step)
        over = first * second > area
        shorter = area // numpy.where(first > second, second, first) // step * step
        first, second = (numpy.where(over & (first > second), shorter, first),
                         numpy.where(over & (first <= second), shorter, second))
        wide, high = (second, first) if turned else (first, second)
        candidates.append(_encode(wide, high))
        distances.append(numpy.abs(numpy.log(wide / high) - ratio))
    bucket[large] = numpy.where(distances[0] < distances[1], *candidates)
    unsure = numpy.zeros(len(sizes), dtype=bool)
    unsure[large] = (numpy.abs(distances[0] - distances[1]) < UNSURE) & (candidates[0] != candidates[1])
    _settle(bucket, sizes, unsure, rule)
    return _index_of(bucket)


def _keeps_its_size(width: numpy.ndarray, height: numpy.ndarray, rule: Rule) -> numpy.ndarray:
    """Where ``no_upscale`` leaves a picture as large as it is (int64 sides, so that the area fits)."""
    return (width * height <= rule.resolution[0] * rule.resolution[1]) & (numpy.minimum(width, height) >= rule.step)


def _settle(bucket: numpy.ndarray, sizes: numpy.ndarray, unsure: numpy.ndarray, rule: Rule) -> None:
    """Ask ``Rule.place`` about the rows that are ``unsure``; ``bucket`` (codes) is changed in place."""
    rows = numpy.flatnonzero(unsure)
    if len(rows):
        distinct, inverse = numpy.unique(_encode(*sizes[rows].T), return_inverse=True)
        placed = numpy.array([rule.place(_decode(code)).bucket for code in distinct], dtype=numpy.int64)
        bucket[rows] = _encode(*placed.T)[inverse]


def _index_of(codes: numpy.ndarray) -> tuple[numpy.ndarray, numpy.ndarray]:
    return numpy.unique(codes, return_inverse=True)

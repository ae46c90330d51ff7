"""Which size each picture is trained at, and which samples make which step. Pure functions; sizes are (width, height).

Sizes: the rules are those of the dialect (``reference/peer-census.md`` 2.7) with two repairs: ratios are compared by their
logarithm, so that a portrait picture is treated exactly as its landscape mirror image, and a bucket's side is limited
by default only as far as the area asks for.

Steps: a function of the items, the batch sizes, the seed and the epoch. Nothing depends on workers or on global random
state, and the plan of several ranks is the plan of one rank dealt out, so a run can be repeated, resumed and moved to
another number of processes.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from library.data.scan import Item

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
    """Rising log ratios, for each the preferred bucket of that shape, and the set of all buckets."""
    every = bucket_sizes(resolution, minimum, maximum, step)
    assert every, "spec.load refuses limits that leave no bucket"
    best: dict[float, Size] = {}
    for size in every:
        ratio = round(_log_ratio(size), 12)
        best[ratio] = _closest(ratio, (size, best.get(ratio, size)))
    ratios = sorted(best)
    return ratios, [best[ratio] for ratio in ratios], frozenset(every)


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


def report(items: Iterable[Item]) -> list[str]:
    """One line per dataset and bucket for the log: size, pictures, pictures with repeats, share of pixels cropped away."""
    pictures: Counter[tuple[int, Size]] = Counter()
    repeated: Counter[tuple[int, Size]] = Counter()
    kept: dict[tuple[int, Size], float] = {}
    for item in items:
        key, place = (item.dataset, item.placement.bucket), item.placement
        pictures[key] += 1
        repeated[key] += item.repeats
        share = place.bucket[0] * place.bucket[1] / (place.resized[0] * place.resized[1])
        kept[key] = kept.get(key, 0.0) + share
    return [f"dataset {dataset + 1}, bucket {width}x{height}: {pictures[key]} pictures, {repeated[key]} with repeats, "
            f"{1 - kept[key] / pictures[key]:.1%} of the pixels cropped away"
            for key in sorted(pictures) for dataset, (width, height) in (key,)]


@dataclass(frozen=True)
class Occurrence:
    """One showing of one picture in an epoch. ``sample_id`` is ``<item's id>#<repeat>``: noise is drawn from it."""

    item: int
    repeat: int
    sample_id: str


@dataclass(frozen=True)
class MicroBatch:
    """What one rank runs at once: pictures of one dataset and bucket. A ``filler`` keeps a rank busy that would have
    nothing to do in the last step of an epoch; it counts nothing."""

    occurrences: tuple[Occurrence, ...]
    filler: bool = False


@dataclass(frozen=True)
class StepBatches:
    """One optimizer step. ``micro[rank]`` are that rank's batches in order, equally many for all ranks;
    ``real_samples`` counts the pictures of all ranks and batches without fillers."""

    epoch: int
    real_samples: int
    micro: tuple[tuple[MicroBatch, ...], ...]


def plan_epoch(items: Sequence[Item], batch_sizes: Sequence[int], seed: int, epoch: int) -> tuple[tuple[Occurrence, ...], ...]:
    """The batches of one epoch, in order. Every picture occurs ``repeats`` times; a batch holds pictures of one
    dataset and bucket, ``batch_sizes[dataset]`` of them save the last of each bucket.

    The order is the order of a keyed hash of the sample ids: the same on every platform, and a picture added or removed
    leaves the others' order alone. Batches follow the hash of their first sample, so buckets are mixed and, with a
    single bucket, 4 batches of 1 hold the same pictures as 1 batch of 4.
    """
    key = f"{seed}/{epoch}".encode()
    assert len(key) <= 64, "blake2b takes keys of up to 64 bytes"
    groups: dict[tuple[int, tuple[int, int]], list[tuple[bytes, Occurrence]]] = {}
    for index, item in enumerate(items):
        group = groups.setdefault((item.dataset, item.placement.bucket), [])
        for repeat in range(item.repeats):
            sample_id = f"{item.sample_id}#{repeat}"
            group.append((blake2b(sample_id.encode(), digest_size=16, key=key).digest(), Occurrence(index, repeat, sample_id)))
    batches = []
    for (dataset, _), group in groups.items():
        group.sort(key=lambda pair: (pair[0], pair[1].sample_id))
        size = batch_sizes[dataset]
        for start in range(0, len(group), size):
            chunk = group[start:start + size]
            batches.append((chunk[0][0], chunk[0][1].sample_id, tuple(occurrence for _, occurrence in chunk)))
    batches.sort(key=lambda batch: batch[:2])
    return tuple(occurrences for _, _, occurrences in batches)


class StepPlan:
    """Deals the batches of endless epochs to steps, micro-batches and ranks. Steps and epochs count from 0.

    A step takes ``world_size * accumulation`` batches; the last step of an epoch takes what is left, so it may have fewer
    micro-batches, and an epoch never shares a step with the next one. Within a step micro-batch ``m`` of rank ``r`` is
    batch ``m * world_size + r``.
    """

    def __init__(self, items: Sequence[Item], batch_sizes: Sequence[int], seed: int, world_size: int = 1, accumulation: int = 1):
        assert items and world_size >= 1 and accumulation >= 1
        assert len({item.sample_id for item in items}) == len(items), "sample ids must differ"
        self.world_size, self.accumulation = world_size, accumulation
        # A bound cache: the two latest epochs are enough for a loader that runs ahead over the seam.
        self._epoch = lru_cache(maxsize=2)(lambda epoch: plan_epoch(items, batch_sizes, seed, epoch))
        self.batches_per_epoch = len(self._epoch(0))
        self.steps_per_epoch = -(-self.batches_per_epoch // (world_size * accumulation))

    def step(self, index: int) -> StepBatches:
        epoch, position = divmod(index, self.steps_per_epoch)
        stride = self.world_size * self.accumulation
        batches = self._epoch(epoch)[position * stride:(position + 1) * stride]
        rounds = -(-len(batches) // self.world_size)
        dealt = [MicroBatch(occurrences) for occurrences in batches]
        dealt += [MicroBatch(batches[0], filler=True)] * (rounds * self.world_size - len(batches))
        micro = tuple(tuple(dealt[rank::self.world_size]) for rank in range(self.world_size))
        return StepBatches(epoch, sum(map(len, batches)), micro)

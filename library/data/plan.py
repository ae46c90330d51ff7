"""Which samples make which step. A function of the items, the batch sizes, the seed and the epoch: nothing depends on workers
or on global random state, so a run can be repeated, resumed and moved to another number of processes.

An epoch is laid out so:

1. Every showing (picture, repeat) has a hash of (seed, epoch, dataset, subset, name, repeat). Pictures of one dataset and
   bucket are a *group*; a group's showings in the order of their hashes are cut into batches, so only the last of a group can
   be short. A picture added or removed leaves the order of the others alone.
2. A *full step* is ``stride`` batches of one group (``stride`` = ranks x accumulation), so that every rank has the same work.
   What is left of each group, fewer than ``stride`` batches, goes into *mixed steps*: taken in hashed order, ``stride`` at a
   time, and inside a step sorted by work, so that what the ranks do at the same time is as equal as can be. Nothing is
   dropped; only the last mixed step can be short, and ranks without a batch in it repeat one that then counts nothing.
3. Steps follow the hash of one of their samples, drawn by a hash too. (The first sample would put the steps of rare buckets at
   the beginning of every epoch: the lowest hash of many is low.) With one group and no step left over that is the order of the
   samples, so 4 batches of 1 are 1 batch of 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy

from library.data.bucket import Size
from library.data.items import Items
from library.data.keyed import GAMMA, hash64, mix_array

REPORTED = 40  # buckets named in the log


@dataclass(frozen=True)
class Occurrence:
    """One showing of one picture in an epoch: a row of the plan's items. ``sample_id`` is ``<item's id>#<repeat>``: noise is
    drawn from it."""

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


class StepPlan:
    """Deals the batches of endless epochs to steps, micro-batches and ranks. Steps and epochs count from 0, and an epoch never
    shares a step with the next one.

    Within a step micro-batch ``m`` of rank ``r`` is batch ``m * world_size + r``. ``stride`` (batches in a step) is given to go
    on with an epoch on another number of ranks: with the stride of the old plan, step ``i`` has the same samples whatever
    ``world_size`` is, and ``accumulation`` follows from it (the last round of a step then may have fillers).

    The constructor only counts. An epoch is laid out when one of its steps is asked for, some 16 bytes for each showing, and
    kept; after that a step is a slice.
    """

    def __init__(self, items: Items, batch_sizes: Sequence[int], seed: int, world_size: int = 1, accumulation: int = 1,
                 stride: int | None = None):
        assert len(items) and world_size >= 1 and accumulation >= 1 and (stride is None or stride >= 1)
        self.items, self.seed, self.world_size = items, seed, world_size
        self.stride = stride or world_size * accumulation
        self.groups = _Groups.of(items, batch_sizes, self.stride)
        self.samples_per_epoch = int(self.groups.showings.sum())
        self.batches_per_epoch = int(self.groups.batches.sum())
        self.steps_per_epoch = int(self.groups.full_steps.sum()) - int(-self.groups.left_over.sum() // self.stride)
        assert self.samples_per_epoch, "no picture is ever shown"
        # Sample numbers count the showings of picture 0, then those of picture 1, ...
        self._first = None if (items.repeats == 1).all() else _starts(items.repeats)
        # A bound cache: the two latest epochs are enough for a loader that runs ahead over the seam.
        self._epoch = lru_cache(maxsize=2)(self._lay_out)

    def step(self, index: int) -> StepBatches:
        epoch, position = divmod(index, self.steps_per_epoch)
        plan = self._epoch(epoch)
        dealt = []
        for batch in range(plan.steps[position], plan.steps[position + 1]):
            start = int(plan.starts[batch])
            dealt.append(MicroBatch(tuple(map(self._occurrence, plan.order[start:start + int(plan.counts[batch])].tolist()))))
        real = sum(len(batch.occurrences) for batch in dealt)
        # The last batch is the smallest of a mixed step, so it is the cheapest to repeat.
        dealt += [MicroBatch(dealt[-1].occurrences, filler=True)] * (-len(dealt) % self.world_size)
        return StepBatches(epoch, real, tuple(tuple(dealt[rank::self.world_size]) for rank in range(self.world_size)))

    def _occurrence(self, sample: int) -> Occurrence:
        item, repeat = sample, 0
        if self._first is not None:
            item = int(numpy.searchsorted(self._first, sample, side="right")) - 1
            repeat = sample - int(self._first[item])
        return Occurrence(item, repeat, f"{self.items.sample_id(item)}#{repeat}")

    def _lay_out(self, epoch: int) -> _Epoch:
        order, keys = self._sorted_samples(epoch)
        compact = order.dtype  # holds every count here
        starts, counts = self.groups.cut(compact)
        full = _within(self.groups.batches, compact) < numpy.repeat((self.groups.full_steps * self.stride).astype(compact),
                                                                    self.groups.batches)
        # The batches of full steps, group after group; a group's are a multiple of the stride.
        batches, rest = numpy.flatnonzero(full).astype(compact), numpy.flatnonzero(~full)
        first, last = batches[::self.stride], batches[self.stride - 1::self.stride]
        step_keys = _drawn(keys, starts[first], starts[last] + counts[last])
        mixed, mixed_sizes, mixed_keys = self._mix(rest, keys, starts, counts)
        sizes = numpy.concatenate([numpy.full(len(first), self.stride), mixed_sizes]).astype(compact)
        del keys, full, first, last, rest
        # Batch numbers step after step, first in the order made here, then in the order of the steps' hashes.
        batches = numpy.concatenate([batches, mixed.astype(compact)])
        steps = _argsort(numpy.concatenate([step_keys, mixed_keys]))
        batches = batches[_ranges(_starts(sizes)[:-1].astype(compact)[steps], sizes[steps])]
        return _Epoch(order, starts[batches], counts[batches].astype(numpy.int32), _starts(sizes[steps]).astype(compact))

    def _sorted_samples(self, epoch: int) -> tuple[numpy.ndarray, numpy.ndarray]:
        """(sample numbers, their hashes), group after group, in each in the order of the hashes."""
        items = self.items
        salts = numpy.array([hash64("order", self.seed, epoch, subset.dataset, subset.number) for subset in items.subsets],
                            dtype=numpy.uint64)
        keys, group = items.column("name_hash"), items.group
        keys ^= salts[items.listing]
        if self._first is not None:
            keys, group = numpy.repeat(keys, items.repeats), numpy.repeat(group, items.repeats)
            # Showings of one picture follow each other in its stream of draws.
            keys += _within(items.repeats, numpy.uint64) * numpy.uint64(GAMMA)
        keys = mix_array(keys)
        if len(items.groups) <= 1 << 16:
            group = group.astype(numpy.uint16)  # numpy sorts these by radix
        order = numpy.argsort(group, kind="stable")
        keys = keys[order]
        order = order.astype(numpy.int32 if len(keys) < 2**31 else numpy.int64, copy=False)
        bounds = _starts(self.groups.showings).tolist()
        for start, stop in zip(bounds, bounds[1:], strict=False):  # sorting each group by itself is kind to the caches
            within = _argsort(keys[start:stop])
            keys[start:stop] = keys[start:stop][within]
            order[start:stop] = order[start:stop][within]
        return order, keys

    def _mix(self, batches: numpy.ndarray, keys: numpy.ndarray, starts: numpy.ndarray,
             counts: numpy.ndarray) -> tuple[numpy.ndarray, numpy.ndarray, numpy.ndarray]:
        """The mixed steps of the left-over ``batches``: (batch numbers step after step, batches of each step, hash of each)."""
        drawn = _drawn(keys, starts[batches], starts[batches] + counts[batches])
        order = _argsort(drawn)
        batches, drawn = batches[order], drawn[order]
        step = numpy.arange(len(batches)) // self.stride
        sizes = numpy.bincount(step)
        first = _starts(sizes)[:-1]
        step_keys = drawn[first + (mix_array(drawn[first]) % numpy.maximum(sizes, 1).astype(numpy.uint64)).astype(numpy.int64)]
        group = numpy.searchsorted(_starts(self.groups.batches), batches, side="right") - 1
        work = self.groups.pixels[group] * counts[batches]
        return batches[numpy.lexsort((-work, step))], sizes, step_keys  # lexsort is stable: equal work keeps the hashed order


@dataclass(frozen=True)
class _Epoch:
    """``order``: sample numbers. Batch ``b`` is ``counts[b]`` of them from ``starts[b]``; step ``s`` is the batches from
    ``steps[s]`` to ``steps[s + 1]``."""

    order: numpy.ndarray
    starts: numpy.ndarray
    counts: numpy.ndarray
    steps: numpy.ndarray


@dataclass(frozen=True)
class _Groups:
    """What is the same in every epoch, one row for each group of the items (also those without pictures)."""

    showings: numpy.ndarray
    batch_size: numpy.ndarray
    pixels: numpy.ndarray  # of one picture
    batches: numpy.ndarray
    full_steps: numpy.ndarray
    left_over: numpy.ndarray  # batches that fill no step of their group

    @classmethod
    def of(cls, items: Items, batch_sizes: Sequence[int], stride: int) -> _Groups:
        showings = _count(items.group, items.repeats, len(items.groups))
        batch_size = numpy.array([batch_sizes[dataset] for dataset, _ in items.groups], dtype=numpy.int64)
        pixels = numpy.array([width * height for _, (width, height) in items.groups], dtype=numpy.int64)
        batches = -(-showings // batch_size)
        return cls(showings, batch_size, pixels, batches, batches // stride, batches % stride)

    def cut(self, kind: numpy.dtype) -> tuple[numpy.ndarray, numpy.ndarray]:
        """Where each batch begins among the sorted samples, and its length, as whole numbers of this ``kind``."""
        size = numpy.repeat(self.batch_size.astype(kind), self.batches)
        starts = numpy.repeat(_starts(self.showings)[:-1].astype(kind), self.batches)
        starts += _within(self.batches, kind) * size
        return starts, numpy.minimum(size, numpy.repeat(numpy.cumsum(self.showings).astype(kind), self.batches) - starts)


def _starts(counts: numpy.ndarray) -> numpy.ndarray:
    """(N + 1,) int64: where each of N stretches of these lengths begins, and the end."""
    starts = numpy.zeros(len(counts) + 1, dtype=numpy.int64)
    numpy.cumsum(counts, out=starts[1:])
    return starts


def _within(counts: numpy.ndarray, kind: type | numpy.dtype) -> numpy.ndarray:
    """0, 1, ... count - 1 for each of the counts, one stretch after the other."""
    starts = _starts(counts)
    result = numpy.arange(starts[-1], dtype=kind)
    result -= numpy.repeat(starts[:-1].astype(kind), counts)
    return result


def _ranges(starts: numpy.ndarray, counts: numpy.ndarray) -> numpy.ndarray:
    """``start, start + 1, ...`` (count of them), one stretch after the other."""
    return numpy.repeat(starts, counts) + _within(counts, starts.dtype)


def _argsort(keys: numpy.ndarray) -> numpy.ndarray:
    """The order of the keys; equal ones in the order they came in, at the speed of a sort that does not promise it."""
    order = numpy.argsort(keys)
    ordered = keys[order]
    return numpy.argsort(keys, kind="stable") if (ordered[1:] == ordered[:-1]).any() else order


def _drawn(keys: numpy.ndarray, starts: numpy.ndarray, ends: numpy.ndarray) -> numpy.ndarray:
    """The key of one sample out of each stretch, chosen by the stretch's first key."""
    offset = mix_array(keys[starts]) % (ends - starts).astype(numpy.uint64)
    return keys[starts + offset.astype(numpy.int64)]


def _count(group: numpy.ndarray, values: numpy.ndarray, groups: int) -> numpy.ndarray:
    """The sum of whole ``values`` in each group."""
    return numpy.bincount(group, weights=values, minlength=groups).astype(numpy.int64)


@dataclass(frozen=True)
class GroupFacts:
    """The pictures that can share a batch. ``kept``: share of the scaled pictures' pixels inside the middle crop."""

    dataset: int
    bucket: Size
    pictures: int
    showings: int  # pictures with their repeats
    batches: int
    batch_size: int
    kept: float


def group_facts(items: Items, batch_sizes: Sequence[int]) -> tuple[GroupFacts, ...]:
    """The groups that have pictures, by dataset and bucket."""
    groups = _Groups.of(items, batch_sizes, 1)
    pictures = numpy.bincount(items.group, minlength=len(items.groups))
    kept = numpy.bincount(items.group, weights=items.kept_shares, minlength=len(items.groups))
    facts = [GroupFacts(dataset, bucket, int(pictures[index]), int(groups.showings[index]), int(groups.batches[index]),
                        int(groups.batch_size[index]), float(kept[index] / pictures[index]))
             for index, (dataset, bucket) in enumerate(items.groups) if pictures[index]]
    return tuple(sorted(facts, key=lambda each: (each.dataset, each.bucket)))


def report(items: Items) -> list[str]:
    """One line per dataset and bucket for the log: size, pictures, pictures with repeats, share of pixels cropped away.
    Of very many buckets those with the most pictures are named."""
    facts = group_facts(items, [spec.batch_size for spec in items.specs])
    named = facts if len(facts) <= REPORTED else sorted(facts, key=lambda each: -each.pictures)[:REPORTED - 1]
    lines = [f"dataset {each.dataset + 1}, bucket {each.bucket[0]}x{each.bucket[1]}: {each.pictures} pictures, "
             f"{each.showings} with repeats, {1 - each.kept:.1%} of the pixels cropped away"
             for each in sorted(named, key=lambda each: (each.dataset, each.bucket))]
    if len(named) < len(facts):
        rest = sum(each.pictures for each in facts) - sum(each.pictures for each in named)
        lines.append(f"{len(facts) - len(named)} more buckets with {rest} pictures together")
    return lines

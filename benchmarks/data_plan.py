"""Buckets and the plan of an epoch for very many made-up pictures.

    python benchmarks/data_plan.py [--sizes 1000000 10000000] [--batch 4] [--ranks 8]

Each size runs in a process of its own: columns of sizes and name hashes as the index keeps them, then buckets (``assign``), the
plan's counts (the constructor), an epoch laid out, and steps taken at random places. Checked in the same process: every picture
once, no batch over two buckets, the same order when laid out again, all ranks of a full step alike. In the same run a loop that
does the same for one picture after the other, at 100,000: bucket, hash, group, sort, cut.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from hashlib import blake2b
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.measure import in_process, machine, peak_resident_bytes, resident_bytes, table  # noqa: E402

# Measured with bare numpy on a machine of the same kind (reference/performance.md 4.2): seconds of assigning, permuting and
# grouping ten million, and bytes of index for each sample.
REFERENCE = ("reference for 10,000,000 (bare numpy, no checks of borders): assign 2.3 s, permute 1.2 s, group 1.4 s, 18 bytes a "
             "sample; 1,000,000: 0.3 s together. Aim: 10,000,000 under 6 s")
NAIVE = 100_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1_000_000, 10_000_000])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--no-upscale", action="store_true")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        count, batch, ranks, no_upscale, naive = map(int, arguments.child)
        print(json.dumps((one_by_one if naive else columns)(count, batch, ranks, bool(no_upscale))))
        return

    def measured(count: int, naive: bool) -> dict[str, float]:
        settings = (count, arguments.batch, arguments.ranks, int(arguments.no_upscale), int(naive))
        return in_process(Path(__file__), *map(str, settings))

    results = {count: measured(count, False) for count in sorted({NAIVE, *arguments.sizes})}
    loop = measured(NAIVE, True)
    print(machine())
    rows = [(f"{count:,}", each["assign"], each["count"], each["plan"], each["assign"] + each["count"] + each["plan"],
             each["step_us"], each["plan_bytes"], each["peak_bytes"]) for count, each in results.items()]
    table(f"Buckets and plan, batch {arguments.batch}, {arguments.ranks} ranks",
          ("pictures", "buckets s", "counts s", "epoch s", "together s", "one step us", "kept bytes / sample",
           "peak bytes / sample"), rows)
    ours = results[NAIVE]["assign"] + results[NAIVE]["count"] + results[NAIVE]["plan"]
    print(f"\none picture after the other, {NAIVE:,}: buckets {loop['assign']:.2f} s, plan {loop['plan']:.2f} s; "
          f"ours is {(loop['assign'] + loop['plan']) / ours:.0f} times as fast")
    print(REFERENCE)
    last = results[max(results)]
    print(f"histogram of {max(results):,}: {int(last['buckets'])} buckets, the largest with {last['largest']:.1%}, the smallest "
          f"with {int(last['smallest'])} pictures; {last['full']:.2%} of the samples in steps where all ranks do the same")


def made_up_sizes(count: int):
    """(N, 2) int32: a photographer's mix. Cameras' fixed sizes, crops of them, and anything."""
    import numpy

    sizes = numpy.empty((count, 2), dtype=numpy.int32)
    for start in range(0, count, 1 << 20):  # in parts, so that making them does not set the peak of memory
        part = min(1 << 20, count - start)
        random = numpy.random.default_rng(start)
        width = numpy.exp(random.normal(7.1, 0.45, part)).clip(200, 9000)
        fixed = numpy.array([1.0, 1.5, 4 / 3, 16 / 9, 2 / 3, 3 / 4, 9 / 16])[random.integers(0, 7, part)]
        ratio = numpy.where(random.random(part) < 0.6, fixed, numpy.exp(random.normal(0, 0.35, part)))
        sizes[start:start + part] = numpy.stack([width, (width / ratio).clip(200, 9000)], axis=1)
    return sizes


def rule_of(no_upscale: bool):
    from library.data.bucket import Rule

    return Rule((1024, 1024), True, 256, None, 64, no_upscale)


def columns(count: int, batch: int, ranks: int, no_upscale: bool) -> dict[str, float]:
    import numpy

    from library.data.bucket import assign
    from library.data.items import Items, Listing
    from library.data.keyed import mix_array
    from library.data.plan import StepPlan
    from library.data.strings import Strings

    sizes, rule = made_up_sizes(count), rule_of(no_upscale)
    empty = Strings(numpy.zeros(0, dtype=numpy.uint8), numpy.zeros(count + 1, dtype=numpy.int64))
    listing = Listing(Path("/"), empty, empty, sizes, mix_array(numpy.arange(count, dtype=numpy.uint64)),
                      numpy.zeros((1, 2), dtype=numpy.int64), numpy.zeros((1, 16), dtype=numpy.uint8))
    started = time.perf_counter()
    group, buckets = assign(sizes, rule)
    assigned = time.perf_counter()
    spec = SimpleNamespace(subsets=(SimpleNamespace(dataset=0, number=0),), rule=rule)
    items = Items((spec,), (listing,), numpy.zeros(count, dtype=numpy.uint16), numpy.arange(count, dtype=numpy.int32),
                  numpy.ones(count, dtype=numpy.int32), group, tuple((0, bucket) for bucket in buckets))
    peak_resident_bytes()  # imports torch, which must not count below
    before = resident_bytes()
    counting = time.perf_counter()
    plan = StepPlan(items, [batch], seed=1, world_size=ranks)
    counted = time.perf_counter()
    plan.step(0)
    planned = time.perf_counter()
    peak = peak_resident_bytes() - before
    kept = sum(values.nbytes for values in vars(plan._epoch(0)).values())
    places = numpy.random.default_rng(1).integers(0, plan.steps_per_epoch, 2000).tolist()
    stepping = time.perf_counter()
    for place in places:
        plan.step(place)
    stepped = time.perf_counter()
    full = check(plan, group, batch, ranks)
    pictures = numpy.bincount(group)
    return {"assign": assigned - started, "count": counted - counting, "plan": planned - counted, "plan_bytes": kept / count,
            "peak_bytes": peak / count, "step_us": 1e6 * (stepped - stepping) / len(places), "full": full,
            "buckets": len(buckets), "largest": float(pictures.max() / count), "smallest": int(pictures.min())}


def check(plan, group, batch: int, ranks: int) -> float:
    """Assert what a plan promises, over the whole epoch; returns the share of samples in steps of one bucket."""
    import numpy

    from library.data.plan import StepPlan

    epoch = plan._epoch(0)
    assert numpy.array_equal(numpy.sort(epoch.order), numpy.arange(len(group))), "a sample lost or shown twice"
    assert int(epoch.counts.sum()) == len(group) and len(epoch.counts) == plan.batches_per_epoch
    again = StepPlan(plan.items, [batch], seed=1, world_size=ranks)._lay_out(0)
    assert all(numpy.array_equal(values, getattr(again, name)) for name, values in vars(epoch).items()), "another order"
    of_batch = group[epoch.order[epoch.starts]]
    sorted_batches = numpy.argsort(epoch.starts)
    of_sample = numpy.repeat(of_batch[sorted_batches], epoch.counts[sorted_batches])
    assert numpy.array_equal(of_sample, group[epoch.order]), "a batch over two buckets"
    alike = numpy.minimum.reduceat(of_batch, epoch.steps[:-1]) == numpy.maximum.reduceat(of_batch, epoch.steps[:-1])
    assert (numpy.diff(epoch.steps)[:-1] <= ranks).all()
    return float(numpy.add.reduceat(epoch.counts, epoch.steps[:-1])[alike].sum() / len(group))


def one_by_one(count: int, batch: int, ranks: int, no_upscale: bool) -> dict[str, float]:
    """The same result for each picture in turn, with plain Python objects."""
    sizes, rule = [tuple(size) for size in made_up_sizes(count).tolist()], rule_of(no_upscale)
    started = time.perf_counter()
    buckets = [rule.place(size).bucket for size in sizes]
    assigned = time.perf_counter()
    groups: dict[tuple[int, int], list[tuple[bytes, int]]] = {}
    for index, bucket in enumerate(buckets):
        groups.setdefault(bucket, []).append((blake2b(b"%d" % index, digest_size=8, key=b"1/0").digest(), index))
    batches = []
    for group in groups.values():
        group.sort()
        batches += [group[start:start + batch] for start in range(0, len(group), batch)]
    batches.sort(key=lambda each: each[0])
    steps = [batches[start:start + ranks] for start in range(0, len(batches), ranks)]
    assert sum(len(each) for step in steps for each in step) == count
    return {"assign": assigned - started, "plan": time.perf_counter() - assigned}


if __name__ == "__main__":
    main()

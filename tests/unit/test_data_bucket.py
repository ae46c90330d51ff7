"""Bucketing as properties over many sizes, and the epoch plan."""

import math
import random

import pytest

from library.data.bucket import Placement, Rule, bucket_sizes, plan_epoch, report
from tests.unit.data_helpers import made_up_items

RULES = [
    Rule((1024, 1024), True, 256, None, 64, False), Rule((512, 512), True, 256, 1024, 64, False),
    Rule((128, 128), True, 64, None, 16, False), Rule((768, 512), True, 300, 900, 48, False),
    Rule((1024, 1024), True, 256, None, 64, True), Rule((128, 128), True, 64, None, 32, True),
    Rule((96, 64), True, 16, None, 64, True),
]


def many_sizes():
    rng = random.Random(7)
    sizes = [(int(math.exp(rng.uniform(0, 9))) or 1, int(math.exp(rng.uniform(0, 9))) or 1) for _ in range(1500)]
    return sizes + [(1, 1), (1, 9000), (64, 64), (1024, 1024), (1344, 768), (4000, 3000), (63, 4000), (100000, 10)]


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_placements_of_many_sizes(rule):
    area = rule.resolution[0] * rule.resolution[1]
    for size in many_sizes():
        place = rule.place(size)
        (width, height), (wide, high), (left, top) = place.bucket, place.resized, place.crop
        assert width % rule.step == 0 and height % rule.step == 0 and min(width, height) >= rule.step, size
        assert width * height <= area, size
        assert 0 <= left and left + width <= wide and 0 <= top and top + height <= high, size
        assert abs((wide - width) - 2 * left) <= 1 and abs((high - height) - 2 * top) <= 1, size  # centred
        assert 2 * abs(wide * size[1] - high * size[0]) <= max(size), size  # the shape survives but for rounding
        if rule.no_upscale:
            enlarged = wide > size[0] or high > size[1]
            assert not enlarged or min(wide, high) == rule.step, size  # one step is the shortest side there is
        else:
            assert width == wide or height == high, size  # scaled no larger than it has to be
            assert (width, height) in bucket_sizes(rule.resolution, rule.minimum, rule.maximum, rule.step)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_portrait_mirrors_landscape(rule):
    for width, height in many_sizes():
        if width == height:
            continue
        here, there = rule.place((width, height)), rule.place((height, width))
        assert there == Placement(here.bucket[::-1], here.resized[::-1], here.crop[::-1]), (width, height)


def test_chosen_bucket_has_the_closest_ratio():
    rule = RULES[0]
    sizes = bucket_sizes((1024, 1024), 256, None, 64)
    for width, height in many_sizes():
        best = min(abs(math.log(w / h) - math.log(width / height)) for w, h in sizes)
        chosen = rule.place((width, height)).bucket
        assert abs(math.log(chosen[0] / chosen[1]) - math.log(width / height)) <= best + 1e-9


def test_bucket_list():
    sizes = bucket_sizes((1024, 1024), 256, None, 64)
    assert (1024, 1024) in sizes and (1344, 768) in sizes and (4096, 256) in sizes
    assert {size[::-1] for size in sizes} == set(sizes) and list(sizes) == sorted(sizes)
    # every width has the tallest height that fits, so a bucket wastes less than one step of height
    assert all(w * h <= 1024**2 and (w * (h + 64) > 1024**2 or (w + 64) * h > 1024**2) for w, h in sizes)
    assert max(max(size) for size in bucket_sizes((1024, 1024), 256, 1024, 64)) == 1024
    assert min(min(size) for size in bucket_sizes((768, 512), 300, 900, 48)) == 336
    assert bucket_sizes((128, 128), 128, 128, 16) == ((128, 128),)
    assert bucket_sizes((100, 100), 96, 120, 64) == ()


def test_exact_size_wins_and_small_pictures_keep_their_size():
    assert RULES[0].place((1408, 704)) == Placement((1408, 704), (1408, 704), (0, 0))
    assert RULES[4].place((500, 300)) == Placement((448, 256), (500, 300), (26, 22))
    assert RULES[4].place((2048, 2048)) == Placement((1024, 1024), (1024, 1024), (0, 0))
    assert RULES[4].place((30, 500)).bucket == (64, 1024)


def test_without_buckets_everything_has_the_resolution():
    rule = Rule((512, 256), False, 256, None, 64, False)
    assert rule.place((512, 256)) == Placement((512, 256), (512, 256), (0, 0))
    assert rule.place((300, 300)) == Placement((512, 256), (512, 512), (0, 128))
    assert rule.place((2000, 500)) == Placement((512, 256), (1024, 256), (256, 0))


def test_report_counts_pictures():
    lines = report(made_up_items([(64, 64), (70, 70), (128, 64)], repeats=3))
    assert len(lines) == 2 and any("64x64: 2 pictures, 6 with repeats" in line for line in lines)


SIZES = [(64, 64)] * 7 + [(100, 50)] * 5 + [(50, 100)] * 3


def test_epoch_loses_nothing_and_repeats_nothing():
    items = made_up_items(SIZES, repeats=lambda index: 1 + index % 3) + made_up_items([(80, 80)] * 5, dataset=1)
    for epoch in range(3):
        batches = plan_epoch(items, (4, 2), seed=1, epoch=epoch)
        shown = [(each.item, each.repeat) for batch in batches for each in batch]
        assert sorted(shown) == [(index, repeat) for index, item in enumerate(items) for repeat in range(item.repeats)]
        for batch in batches:
            assert len({(items[each.item].dataset, items[each.item].placement.bucket) for each in batch}) == 1
            assert 1 <= len(batch) <= (4, 2)[items[batch[0].item].dataset]
            assert all(each.sample_id == f"{items[each.item].sample_id}#{each.repeat}" for each in batch)
        # only the last batch of each of the 4 groups may be short: ceil over the groups
        sizes = {}
        for item in items:
            key = (item.dataset, item.placement.bucket)
            sizes[key] = sizes.get(key, 0) + item.repeats
        assert len(batches) == sum(-(-count // (4, 2)[key[0]]) for key, count in sizes.items())


def test_order_depends_on_seed_and_epoch_only():
    items = made_up_items([(64, 64)] * 40)
    plan = plan_epoch(items, (4,), 1, 0)
    random.seed(3)
    assert plan_epoch(items, (4,), 1, 0) == plan
    assert plan_epoch(items, (4,), 1, 1) != plan and plan_epoch(items, (4,), 2, 0) != plan


def test_order_is_shuffled_evenly():
    """Each of 8 pictures takes each place about equally often: 800 epochs, 100 expected, standard deviation 9.4."""
    items = made_up_items([(64, 64)] * 8)
    counts = [[0] * 8 for _ in range(8)]
    for epoch in range(800):
        for place, batch in enumerate(plan_epoch(items, (1,), 5, epoch)):
            counts[batch[0].item][place] += 1
    assert all(55 < count < 145 for row in counts for count in row)

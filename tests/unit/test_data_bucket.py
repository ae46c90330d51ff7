"""Bucketing as properties over many sizes; the columns agree with the rule for one picture."""

import math
import random
from fractions import Fraction

import numpy
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from library.data.bucket import Placement, Rule, assign, bucket_sizes, resized

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


SIDES = st.integers(1, 9000)


@st.composite
def rules(draw):
    """Rules that leave a bucket; sides in steps, so that small numbers give odd cases."""
    step = draw(st.sampled_from([8, 16, 48, 64]))
    resolution = (step * draw(st.integers(1, 20)), step * draw(st.integers(1, 20)))
    minimum = draw(st.integers(1, min(resolution)))
    rule = Rule(resolution, draw(st.sampled_from([True, True, True, False])), minimum,
                draw(st.none() | st.integers(minimum, 24 * step)), step, draw(st.booleans()))
    assume(rule.no_upscale or bucket_sizes(resolution, minimum, rule.maximum, step))
    return rule


@st.composite
def sizes_for(draw, rule):
    """Any sizes, squares, and sizes on the border between two buckets: what is closest in shape to both."""
    sizes = draw(st.lists(st.tuples(SIDES, SIDES), max_size=20)) + [(side, side) for side in draw(st.lists(SIDES, max_size=3))]
    if not rule.no_upscale:
        buckets = bucket_sizes(rule.resolution, rule.minimum, rule.maximum, rule.step)
        for one, other in draw(st.lists(st.tuples(st.sampled_from(buckets), st.sampled_from(buckets)), max_size=10)):
            scale = draw(st.integers(1, 5))
            product = one[0] * other[0], one[1] * other[1]  # the square root of its shape lies between the two
            sizes += [one, (one[0] * scale, one[1] * scale), (math.isqrt(product[0]), math.isqrt(product[1]))]
    return numpy.array(sizes, dtype=numpy.int32).reshape(-1, 2)


def check_columns(sizes, rule):
    index, buckets = assign(sizes, rule)
    assert index.dtype == numpy.int32 and list(buckets) == sorted(set(buckets))
    assert set(index.tolist()) == set(range(len(buckets)))  # none that no picture uses
    chosen = numpy.array(buckets, dtype=numpy.int64).reshape(-1, 2)[index]
    scaled = resized(sizes, chosen, rule)
    for size, bucket, whole in zip(sizes.tolist(), chosen.tolist(), scaled.tolist(), strict=True):
        crop = ((whole[0] - bucket[0]) // 2, (whole[1] - bucket[1]) // 2)
        assert Placement(tuple(bucket), tuple(whole), crop) == rule.place(tuple(size)), size


@given(st.data(), rules())
@settings(max_examples=150)
def test_columns_agree_with_single_pictures(data, rule):
    check_columns(data.draw(sizes_for(rule)), rule)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_columns_agree_over_the_borders_of_chunks(rule, monkeypatch):
    monkeypatch.setattr("library.data.bucket.CHUNK", 100)
    check_columns(numpy.array(many_sizes(), dtype=numpy.int32), rule)


def test_ties_are_decided_as_for_a_single_picture():
    """1:6 is exactly as far from 32x128 as from 16x144: the larger of the two, for every picture of that shape."""
    rule = Rule((64, 64), True, 16, None, 16, False)
    sizes = numpy.array([(side, 6 * side)[::way] for side in range(1, 300) for way in (1, -1)], dtype=numpy.int32)
    assert assign(sizes, rule)[1] == ((32, 128), (128, 32))
    check_columns(sizes, rule)


def test_buckets_have_different_shapes():
    for rule in RULES:
        sizes = bucket_sizes(rule.resolution, rule.minimum, rule.maximum, rule.step)
        assert len({Fraction(*size) for size in sizes}) == len(sizes)

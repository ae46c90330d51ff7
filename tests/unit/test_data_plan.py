"""The plan of an epoch as properties over many data sets, batch sizes and numbers of ranks."""

import math
import random
from collections import Counter
from itertools import groupby

import numpy
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from library.data.keyed import GAMMA, hash64, mix
from library.data.plan import REPORTED, StepPlan, group_facts, report
from tests.unit.plan_items import made_items, made_subset

SIZES = [(64, 64), (100, 50), (50, 100), (64, 96)]
BATCH_SIZES = st.lists(st.integers(1, 5), min_size=3, max_size=3)


@st.composite
def subsets(draw, index):
    count = draw(st.integers(0, 12))
    return made_subset([f"{index}-{number}.png" for number in range(count)],
                       draw(st.lists(st.sampled_from(SIZES), min_size=count, max_size=count)),
                       draw(st.lists(st.integers(0, 3), min_size=count, max_size=count)))


@st.composite
def data_sets(draw):
    """One to three datasets of one or two subsets, some of them empty, with pictures that are never shown."""
    items = made_items(*[[draw(subsets(index)) for index in range(draw(st.integers(1, 2)))]
                         for _ in range(draw(st.integers(1, 3)))])
    assume(len(items) and items.repeats.sum())
    return items


def steps_of(plan, epoch=0):
    return [plan.step(index) for index in range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)]


def batches_of(step):
    """The step's batches in the order they were dealt, fillers included."""
    return [micro for each in zip(*step.micro, strict=True) for micro in each]


def shown(step):
    return [each for batch in batches_of(step) if not batch.filler for each in batch.occurrences]


def ids(steps):
    return [sorted(each.sample_id for each in shown(step)) for step in steps]


def group(items, batch):
    numbers = {int(items.group[each.item]) for each in batch.occurrences}
    assert len(numbers) == 1
    return numbers.pop()


@given(data_sets(), BATCH_SIZES, st.integers(1, 4), st.integers(1, 3), st.integers(0, 9))
def test_every_showing_once_an_epoch(items, batch_sizes, ranks, accumulation, seed):
    plan = StepPlan(items, batch_sizes, seed, ranks, accumulation)
    wanted = [(index, repeat) for index in range(len(items)) for repeat in range(items.repeats[index])]
    for epoch in range(3):
        steps = steps_of(plan, epoch)
        assert sorted((each.item, each.repeat) for step in steps for each in shown(step)) == wanted
        assert {step.epoch for step in steps} == {epoch}
        batches = [batch for step in steps for batch in batches_of(step) if not batch.filler]
        assert len(batches) == plan.batches_per_epoch and len(wanted) == plan.samples_per_epoch
        for batch in batches:
            assert 1 <= len(batch.occurrences) <= batch_sizes[items.groups[group(items, batch)][0]]
            assert all(each.sample_id == f"{items.sample_id(each.item)}#{each.repeat}" for each in batch.occurrences)
    facts = group_facts(items, batch_sizes)
    assert sum(each.batches for each in facts) == plan.batches_per_epoch  # one short batch a group at most


@given(data_sets(), BATCH_SIZES, st.integers(1, 4), st.integers(1, 3))
def test_steps_keep_their_shape(items, batch_sizes, ranks, accumulation):
    plan = StepPlan(items, batch_sizes, 7, ranks, accumulation)
    mixed, short = [], 0
    for step in steps_of(plan):
        batches = batches_of(step)
        real = [batch for batch in batches if not batch.filler]
        assert len({len(rank) for rank in step.micro}) == 1 and len(step.micro) == ranks
        assert step.real_samples == len(shown(step)) and len(batches) - len(real) < ranks
        assert batches[:len(real)] == real and all(batch.occurrences == real[-1].occurrences for batch in batches[len(real):])
        short += len(real) < plan.stride
        work = [len(batch.occurrences) * math.prod(items.groups[group(items, batch)][1]) for batch in real]
        if len(real) < plan.stride or len({group(items, batch) for batch in real}) > 1:
            assert work == sorted(work, reverse=True)  # what the ranks do at one time is as equal as can be
            mixed += [group(items, batch) for batch in real]
        else:  # all ranks do the same, but for a short batch
            assert len(set(work[:-1])) <= 1
    assert short <= 1 and all(count < plan.stride for count in Counter(mixed).values())


@given(data_sets(), BATCH_SIZES, st.sampled_from([(6, 1), (3, 2), (2, 3), (1, 6)]), st.integers(1, 7), st.integers(0, 2))
def test_ranks_share_the_steps_of_one(items, batch_sizes, way, other_ranks, epoch):
    alone = steps_of(StepPlan(items, batch_sizes, 3, 1, 6), epoch)
    assert ids(steps_of(StepPlan(items, batch_sizes, 3, *way), epoch)) == ids(alone)
    # An epoch begun on 6 ranks goes on with the same samples on any number of them.
    assert ids(steps_of(StepPlan(items, batch_sizes, 3, other_ranks, stride=6), epoch)) == ids(alone)


@given(st.integers(1, 60), st.integers(1, 6), st.integers(0, 3))
def test_one_batch_of_many_is_many_batches_of_one(count, size, epoch):
    items = made_items([made_subset([f"{index}" for index in range(count)], (64, 64), 2)])
    ones, many = StepPlan(items, [1], 2, accumulation=size), StepPlan(items, [size], 2)
    assert ids(steps_of(ones, epoch)) == ids(steps_of(many, epoch))


@given(data_sets(), st.data(), st.integers(0, 3))
def test_removing_a_picture_keeps_the_others_in_order(items, data, epoch):
    gone = data.draw(st.integers(0, len(items) - 1))
    rest = items.take(numpy.arange(len(items)) != gone)
    assume(len(rest) and rest.repeats.sum())
    left, before = StepPlan(rest, [1, 1, 1], 5), StepPlan(items, [1, 1, 1], 5)
    name = items.sample_id(gone)
    kept = [each for (each,) in ids(steps_of(before, epoch)) if each.rsplit("#", 1)[0] != name]
    assert [each for (each,) in ids(steps_of(left, epoch))] == kept
    # With larger batches the same holds inside every group.
    sequences = []
    for each in (items, rest):
        plan = StepPlan(each, [4, 4, 4], 5)
        sequence = {}
        for step in steps_of(plan, epoch):
            (batch,) = batches_of(step)
            sequence.setdefault(group(each, batch), []).extend(one.sample_id for one in batch.occurrences)
        sequences.append(sequence)
    assert {number: samples for number, all_of_it in sequences[0].items()
            if (samples := [one for one in all_of_it if one.rsplit("#", 1)[0] != name])} == sequences[1]


def test_more_repeats_keep_the_showings_there_were_in_order():
    few, many = (made_items([made_subset("abcdefgh", (64, 64), repeats)]) for repeats in (2, 3))
    old = [each for (each,) in ids(steps_of(StepPlan(few, [1], 5)))]
    assert [each for (each,) in ids(steps_of(StepPlan(many, [1], 5))) if not each.endswith("#2")] == old


def test_order_depends_on_seed_and_epoch_only():
    items = made_items([made_subset([f"{index}" for index in range(40)], (64, 64))])
    first = ids(steps_of(StepPlan(items, [4], 1)))
    random.seed(3)
    numpy.random.seed(3)
    assert ids(steps_of(StepPlan(items, [4], 1))) == first
    assert ids(steps_of(StepPlan(items, [4], 1), 1)) != first != ids(steps_of(StepPlan(items, [4], 2)))


def test_order_is_that_of_the_written_rule():
    """The keys in plain Python: another implementation, platform or version has to give this order."""
    items = made_items([made_subset(["a"], (64, 64))],
                       [made_subset(["b", "a"], (64, 64), 2), made_subset(["a", "c"], (64, 96), 3)])
    keys = {}
    for index in range(len(items)):
        subset = items.subset(index)
        start = hash64(items.path(index).name) ^ hash64("order", 9, 4, subset.dataset, subset.number)
        for repeat in range(items.repeats[index]):
            keys[f"{items.sample_id(index)}#{repeat}"] = mix((start + repeat * GAMMA) % 2**64)
    assert [each for (each,) in ids(steps_of(StepPlan(items, [1, 1], 9), 4))] == sorted(keys, key=keys.get)


def test_a_seek_gives_the_step_of_the_walk():
    items = made_items([made_subset([f"{index}" for index in range(17)], [SIZES[index % 4] for index in range(17)], 2)])
    plan = StepPlan(items, [2], 3, 2)
    walked = [plan.step(index) for index in range(4 * plan.steps_per_epoch)]
    for index in (0, len(walked) - 1, 5, len(walked) // 2, 12):
        assert StepPlan(items, [2], 3, 2).step(index) == walked[index] == plan.step(index)


def test_equal_hashes_are_shown_in_the_order_of_the_rows():
    items = made_items([made_subset([f"{index}" for index in range(2000)], (64, 64))])
    items.listings[0].name_hash[:] %= 7
    shown_rows = [each.item for step in steps_of(StepPlan(items, [1], 0)) for each in shown(step)]
    stretches = [list(rows) for _, rows in groupby(shown_rows, key=lambda row: items.listings[0].name_hash[row])]
    assert len(stretches) == 7 and all(rows == sorted(rows) for rows in stretches)


def place_counts(items, batch_size, epochs):
    plan = StepPlan(items, [batch_size], 5)
    counts = numpy.zeros((len(items), plan.steps_per_epoch), dtype=int)
    for index in range(epochs * plan.steps_per_epoch):
        for each in shown(plan.step(index)):
            counts[each.item, index % plan.steps_per_epoch] += 1
    return counts


def test_order_is_shuffled_evenly():
    """Each of 8 pictures takes each place about equally often: 800 epochs, 100 expected, standard deviation 9.4."""
    counts = place_counts(made_items([made_subset("abcdefgh", (64, 64))]), 1, 800)
    assert ((55 < counts) & (counts < 145)).all()


def test_rare_buckets_come_anywhere_in_an_epoch():
    """8 pictures of one bucket in one step among 9 of another: its place is uniform, so each tenth is hit about 60 times
    in 600 epochs (standard deviation 7.3)."""
    sizes = [(64, 64)] * 72 + [(100, 50)] * 8
    counts = place_counts(made_items([made_subset([f"{index}" for index in range(80)], sizes)]), 8, 600)
    assert ((30 < counts[-1]) & (counts[-1] < 90)).all()


def test_report_names_buckets_and_what_is_cropped():
    items = made_items([made_subset("abc", [(64, 64), (70, 70), (128, 64)], 3)])
    assert report(items) == ["dataset 1, bucket 64x64: 2 pictures, 6 with repeats, 0.0% of the pixels cropped away",
                             "dataset 1, bucket 80x48: 1 pictures, 3 with repeats, 16.7% of the pixels cropped away"]


def test_kept_share_is_that_of_the_placements():
    items = made_items([made_subset("abcd", [(64, 64), (71, 70), (128, 60), (300, 20)])],
                       [made_subset("ab", [(50, 90), (33, 34)])])
    for facts in group_facts(items, [2, 3]):
        places = [each.placement for each in items
                  if (each.subset.dataset, each.placement.bucket) == (facts.dataset, facts.bucket)]
        shares = [math.prod(place.bucket) / math.prod(place.resized) for place in places]
        assert facts.pictures == len(places) and facts.kept == pytest.approx(sum(shares) / len(shares))
        assert facts.batch_size == (2, 3)[facts.dataset]


def test_report_of_very_many_buckets_is_short():
    sizes = [(16 * width, 16 * height) for width in range(1, 17) for height in range(1, 17) if width * height <= 16]
    sizes += [(16, 16)] * 3
    items = made_items([made_subset([f"{index}" for index in range(len(sizes))], sizes)], no_upscale=True)
    lines = report(items)
    assert len(lines) == REPORTED and "16x16: 4 pictures" in lines[0]
    assert lines[-1] == f"{len(sizes) - 3 - (REPORTED - 1)} more buckets with {len(sizes) - 3 - (REPORTED - 1)} pictures together"

"""Operations of steps, and the share of a card's peak that a run reports."""

from types import SimpleNamespace

import numpy
import pytest

from library.data.plan import StepPlan
from library.step_flops import StepFlops, chosen_sizes
from tests.unit.plan_items import made_items, made_subset


def of(sizes, work, **more):
    names = [f"p{index}" for index in range(len(sizes))]
    return StepFlops(StepPlan(made_items([made_subset(names, sizes)]), batch_sizes=[1], seed=0, **more), work)


def test_three_sizes_are_measured_and_the_others_follow():
    asked = []

    def work(size):
        asked.append(size)
        area = size[0] * size[1]
        return 7.0 + 3e3 * area + 0.5 * area**2
    sizes = [(width, 64) for width in (64, 96, 112, 160, 208, 272, 400, 528)]
    flops = of(sizes, work, accumulation=8)
    areas = flops._areas.tolist()
    assert len(set(areas)) >= 3
    assert flops(SimpleNamespace(step=1)) + sum(flops(SimpleNamespace(step=step)) for step in range(2, flops._plan.steps_per_epoch + 1)) \
        == pytest.approx(sum(7.0 + 3e3 * area + 0.5 * area**2 for area in areas), rel=1e-6)
    assert 2 <= len(asked) == len(chosen_sizes(asked)) <= 3


def test_what_lies_between_follows_from_three():
    def work(area):
        return 7.0 + 3.0 * area + 2.0 * area**2
    assert chosen_sizes([(64 * width, 64) for width in (1, 2, 5, 8)]) == [(64, 64), (320, 64), (512, 64)]
    flops = StepFlops(SimpleNamespace(items=None), lambda size: 0)
    flops.__dict__["_course"] = numpy.polyfit([1.0, 5.0, 8.0], [work(1.0), work(5.0), work(8.0)], 2)
    assert flops.of_area(2 << 20) == pytest.approx(work(2.0))


def test_one_size_and_sizes_that_hardly_differ_are_measured_once():
    assert chosen_sizes([(64, 64), (64, 64)]) == [(64, 64)] and chosen_sizes([(1024, 1024), (1152, 896)]) == [(1024, 1024)]
    assert of([(64, 64)] * 3, lambda size: 5.0, accumulation=2)(SimpleNamespace(step=1)) == pytest.approx(10.0)


def test_fillers_do_not_count():
    assert of([(64, 64)], lambda size: 5.0, world_size=2)(SimpleNamespace(step=1)) == pytest.approx(5.0)


def test_what_cannot_be_measured_is_left_out():
    def broken(size):
        raise RuntimeError("no such kernel")
    assert of([(64, 64)], broken)(SimpleNamespace(step=1)) is None

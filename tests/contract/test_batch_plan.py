"""The same seed gives the same batches for any number of workers, ranks and micro-batches (DESIGN.md section 6.6)."""

import random

import pytest
import torch

from library.data.bucket import StepPlan
from library.data.cache import opener
from library.data.dataset import TrainingData, batches
from library.data.fill import fill_latents, fill_text
from tests.unit.data_helpers import made_up_items, one_folder, picture

SIZES = [(64, 64)] * 7 + [(100, 50)] * 5 + [(50, 100)] * 3
SHAPES = [(96, 64), (64, 96), (64, 64)]


@pytest.fixture(scope="module")
def items(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "pictures"
    for index in range(9):
        picture(folder / f"{index}.png", SHAPES[index % 3], seed=index, caption=f"caption {index % 4}")
    return one_folder(folder, more="batch_size = 2")


def same(left, right):
    if isinstance(left, torch.Tensor):
        return torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)
    return left == right


def steps_of(data, plan, workers, start=0, stop=9, rank=0):
    return list(batches(data, plan, rank, start, stop, workers))


def assert_equal_steps(left, right):
    assert len(left) == len(right) > 0
    for one, other in zip(left, right, strict=True):
        assert (one.step, one.epoch, one.real_samples) == (other.step, other.epoch, other.real_samples)
        for a, b in zip(one.micro, other.micro, strict=True):
            assert all(same(getattr(a, name), getattr(b, name)) for name in vars(a))


def test_same_batches_for_0_1_2_workers(items):
    data, plan = TrainingData(items), StepPlan(items, [2], seed=3, accumulation=2)
    assert plan.steps_per_epoch < 9
    torch.manual_seed(0)
    random.seed(0)
    state = torch.get_rng_state(), random.getstate()
    reference = steps_of(data, plan, 0)
    assert reference[0].micro[0].pixels is not None and reference[0].micro[0].latents is None
    for workers in (1, 2):
        assert_equal_steps(steps_of(data, plan, workers), reference)
    assert torch.equal(torch.get_rng_state(), state[0]) and random.getstate() == state[1]


def test_same_batches_from_memory_and_disk(items, tmp_path):
    def encode_text(captions):
        return {"t5": torch.tensor([[float(len(caption))] for caption in captions])}
    results = []
    for to_disk, workers in ((False, 0), (True, 2)):
        cache_for = opener(tmp_path / "cache", to_disk)
        data = TrainingData(items, fill_latents(items, cache_for, lambda x: x[:, :, ::8, ::8], "vae", 4),
                            fill_text(items, cache_for, encode_text, "t5", 3))
        results.append(steps_of(data, StepPlan(items, [2], seed=3), workers))
    assert_equal_steps(*results)
    assert results[0][0].micro[0].latents.dtype == torch.float32 and results[0][0].micro[0].pixels is None


def test_starting_late_gives_the_same_steps(items):
    data, plan = TrainingData(items), StepPlan(items, [2], seed=3)
    assert_equal_steps(steps_of(data, plan, 0, start=4), steps_of(data, plan, 1)[4:])


def shown(plan, steps, ranks):
    """Per step the sorted occurrences of real batches over ``ranks``."""
    return [sorted(each.sample_id for rank in ranks for micro in plan.step(step).micro[rank] if not micro.filler
                   for each in micro.occurrences) for step in range(steps)]


@pytest.mark.parametrize("ranks, accumulation", [(1, 6), (2, 3), (3, 2), (6, 1)])
def test_ranks_and_accumulation_share_the_steps_of_one_rank(ranks, accumulation):
    items = made_up_items(SIZES, repeats=2)
    single = StepPlan(items, [2], seed=5, world_size=1, accumulation=6)
    plan = StepPlan(items, [2], seed=5, world_size=ranks, accumulation=accumulation)
    steps = 2 * single.steps_per_epoch + 1
    assert plan.steps_per_epoch == single.steps_per_epoch
    assert shown(plan, steps, range(ranks)) == shown(single, steps, range(1))
    for index in range(steps):
        step = plan.step(index)
        assert len({len(micro) for micro in step.micro}) == 1  # ranks run in lockstep
        assert step.real_samples == single.step(index).real_samples == len(shown(plan, index + 1, range(ranks))[index])
        fillers = sum(micro.filler for rank in step.micro for micro in rank)
        assert fillers < ranks and (ranks > 1 or fillers == 0)


def test_every_epoch_shows_everything_once_over_ranks():
    items = made_up_items(SIZES)
    plan = StepPlan(items, [4], seed=5, world_size=3, accumulation=1)
    for epoch in range(3):
        steps = range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)
        ids = [each.sample_id for step in steps for rank in plan.step(step).micro for micro in rank if not micro.filler
               for each in micro.occurrences]
        assert sorted(ids) == sorted(f"{item.sample_id}#0" for item in items)
        assert {plan.step(step).epoch for step in steps} == {epoch}


def test_fillers_weigh_nothing(items):
    plan = StepPlan(items, [2], seed=3, world_size=4)
    data = TrainingData(items)
    ranks = [steps_of(data, plan, 0, stop=plan.steps_per_epoch, rank=rank) for rank in range(4)]
    for step in zip(*ranks, strict=True):
        weights = sum(float(batch.weight.sum()) for rank in step for batch in rank.micro)
        assert weights == step[0].real_samples
    assert any(float(batch.weight.sum()) == 0 for rank in ranks for step in rank for batch in step.micro)


def test_four_batches_of_one_equal_one_batch_of_four():
    items = made_up_items([(64, 64)] * 12)
    ones, four = StepPlan(items, [1], seed=2, accumulation=4), StepPlan(items, [4], seed=2)
    assert ones.steps_per_epoch == four.steps_per_epoch == 3
    assert shown(ones, 6, range(1)) == shown(four, 6, range(1))

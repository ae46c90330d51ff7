"""The same seed gives the same batches for any number of workers, ranks and micro-batches (DESIGN.md section 6.6)."""

import random
from collections import Counter
from dataclasses import fields

import numpy
import pytest
import torch

from library.data.dataset import LatentCache, TextCache, TrainingData, batches
from library.data.fill import fill_latents
from library.data.fill_text import fill_text
from library.data.plan import StepPlan
from library.data.showing import Course
from library.data.store import Store
from tests.unit.data_helpers import one_folder, picture

SHAPES = [(96, 64), (64, 96), (64, 64)]
VARIED = """batch_size = 2
num_repeats = 2
flip_aug = true
random_crop = true
color_aug = true
shuffle_caption = true
caption_dropout_rate = 0.2
caption_tag_dropout_rate = 0.2
"""
COURSE = Course(seed=3, total_steps=40)


def pictures(folder):
    for index in range(9):
        picture(folder / f"{index}.png", SHAPES[index % 3], seed=index, caption=f"{index % 4}, b, c, d, e")
    return folder


@pytest.fixture(scope="module")
def varied(tmp_path_factory):
    """Everything about a showing is drawn: crop, flip, colour, order of the tags."""
    return one_folder(pictures(tmp_path_factory.mktemp("varied") / "pictures"), more=VARIED)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return one_folder(pictures(tmp_path_factory.mktemp("plain") / "pictures"), more="batch_size = 2\nflip_aug = true")


def same(left, right):
    if isinstance(left, torch.Tensor):
        return torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    return left == right


def assert_equal_steps(left, right):
    assert len(left) == len(right) > 0
    for one, other in zip(left, right, strict=True):
        assert (one.step, one.epoch, one.real_samples) == (other.step, other.epoch, other.real_samples)
        for a, b in zip(one.micro, other.micro, strict=True):
            for field in fields(a):
                assert same(getattr(a, field.name), getattr(b, field.name)), (one.step, field.name)


def steps_of(data, plan, workers, start=0, stop=14, rank=0):
    return list(batches(data, plan, rank, start, stop, workers))


def test_same_batches_for_0_1_2_workers(varied):
    data, plan = TrainingData(varied, COURSE), StepPlan(varied, [2], seed=3, accumulation=2)
    assert plan.steps_per_epoch < 14
    torch.manual_seed(0)
    random.seed(0)
    numpy.random.seed(0)
    state = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].copy()
    reference = steps_of(data, plan, 0)
    first = reference[0].micro[0]
    assert first.pixels is not None and first.latents is None
    captions = [caption for step in reference for batch in step.micro for caption in batch.captions]
    assert len(set(captions)) > 9 and "" in captions  # the captions do vary
    for workers in (1, 2):
        assert_equal_steps(steps_of(data, plan, workers), reference)
    assert torch.equal(torch.get_rng_state(), state[0]) and random.getstate() == state[1]
    assert numpy.array_equal(numpy.random.get_state()[1], state[2])


def test_starting_late_gives_the_same_steps(varied):
    data, plan = TrainingData(varied, COURSE), StepPlan(varied, [2], seed=3)
    whole = steps_of(data, plan, 0)
    for workers in (0, 1):
        assert_equal_steps(steps_of(data, plan, workers, start=4), whole[4:])


def cached(items, latents, text, encoded):
    """The data with its pictures and captions in two stores, as a run makes them. ``encoded``: how often was encoded."""
    def encode_pictures(pixels):
        encoded["pictures"] += len(pixels)
        return pixels[:, :, ::8, ::8] / 255

    def encode_text(captions):
        encoded["texts"] += len(captions)
        return {"words": torch.tensor([[float(len(caption)), 1.0] for caption in captions])}
    here = numpy.zeros(len(items.listings), dtype=numpy.int64)
    rows = fill_latents(items, latents, encode_pictures, "vae", 4, folders=here)
    captions = [items.caption(index) for index in range(len(items))]
    texts = ["", *dict.fromkeys(captions)]
    words = fill_text(texts, numpy.zeros(len(texts), dtype=numpy.int64), text, encode_text, "t5", 3)
    number = {text: index for index, text in enumerate(texts)}
    of_items = words[[number[caption] for caption in captions]][:, None]
    return TrainingData(items, Course(seed=3, total_steps=40, variants=1), LatentCache(latents, rows),
                        TextCache(text, of_items, int(words[0])))


def test_same_batches_from_memory_and_disk(plain, tmp_path):
    folders = {"latents": [tmp_path / "a"], "text": [tmp_path / "b"]}
    plan = StepPlan(plain, [2], seed=3)
    encoded = Counter()
    in_memory = steps_of(cached(plain, Store((), "latents"), Store((), "text"), encoded), plan, 0)
    assert encoded == {"pictures": 18, "texts": 5}  # both ways round; four distinct captions and the empty one
    on_disk = cached(plain, *(Store(paths, kind) for kind, paths in folders.items()), encoded)
    first = in_memory[0].micro[0]
    assert first.latents.dtype == torch.float16 and first.pixels is None and set(first.text) == {"words"}
    for workers in (0, 1, 2):
        assert_equal_steps(steps_of(on_disk, plan, workers), in_memory)
    # A second run finds everything in the files.
    again = cached(plain, *(Store(paths, kind) for kind, paths in folders.items()), encoded)
    assert encoded == {"pictures": 36, "texts": 10}
    assert_equal_steps(steps_of(again, plan, 0), in_memory)


@pytest.mark.parametrize("ranks, accumulation", [(2, 1), (1, 2), (4, 1), (2, 2)])
def test_ranks_see_together_what_one_rank_sees(varied, ranks, accumulation):
    """Not only the same pictures: the same pixels and words under the same sample ids."""
    data = TrainingData(varied, COURSE)
    alone = StepPlan(varied, [2], seed=3, accumulation=ranks * accumulation)
    plan = StepPlan(varied, [2], seed=3, world_size=ranks, accumulation=accumulation)
    steps = plan.steps_per_epoch + 1
    everyone = [steps_of(data, plan, 0, stop=steps, rank=rank) for rank in range(ranks)]
    for index, reference in enumerate(steps_of(data, alone, 0, stop=steps)):
        together = [batch for rank in everyone for batch in rank[index].micro]
        assert samples(together) == samples(reference.micro)
        assert {rank[index].real_samples for rank in everyone} == {reference.real_samples}
        assert len({len(rank[index].micro) for rank in everyone}) == 1  # ranks run in lockstep


def samples(micro):
    """What each sample that counts looks like."""
    found = {}
    for batch in micro:
        for row, name in enumerate(batch.sample_ids):
            if batch.weight[row]:
                assert name not in found
                found[name] = (batch.captions[row], batch.pixels[row].numpy().tobytes(), tuple(batch.geometry[row].tolist()))
    return found


def test_fillers_weigh_nothing(varied):
    plan, data = StepPlan(varied, [2], seed=3, world_size=4), TrainingData(varied, COURSE)
    ranks = [steps_of(data, plan, 0, stop=plan.steps_per_epoch, rank=rank) for rank in range(4)]
    for step in zip(*ranks, strict=True):
        weights = sum(float(batch.weight.sum()) for rank in step for batch in rank.micro)
        assert weights == step[0].real_samples
    assert any(float(batch.weight.sum()) == 0 for rank in ranks for step in rank for batch in step.micro)

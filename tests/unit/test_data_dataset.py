"""Batches as tensors; threads and processes that end when they should and pass on errors as they are."""

import multiprocessing
import os
import pickle
import signal
import sys
import threading
from dataclasses import replace

import numpy
import pytest
import torch

from library.data import augment
from library.data.augment import Augment, View
from library.data.dataset import LatentCache, TextCache, TrainingData, batches
from library.data.fill import fill_latents
from library.data.fill_text import fill_text
from library.data.image import load_view, to_signal
from library.data.plan import StepPlan
from library.data.showing import Course, show
from library.data.store import Store
from library.encode import CaptionVariants
from tests.unit.data_helpers import one_folder, picture

COURSE = Course(seed=1, total_steps=100)
ONE_FOLDER = numpy.array([0])


@pytest.fixture
def items(tmp_path):
    for index in range(6):
        picture(tmp_path / "pictures" / f"{index}.png", (100, 60), seed=index, caption=f"caption {index}, tag, word")
    return one_folder(tmp_path / "pictures")


def with_subset(items, **changes):
    """The same items with other settings of their subset."""
    specs = tuple(replace(spec, subsets=tuple(replace(subset, **changes) for subset in spec.subsets)) for spec in items.specs)
    return replace(items, specs=specs)


def with_captions(items, **changes):
    return with_subset(items, captions=replace(items.subsets[0].captions, **changes))


def cached(items, course):
    """Everything cached in memory: latents are the mean colour, text is the caption's letters."""
    latents, text = Store((), "latents"), Store((), "text")
    rows = fill_latents(items, latents, lambda x: to_signal(x).mean((2, 3), keepdim=True), "vae", 4, folders=ONE_FOLDER)

    def letters(words):
        return {"t5": torch.tensor([[ord(letter) for letter in word.ljust(30)] for word in words])}
    variants = CaptionVariants(items, course)
    text_rows = fill_text(variants, numpy.zeros(len(variants), dtype=int), text, letters, "t5", 4)
    empty = fill_text([""], ONE_FOLDER, text, letters, "t5", 4)
    return TrainingData(items, course, LatentCache(latents, rows),
                        TextCache(text, text_rows.reshape(-1, variants.count), int(empty[0])))


def words_of(row):
    return "".join(map(chr, row.tolist())).rstrip()


def test_batch_from_pictures(items):
    group, = batches(TrainingData(items, COURSE), StepPlan(items, [6], seed=1), 0, 0, 1, 0)
    batch, = group.micro
    assert (group.step, group.epoch, group.real_samples) == (0, 0, 6)
    place = items[0].placement
    assert batch.pixels.shape == (6, 3, place.bucket[1], place.bucket[0]) and batch.pixels.dtype == torch.uint8
    assert batch.latents is None and batch.text is None and batch.mask is None and batch.pixel_mask is None
    by_id = {f"{item.sample_id}#0": item for item in items}
    assert set(batch.sample_ids) == set(by_id)
    for row, sample_id in enumerate(batch.sample_ids):
        item = by_id[sample_id]
        assert batch.captions[row] == item.caption and batch.paths[row] == str(item.path)
        assert torch.equal(batch.pixels[row], load_view(item.path, View(item.placement), "here")[0])
    assert batch.geometry[0].tolist() == [60, 100, place.crop[1], place.crop[0], place.bucket[1], place.bucket[0]]
    assert batch.weight.tolist() == [1.0] * 6


def test_batch_from_caches_pairs_pictures_with_their_captions(items):
    data = cached(items, replace(COURSE, variants=1))
    group, = batches(data, StepPlan(items, [6], seed=1), 0, 0, 1, 2)
    batch, = group.micro
    assert batch.pixels is None and batch.latents.dtype == torch.float16
    for row, sample_id in enumerate(batch.sample_ids):
        number = int(sample_id.split("/")[1][0])
        pixels, _ = load_view(items[number].path, View(items[number].placement), "here")
        assert torch.allclose(batch.latents[row, :, 0, 0].float(), to_signal(pixels).mean((1, 2)), atol=1e-3)
        assert words_of(batch.text["t5"][row]) == batch.captions[row] == f"caption {number}, tag, word"


def test_flips_variants_and_dropped_captions_come_from_the_caches(items):
    """What is read is what ``show`` says, in every epoch."""
    items = with_captions(with_subset(items, augment=Augment(flip=True)), shuffle=True, dropout_rate=0.3)
    data, plan = cached(items, replace(COURSE, variants=3)), StepPlan(items, [2], seed=1)
    seen = set()
    for group in batches(data, plan, 0, 0, 8 * plan.steps_per_epoch, 0):
        for batch in group.micro:
            for row, sample_id in enumerate(batch.sample_ids):
                number = int(sample_id.split("/")[1][0])
                shown = show(items[number], 0, data.course, group.epoch, group.step)
                assert words_of(batch.text["t5"][row]) == batch.captions[row] == shown.caption
                expected = data.latents.store.read(data.latents.rows[number, int(shown.view.flip)])["latents"]
                assert torch.equal(batch.latents[row], expected)
                assert batch.geometry[row].tolist() == list(shown.geometry)
                seen.add((shown.view.flip, shown.variant))
    assert len(seen) == 8  # two sides, three variants and none


def test_validation_has_neither_flips_nor_dropped_captions(items):
    items = with_captions(with_subset(items, augment=Augment(flip=True, random_crop=True)), dropout_rate=1.0,
                          tag_dropout_rate=1.0)
    course = replace(COURSE, augmented=False)
    assert list(CaptionVariants(items, replace(course, variants=3))) == [item.caption for item in items]
    for group in batches(TrainingData(items, course), StepPlan(items, [2], seed=1), 0, 0, 6, 0):
        for batch in group.micro:
            for row, sample_id in enumerate(batch.sample_ids):
                item = items[int(sample_id.split("/")[1][0])]
                assert batch.captions[row] == item.caption
                assert torch.equal(batch.pixels[row], load_view(item.path, augment.plain_view(item), "here")[0])


def test_weights_of_the_loss(items):
    weighted = with_subset(items, loss_weight=0.25, is_reg=True)
    plan = StepPlan(weighted, [4], seed=1, world_size=4)  # six pictures: ranks 2 and 3 repeat what counts nothing
    course = replace(COURSE, prior_loss_weight=0.5)
    found = []
    for rank in range(4):
        group, = batches(TrainingData(weighted, course), plan, rank, 0, 1, 0)
        found += [weight for batch in group.micro for weight in batch.weight.tolist()]
    assert sorted(set(found)) == [0.0, 0.125] and found.count(0.125) == 6 == group.real_samples


@pytest.mark.parametrize("from_cache", [False, True])
def test_masks_of_some_pictures_of_a_batch(tmp_path, from_cache):
    from PIL import Image

    from tests.unit.data_helpers import dataset_file, scan_file
    for name in ("plain", "cut"):
        picture(tmp_path / name / "a.png", (64, 64), caption=name)
    half = numpy.full((64, 64, 4), 255, dtype=numpy.uint8)
    half[:, 32:, 3] = 0
    Image.fromarray(half).save(tmp_path / "cut" / "a.png")
    subsets = "".join(f"[[datasets.subsets]]\nimage_dir = '{(tmp_path / name).as_posix()}'\nalpha_mask = {flag}\n"
                      for name, flag in (("plain", "false"), ("cut", "true")))
    items = scan_file(dataset_file(tmp_path, f"[[datasets]]\nresolution = 64\nbucket_reso_steps = 16\n{subsets}")).items
    store = Store((), "latents")
    latents = LatentCache(store, fill_latents(
        items, store, lambda x: torch.nn.functional.avg_pool2d(to_signal(x), 8), "vae", 2, folders=numpy.array([0, 0])))
    group, = batches(TrainingData(items, COURSE, latents if from_cache else None), StepPlan(items, [2], seed=1), 0, 0, 1, 0)
    batch, = group.micro
    mask = batch.mask if from_cache else batch.pixel_mask
    assert (batch.mask is None) != from_cache and (batch.pixel_mask is None) == from_cache
    assert mask.shape == ((2, 1, 8, 8) if from_cache else (2, 64, 64))
    full = 1.0 if from_cache else 255
    for row, words in enumerate(batch.captions):
        assert (mask[row][..., :mask.shape[-1] // 2] == full).all()
        assert (mask[row][..., mask.shape[-1] // 2:] == (full if words == "plain" else 0)).all()


def test_workers_change_nothing(items):
    items = with_captions(with_subset(items, augment=Augment(flip=True, color=True, random_crop=True)), shuffle=True,
                          dropout_rate=0.3)
    data, plan = TrainingData(items, COURSE), StepPlan(items, [2], seed=1)
    runs = [list(batches(data, plan, 0, 2, 12, workers)) for workers in (0, 1, 2)]
    for groups in zip(*runs, strict=True):
        assert len({group.epoch for group in groups}) == 1
        first, *others = [group.micro[0] for group in groups]
        for other in others:
            assert other.sample_ids == first.sample_ids and other.captions == first.captions
            assert torch.equal(other.pixels, first.pixels) and torch.equal(other.geometry, first.geometry)


def test_orders_to_workers_are_small(items):
    from library.data.dataset import _order
    data = TrainingData(items, COURSE)
    micro = StepPlan(items, [6], seed=1).step(0).micro[0][0]
    assert len(pickle.dumps(_order(data.showings(micro, 0, 0)))) < 6 * 200


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_picture_damaged_while_training_is_one_line(items, workers):
    from library.errors import UserError
    data = items[3].path.read_bytes()
    items[3].path.write_bytes(data[:len(data) // 2])
    with pytest.raises(UserError) as caught:
        list(batches(TrainingData(items, COURSE), StepPlan(items, [1], seed=1), 0, 0, 12, workers))
    assert str(items[3].path) in str(caught.value) and "Traceback" not in str(caught.value) and caught.value.remedy


def running():
    """(threads, processes); not the threads that feed multiprocessing's queues, which end a moment later."""
    return (sum(thread.name.startswith("data") for thread in threading.enumerate()), len(multiprocessing.active_children()))


@pytest.mark.parametrize("workers", [0, 2])
def test_leaving_early_ends_threads_and_processes(items, workers):
    assert running() == (0, 0)
    groups = batches(TrainingData(items, COURSE), StepPlan(items, [2], seed=1), 0, 0, 10**9, workers)
    for _ in range(5):
        next(groups)
    assert running()[0] >= 1 and running()[1] == workers
    groups.close()
    assert running() == (0, 0)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_same_processes_serve_all_epochs(items, workers):
    groups = batches(TrainingData(items, COURSE), StepPlan(items, [6], seed=1), 0, 0, 4, workers)
    children = []
    for group in groups:
        children.append({child.pid for child in multiprocessing.active_children()})
    assert group.epoch == 3 and len(children[0]) == workers and children[0] == children[2]
    assert running() == (0, 0)


def test_no_steps(items):
    assert list(batches(TrainingData(items, COURSE), StepPlan(items, [2], seed=1), 0, 5, 5, 0)) == []


@pytest.mark.skipif(sys.platform == "win32", reason="sends POSIX signals")
def test_workers_outlive_signals_meant_for_the_main_process(items):
    groups = batches(TrainingData(items, COURSE), StepPlan(items, [2], seed=1), 0, 0, 40, 1)
    next(groups)
    worker, = multiprocessing.active_children()
    os.kill(worker.pid, signal.SIGINT)
    os.kill(worker.pid, signal.SIGTERM)
    assert len(list(groups)) == 39
    assert not worker.is_alive()

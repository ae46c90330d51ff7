"""Batches as tensors; threads and processes that end when they should and pass on errors as they are."""

import multiprocessing
import os
import signal
import sys
import threading

import pytest
import torch

from library.data.bucket import StepPlan
from library.data.cache import opener
from library.data.dataset import TrainingData, batches
from library.data.fill import fill_latents, fill_text
from library.data.image import load
from library.errors import UserError
from tests.unit.data_helpers import one_folder, picture


@pytest.fixture
def items(tmp_path):
    for index in range(6):
        picture(tmp_path / "pictures" / f"{index}.png", (100, 60), seed=index, caption=f"caption {index}")
    return one_folder(tmp_path / "pictures")


def test_batch_from_pictures(items):
    group, = batches(TrainingData(items), StepPlan(items, [6], seed=1), 0, 0, 1, 0)
    batch, = group.micro
    assert (group.step, group.epoch, group.real_samples) == (0, 0, 6)
    place = items[0].placement
    assert batch.pixels.shape == (6, 3, place.bucket[1], place.bucket[0]) and batch.latents is None and batch.text is None
    by_id = {f"{item.sample_id}#0": item for item in items}
    assert set(batch.sample_ids) == set(by_id)
    for row, sample_id in enumerate(batch.sample_ids):
        item = by_id[sample_id]
        assert batch.captions[row] == item.caption and batch.paths[row] == str(item.path)
        assert torch.equal(batch.pixels[row], load(item.path, item.placement))
    assert batch.geometry[0].tolist() == [60, 100, place.crop[1], place.crop[0], place.bucket[1], place.bucket[0]]
    assert batch.weight.tolist() == [1.0] * 6 and batch.mask is None


def test_batch_from_caches_pairs_pictures_with_their_captions(items):
    cache_for = opener(None, False)
    latents = fill_latents(items, cache_for, lambda x: x.mean((2, 3), keepdim=True), "vae", 4)
    text = fill_text(items, cache_for, lambda captions: {"t5": torch.tensor([[float(words[-1])] for words in captions])}, "t5", 4)
    group, = batches(TrainingData(items, latents, text), StepPlan(items, [6], seed=1), 0, 0, 1, 2)
    batch, = group.micro
    assert batch.pixels is None and batch.latents.dtype == torch.float32
    for row, sample_id in enumerate(batch.sample_ids):
        number = int(sample_id.split("/")[1][0])
        expected = load(items[number].path, items[number].placement).mean((1, 2))
        assert torch.allclose(batch.latents[row, :, 0, 0], expected, atol=1e-3)
        assert batch.text["t5"][row].item() == number


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_picture_damaged_while_training_is_one_line(items, workers):
    data = items[3].path.read_bytes()
    items[3].path.write_bytes(data[:len(data) // 2])
    with pytest.raises(UserError) as caught:
        list(batches(TrainingData(items), StepPlan(items, [1], seed=1), 0, 0, 12, workers))
    assert str(items[3].path) in str(caught.value) and "Traceback" not in str(caught.value) and caught.value.remedy


@pytest.mark.parametrize("workers", [0, 2])
def test_leaving_early_ends_thread_and_processes(items, workers):
    def running():  # without the threads that feed multiprocessing's queues: those end a moment later
        return sum(thread.name == "data" for thread in threading.enumerate()), len(multiprocessing.active_children())
    assert running() == (0, 0)
    groups = batches(TrainingData(items), StepPlan(items, [2], seed=1), 0, 0, 10**9, workers)
    for _ in range(5):
        next(groups)
    assert running() == ((0, workers) if workers else (1, 0))
    groups.close()
    assert running() == (0, 0)


def test_no_steps(items):
    assert list(batches(TrainingData(items), StepPlan(items, [2], seed=1), 0, 5, 5, 0)) == []


@pytest.mark.skipif(sys.platform == "win32", reason="sends POSIX signals")
def test_workers_outlive_signals_meant_for_the_main_process(items):
    groups = batches(TrainingData(items), StepPlan(items, [2], seed=1), 0, 0, 40, 1)
    next(groups)
    worker, = multiprocessing.active_children()
    os.kill(worker.pid, signal.SIGINT)
    os.kill(worker.pid, signal.SIGTERM)
    assert len(list(groups)) == 39
    assert not worker.is_alive()

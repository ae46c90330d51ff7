"""Stores on disk and in memory give back what was put, under any division into shards."""

import pickle
import threading

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some

from library.data import store_writer
from library.data.buffers import Buffers
from library.data.shards import shard_files
from library.data.store import Store


def keys_of(*numbers: int) -> numpy.ndarray:
    return numpy.array([list(number.to_bytes(16, "little")) for number in numbers], dtype=numpy.uint8).reshape(-1, 16)


def key(number: int) -> bytes:
    return number.to_bytes(16, "little")


def fill(store, numbers, folder=0, value=None):
    with store.writer(folder) as writer:
        for number in numbers:
            writer.put(key(number), {"x": torch.full((2, 3), float(number if value is None else value))})
    store.refresh()


@pytest.fixture(params=["disk", "memory"])
def folders(request, tmp_path):
    return (tmp_path / "a", tmp_path / "b") if request.param == "disk" else ()


DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.uint8, torch.int64, torch.bool, torch.float8_e4m3fn]


def test_what_was_put_is_read(folders):
    store = Store(folders, "text")
    tensors = {str(dtype): torch.arange(12).reshape(3, 4).to(dtype) for dtype in DTYPES}
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.empty(0, 4), "transposed": torch.arange(6.0).reshape(2, 3).T}
    with store.writer() as writer:
        writer.put(key(1), tensors)
        writer.put(key(2), {name: torch.zeros_like(tensor) for name, tensor in tensors.items()})
    store.refresh()
    assert len(store) == 2 and store.in_memory == (not folders)
    both = store.read_many(store.find(keys_of(2, 1)))
    alone = store.read(store.find(keys_of(1))[0])
    assert both.keys() == alone.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert alone[name].dtype == tensor.dtype and alone[name].shape == tensor.shape
        assert torch.equal(alone[name].view(torch.uint8) if tensor.ndim else alone[name],
                           tensor.contiguous().view(torch.uint8) if tensor.ndim else tensor)
        assert both[name].shape == (2, *tensor.shape) and not both[name][0].float().any()


def test_short_tensors_are_followed_by_zeros(folders):
    store = Store(folders, "text")
    with store.writer() as writer:
        for length in (0, 3, 5):
            writer.put(key(length), {"t": torch.ones(length, 2), "mask": torch.ones(length, dtype=torch.bool)},
                       {"t": 5, "mask": 5})
    store.refresh()
    batch = store.read_many(store.find(keys_of(3, 0, 5)))
    assert batch["t"].shape == (3, 5, 2) and batch["mask"].shape == (3, 5)
    assert batch["t"].sum((1, 2)).tolist() == [6, 0, 10] and batch["mask"].sum(1).tolist() == [3, 0, 5]
    assert batch["t"][0, :3].min() == 1 and batch["t"][0, 3:].abs().max() == 0


def test_a_tensor_that_some_records_lack_gets_a_stated_value(folders):
    store = Store(folders, "latents")
    with store.writer() as writer:
        writer.put(key(1), {"latents": torch.ones(2)})
        writer.put(key(2), {"latents": torch.ones(2), "mask": torch.full((3,), 7, dtype=torch.uint8)})
    store.refresh()
    one, two = store.find(keys_of(1, 2))
    batch = store.read_many([one, two], absent={"mask": 255})
    assert batch["mask"].tolist() == [[255] * 3, [7] * 3]
    assert "mask" not in store.read_many([one, one], absent={"mask": 255})
    with pytest.raises(AssertionError, match="mask"):
        store.read_many([one, two])


def test_records_of_different_shapes_are_no_batch(folders):
    store = Store(folders, "latents")
    with store.writer() as writer:
        writer.put(key(1), {"latents": torch.ones(2)})
        writer.put(key(2), {"latents": torch.ones(3)})
    store.refresh()
    with pytest.raises(AssertionError, match="in one batch"):
        store.read_many(store.find(keys_of(1, 2)))


def test_missing_keys_are_minus_one(folders):
    store = Store(folders, "text")
    assert store.find(keys_of(1, 2)).tolist() == [-1, -1] and store.find(keys_of()).tolist() == []
    fill(store, [2])
    assert (store.find(keys_of(1, 2, 2)) >= 0).tolist() == [False, True, True]


@given(some.lists(some.lists(some.integers(0, 40), max_size=12), min_size=1, max_size=4), some.integers(1, 5))
def test_any_division_into_shards_gives_the_same_records(tmp_path_factory, batches, per_shard):
    folder = tmp_path_factory.mktemp("cache")
    store = Store((folder,), "latents")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store_writer, "SHARD_RECORDS", per_shard)
        for batch in batches:
            before = store.find(keys_of(*range(41)))
            fill(store, batch)
            after = store.find(keys_of(*range(41)))
            assert (after[before >= 0] == before[before >= 0]).all()  # rows stay valid
    known = sorted({number for batch in batches for number in batch})
    for reader in (store, Store((folder,), "latents")):
        rows = reader.find(keys_of(*range(41)))
        assert numpy.flatnonzero(rows >= 0).tolist() == known
        if known:
            assert reader.read_many(rows[known])["x"][:, 0, 0].tolist() == known
    assert len(shard_files(folder)) == sum(-(-len(batch) // per_shard) for batch in batches)


def test_shards_are_sealed_by_size_and_by_time(tmp_path, monkeypatch):
    monkeypatch.setattr(store_writer, "SHARD_BYTES", 50)  # a record has 24
    fill(Store((tmp_path,), "a"), range(6))
    assert len(shard_files(tmp_path, "a")) == 2
    monkeypatch.setattr(store_writer, "SHARD_SECONDS", 0.02)
    store = Store((tmp_path,), "b")
    with store.writer() as writer:
        writer.put(key(1), {"x": torch.ones(1)})
        while not shard_files(tmp_path, "b"):  # sealed although nothing else comes
            threading.Event().wait(0.005)
        writer.put(key(2), {"x": torch.ones(1)})
    store.refresh()
    assert (store.find(keys_of(1, 2)) >= 0).all()


def test_kinds_and_folders_are_apart_and_the_first_of_equal_keys_wins(tmp_path):
    store = Store((tmp_path / "a", tmp_path / "b"), "text")
    fill(store, [1], folder=1, value=10)
    fill(store, [2], folder=0, value=20)
    fill(Store((tmp_path / "a",), "latents"), [3])
    assert (store.find(keys_of(1, 2, 3)) >= 0).tolist() == [True, True, False]
    fill(Store((tmp_path / "a",), "text"), [1], value=30)
    store.refresh()
    assert store.read(store.find(keys_of(1))[0])["x"][0, 0] == 10  # known first, so its row stays
    again = Store((tmp_path / "a", tmp_path / "b"), "text")
    assert again.read(again.find(keys_of(1))[0])["x"][0, 0] == 30  # the first folder
    assert Store((tmp_path / "b", tmp_path / "a"), "text").find(keys_of(1)).tolist() == [0]


def test_nothing_put_leaves_no_trace(tmp_path):
    with Store((tmp_path / "cache",), "text").writer():
        pass
    assert not (tmp_path / "cache").exists()


def test_after_an_exception_what_was_put_is_kept(folders):
    store = Store(folders, "text")
    with pytest.raises(ZeroDivisionError), store.writer() as writer:
        writer.put(key(1), {"x": torch.ones(1)})
        raise ZeroDivisionError
    store.refresh()
    assert store.find(keys_of(1)).tolist() == [0]


def test_ranks_exchange_what_they_hold_in_memory():
    one, two = Store((), "text"), Store((), "text")
    fill(one, [1, 2])
    fill(two, [2, 3])
    sent = pickle.loads(pickle.dumps(one.export(one.find(keys_of(1, 2)))))
    two.absorb(sent)
    assert len(two) == 3
    assert two.read_many(two.find(keys_of(1, 2, 3)))["x"][:, 0, 0].tolist() == [1, 2, 3]


def test_memory_keeps_a_record_and_not_the_batch_it_was_cut_from():
    store = Store((), "latents")
    batch = torch.arange(1000.0).reshape(10, 100)
    with store.writer() as writer:
        writer.put(key(1), {"x": batch[3]})
    (record,) = store.export([0])
    assert record.tensors["x"].untyped_storage().nbytes() == 400 and len(pickle.dumps(record)) < 1500
    batch.zero_()
    assert store.read(0)["x"][0] == 300


def test_many_threads_read_one_store(tmp_path, monkeypatch):
    monkeypatch.setattr(store_writer, "SHARD_RECORDS", 3)
    store = Store((tmp_path,), "latents")
    fill(store, range(60))
    store._source._files._limit = 2  # files are closed under the readers' hands
    rows, wrong = store.find(keys_of(*range(60))), []

    def read(seed):
        for index in numpy.random.default_rng(seed).integers(0, 60, 200):
            if store.read(rows[index])["x"][0, 0] != index:
                wrong.append(index)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_memory_is_used_again_only_when_nobody_holds_it():
    buffers, size = Buffers(limit=1 << 22), 1 << 20
    first = buffers.empty(size).view(torch.float16)
    place, part = first.data_ptr(), first.view(2, -1)[1].unsqueeze(0)
    del first
    part.fill_(1)
    second = buffers.empty(size)
    assert second.data_ptr() != place  # a view of the first one is alive
    second.fill_(7)
    assert part.min() == part.max() == 1
    del part
    assert buffers.empty(size - 1000).data_ptr() == place
    assert buffers.empty(size // 3).data_ptr() != place  # that would waste more than half of it


def test_kept_memory_has_a_limit():
    buffers = Buffers(limit=1 << 20)
    held = [buffers.empty(300_000).fill_(number) for number in range(6)]
    assert sum(array.nbytes for array in buffers._arrays) <= 1 << 20
    assert [tensor[0].item() for tensor in held] == list(range(6))  # what was let go of lives as long as its tensor
    assert len({tensor.data_ptr() for tensor in held}) == 6
    buffers.empty(2 << 20)
    assert not buffers._arrays or buffers._arrays[-1].nbytes == 2 << 20
    assert buffers.empty(0).shape == (0,)


def test_batches_stay_as_they_were_read(tmp_path):
    store = Store((tmp_path,), "latents")
    with store.writer() as writer:
        for number in range(8):
            writer.put(key(number), {"x": torch.full((300, 300), float(number))})
    store.refresh()
    rows = store.find(keys_of(*range(8)))
    held = [store.read_many(rows[[number, 7 - number]])["x"] for number in range(8)]
    assert [batch[:, 0, 0].tolist() for batch in held] == [[number, 7 - number] for number in range(8)]


def test_a_short_key_or_a_tensor_longer_than_its_full_length_is_refused(folders):
    with Store(folders, "text").writer() as writer:
        with pytest.raises(AssertionError):
            writer.put(b"short", {"x": torch.ones(1)})
        with pytest.raises(AssertionError):
            writer.put(key(1), {"x": torch.ones(4)}, {"x": 3})

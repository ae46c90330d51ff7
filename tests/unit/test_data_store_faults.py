"""Caches survive what happens to them: kill -9, full disks, damage, other writers, removed files."""

import errno
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy
import pytest
import torch

from library import atomic
from library.data import shards, store, store_writer
from library.data.shards import shard_files
from library.data.store import Store
from library.errors import UserError

ROOT = Path(__file__).parents[2]
PRELUDE = """
import sys, time, torch
from pathlib import Path
from library.data import store_writer
from library.data.store import Store
from library.errors import UserError
store_writer.SHARD_RECORDS = 10
store = Store((Path(sys.argv[1]),), "latents")
first, last = int(sys.argv[2]), int(sys.argv[3])
def put(writer, number):
    writer.put(number.to_bytes(16, "little"), {"x": torch.full((500,), float(number))})
"""


def start(folder: Path, first: int, last: int, code: str, *before: str) -> subprocess.Popen:
    return subprocess.Popen([*before, sys.executable, "-c", PRELUDE + code, str(folder), str(first), str(last)], cwd=ROOT,
                            env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, text=True)


def keys_of(*numbers: int) -> numpy.ndarray:
    return numpy.array([list(number.to_bytes(16, "little")) for number in numbers], dtype=numpy.uint8)


def fill(folder: Path, numbers) -> Path:
    """A new shard with these records."""
    before = set(shard_files(folder))
    with Store((folder,), "latents").writer() as writer:
        for number in numbers:
            writer.put(number.to_bytes(16, "little"), {"x": torch.full((500,), float(number)), "y": torch.ones(3).half()})
    (made,) = set(shard_files(folder)) - before
    return made


def found(folder: Path, numbers) -> list[bool]:
    return (Store((folder,), "latents").find(keys_of(*numbers)) >= 0).tolist()


def wait_for(condition) -> None:
    until = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < until, "the other process did not get there"
        time.sleep(0.02)


def test_kill_9_loses_at_most_the_shard_being_written(tmp_path):
    process = start(tmp_path, 0, 10**6, """
with store.writer() as writer:
    for number in range(first, last):
        put(writer, number)
        if number == 34:
            while store_writer.QUEUE_RECORDS and not writer._queue.empty():
                time.sleep(0.01)
            print("now", flush=True)
            time.sleep(600)
""")
    assert process.stdout.readline() == "now\n"
    wait_for(lambda: len(shard_files(tmp_path)) == 3)
    process.kill()
    process.wait()
    process.stdout.close()
    after = Store((tmp_path,), "latents")
    rows = after.find(keys_of(*range(35)))
    assert (rows >= 0).tolist() == [True] * 30 + [False] * 5
    assert after.read_many(rows[:30])["x"][:, 0].tolist() == list(range(30))
    (left,) = tmp_path.glob(".*.tmp")
    os.utime(left, (time.time() - 7200,) * 2)
    fill(tmp_path, range(30, 35))  # the next run
    assert not left.exists() and all(found(tmp_path, range(35)))


def test_two_processes_fill_one_folder_at_once(tmp_path):
    code = """
input_ready = Path(sys.argv[1]) / "go"
while not input_ready.exists():
    time.sleep(0.01)
with store.writer() as writer:
    for number in range(first, last):
        put(writer, number)
"""
    both = [start(tmp_path, 0, 300, code), start(tmp_path, 200, 500, code)]
    (tmp_path / "go").touch()
    assert [process.wait(60) for process in both] == [0, 0]
    for process in both:
        process.stdout.close()
    after = Store((tmp_path,), "latents")
    rows = after.find(keys_of(*range(500)))
    assert after.read_many(rows)["x"][:, 499].tolist() == list(range(500))
    assert len(after) == 600 and len(shard_files(tmp_path)) == 60


def test_a_disk_that_is_really_full(tmp_path):
    if shutil.which("unshare") is None or subprocess.run(
            ["unshare", "-rm", "mount", "-t", "tmpfs", "none", str(tmp_path)], capture_output=True).returncode:
        pytest.skip("this machine lets no ordinary process mount a small disk")
    script = f'mount -t tmpfs -o size=100k none {tmp_path} && exec "$0" "$@"'
    process = start(tmp_path, 0, 1000, """
try:
    with store.writer() as writer:
        for number in range(first, last):
            put(writer, number)
except UserError as error:
    print(error)
store.refresh()
print(len(store), [path.name for path in Path(sys.argv[1]).iterdir() if path.name.startswith(".")])
""", "unshare", "-rm", "sh", "-c", script)
    told, kept = process.communicate(timeout=60)[0].splitlines()
    assert told.startswith(f"{tmp_path}: no space left") and "--cache_dir" in told
    assert kept == "40 []"  # four shards of ten fit, and what did not leaves nothing behind


class FullFile:
    """A file on a disk that has room for ``room`` more bytes."""

    def __init__(self, file, room):
        self.file, self.room = file, room

    def write(self, data):
        self.room -= memoryview(data).nbytes
        if self.room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.file.write(data)

    def __getattr__(self, name):
        return getattr(self.file, name)


def test_a_full_disk_is_told_with_the_folder_and_keeps_what_was_sealed(tmp_path, monkeypatch):
    fill(tmp_path, [1])
    real = shards.ShardBuilder.__init__
    monkeypatch.setattr(store_writer, "SHARD_RECORDS", 2)
    disk = []

    def on_small_disk(self, file, kind):
        disk.append(file)
        real(self, FullFile(file, 100_000 if len(disk) == 1 else 5000), kind)

    monkeypatch.setattr(shards.ShardBuilder, "__init__", on_small_disk)
    with pytest.raises(UserError, match="no space left") as caught, Store((tmp_path,), "latents").writer() as writer:
        for number in range(2, 500):  # more than the queue holds: a dead thread must not make anybody wait
            writer.put(number.to_bytes(16, "little"), {"x": torch.ones(500)})
    assert caught.value.place == str(tmp_path) and "--cache_dir" in caught.value.remedy
    assert found(tmp_path, [1, 2, 3, 4]) == [True, True, True, False]
    assert not list(tmp_path.glob(".*"))


def test_a_disk_that_fills_up_while_the_last_shard_is_sealed(tmp_path, monkeypatch):
    def refuse(self):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(shards.ShardBuilder, "finish", refuse)
    with pytest.raises(UserError, match="no space left"), Store((tmp_path,), "latents").writer() as writer:
        writer.put(bytes(16), {"x": torch.ones(500)})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.EIO])
def test_a_folder_that_cannot_be_written_can_still_be_read(tmp_path, monkeypatch, number):
    fill(tmp_path, [1])

    def refuse(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(atomic.tempfile, "mkstemp", refuse)
    cache = Store((tmp_path,), "latents")
    assert cache.read(cache.find(keys_of(1))[0])["x"][0] == 1
    with pytest.raises(UserError, match="cannot be written") as caught, cache.writer() as writer:
        writer.put(bytes(16), {"x": torch.ones(1)})
    assert caught.value.place == str(tmp_path) and os.strerror(number) in str(caught.value)


def test_a_truncated_shard_is_named_once_and_made_again(tmp_path, caplog):
    bad, _ = fill(tmp_path, [1, 2]), fill(tmp_path, [3])
    os.truncate(bad, bad.stat().st_size - 100)
    cache = Store((tmp_path,), "latents")
    cache.refresh()
    assert (cache.find(keys_of(1, 2, 3)) >= 0).tolist() == [False, False, True]
    assert [str(bad) in record.getMessage() for record in caplog.records] == [True]
    assert not bad.exists() and bad.with_name(bad.name + ".damaged").exists()
    fill(tmp_path, [1, 2])
    caplog.clear()
    assert all(found(tmp_path, [1, 2, 3])) and not caplog.records


def test_a_truncated_shard_in_a_read_only_folder_is_passed_over(tmp_path, caplog, monkeypatch):
    bad = fill(tmp_path, [1])
    os.truncate(bad, 5000)
    monkeypatch.setattr(store, "set_aside", lambda path: False)
    cache = Store((tmp_path,), "latents")
    cache.refresh()
    assert len(cache) == 0 and bad.exists() and len(caplog.records) == 1


def test_files_of_others_are_left_alone(tmp_path, caplog):
    model, later = tmp_path / "latents-00001-of-00002.safetensors", fill(tmp_path, [1])
    model.write_bytes(b"not even this")
    later.write_bytes(later.read_bytes().replace(b"kiln-shard-1", b"kiln-shard-9"))
    assert found(tmp_path, [1]) == [False]
    assert model.exists() and later.exists() and str(model) not in caplog.text
    assert f"{later} is not used" in caplog.text


@pytest.mark.parametrize("writable", [True, False])
def test_a_flipped_byte_costs_one_record(tmp_path, monkeypatch, writable):
    path = fill(tmp_path, [1, 2, 3])
    data = bytearray(path.read_bytes())
    data[4096 + 2006 + 700] ^= 16  # of the second record: 500 floats and three halves each
    path.write_bytes(data)
    if not writable:
        monkeypatch.setattr(store, "mark_bad", lambda *_: False)
    cache = Store((tmp_path,), "latents")
    rows = cache.find(keys_of(1, 2, 3))
    with pytest.raises(UserError, match="checksum") as caught:
        cache.read_many(rows)
    assert caught.value.place == str(path)
    assert ("start again" if writable else "remove the file") in caught.value.remedy
    assert cache.read_many(rows[[0, 2]])["x"][:, 0].tolist() == [1, 3]
    assert cache.find(keys_of(2)).tolist() == [-1]
    if writable:
        assert found(tmp_path, [1, 2, 3]) == [True, False, True]
        fill(tmp_path, [2])
        again = Store((tmp_path,), "latents")
        assert again.read_many(again.find(keys_of(1, 2, 3)))["x"][:, 0].tolist() == [1, 2, 3]


def test_every_byte_of_a_record_is_checked(tmp_path):
    path = fill(tmp_path, [1])
    whole = path.read_bytes()
    for at in range(4096, 4096 + 2006, 59):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1:])
        with pytest.raises(UserError, match="damaged"):
            Store((tmp_path,), "latents").read(0)
        Path(f"{path}.bad").unlink()


def test_a_shard_that_goes_away_or_shrinks_during_a_run(tmp_path):
    path = fill(tmp_path, [1, 2])
    cache = Store((tmp_path,), "latents")
    os.truncate(path, 4096 + 2006 + 10)
    rows = cache.find(keys_of(1, 2))
    assert cache.read(rows[0])["x"][0] == 1
    with pytest.raises(UserError, match="damaged.*start again"):
        cache.read(rows[1])
    cache._source._files.close()
    path.unlink()
    with pytest.raises(UserError, match="gone.*start again") as caught:
        cache.read(rows[0])
    assert caught.value.place == str(path)
    assert found(tmp_path, [1, 2]) == [False, False]
    cache.refresh()  # nothing new, and no complaint


def test_a_shard_that_goes_away_while_the_folder_is_listed(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(store, "shard_files", lambda folder, kind: [tmp_path / "gone.safetensors"])
    assert len(Store((tmp_path,), "latents")) == 0 and not caplog.records


def test_a_folder_that_cannot_be_listed_is_told(tmp_path):
    (tmp_path / "file").touch()
    assert len(Store((tmp_path / "file",), "latents")) == 0  # a file stands where the folder should: writing tells
    with pytest.raises(UserError, match="cannot be written"), Store((tmp_path / "file",), "latents").writer() as writer:
        writer.put(bytes(16), {"x": torch.ones(1)})

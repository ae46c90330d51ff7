"""The lock keeps processes apart and goes with its holder."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from library import file_lock
from library.file_lock import FileLock, try_lock

ROOT = Path(__file__).parents[2]
HOLDER = """
import sys, time
from pathlib import Path
from library.file_lock import FileLock
lock = FileLock(Path(sys.argv[1]))
lock.acquire()
print("held", flush=True)
time.sleep(60)
"""


def is_free(path) -> bool:
    with open(path, "ab") as file:
        return try_lock(file.fileno())


def test_one_at_a_time(tmp_path):
    first, second = FileLock(tmp_path / "lock"), FileLock(tmp_path / "lock")
    first.acquire()
    assert not is_free(first.path)
    first.release()
    first.release()  # nothing to give back
    with second:
        assert not is_free(first.path)
    assert is_free(first.path)


def test_waiting_is_told_again_and_again_and_lasts_as_long_as_the_holder(tmp_path, monkeypatch):
    monkeypatch.setattr(file_lock, "FIRST_WORD", 0.1)
    monkeypatch.setattr(file_lock, "NEXT_WORD", 0.2)
    holder, told = FileLock(tmp_path / "lock"), []

    def waiting(seconds):
        told.append(seconds)
        if len(told) == 3:
            holder.release()

    holder.acquire()
    with FileLock(tmp_path / "lock", waiting):
        assert not is_free(tmp_path / "lock")
    assert len(told) == 3 and told == sorted(told)


def test_a_killed_holder_holds_nothing(tmp_path):
    path = tmp_path / "lock"
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(path)], cwd=ROOT, stdout=subprocess.PIPE)
    try:
        assert holder.stdout.readline().strip() == b"held"
        assert not is_free(path)
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
    with FileLock(path):
        assert not is_free(path)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no shared locks")
def test_shared(tmp_path):
    path = tmp_path / "file"
    path.write_text("x")
    with open(path, "rb") as one, open(path, "rb") as two, open(path, "rb") as three:
        assert try_lock(one.fileno(), shared=True) and try_lock(two.fileno(), shared=True)
        assert not try_lock(three.fileno())
        file_lock.unlock(one.fileno())
        two.close()
        assert try_lock(three.fileno())


@pytest.mark.skipif(os.name == "nt", reason="replaces what only POSIX has")
def test_drives_without_locks_say_so(tmp_path, monkeypatch):
    def flock(handle, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(file_lock.fcntl, "flock", flock)
    with pytest.raises(OSError, match="No locks"):
        FileLock(tmp_path / "lock").acquire()
    with pytest.raises(OSError):
        FileLock(tmp_path / "none" / "lock").acquire()

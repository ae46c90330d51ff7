"""The lock keeps processes apart and goes with its holder."""

import errno
import os
import subprocess
import sys
import threading
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


def test_one_at_a_time(tmp_path):
    first, second = FileLock(tmp_path / "lock"), FileLock(tmp_path / "lock")
    assert first.acquire(0) and not second.acquire(0)
    first.release()
    first.release()  # nothing to give back
    assert second.acquire(0)
    second.release()


def test_waiting_is_announced_once(tmp_path):
    told = []
    holder = FileLock(tmp_path / "lock")
    with holder:
        later = threading.Timer(0.5, holder.release)
        later.start()
        waiter = FileLock(tmp_path / "lock", lambda: told.append(1), patience=0.1)
        assert waiter.acquire(30)
    later.join()
    assert told == [1]
    waiter.release()


def test_a_killed_holder_holds_nothing(tmp_path):
    path = tmp_path / "lock"
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(path)], cwd=ROOT, stdout=subprocess.PIPE)
    try:
        assert holder.stdout.readline().strip() == b"held"
        assert not FileLock(path).acquire(0.2)
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
    mine = FileLock(path)
    assert mine.acquire(10)
    mine.release()


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

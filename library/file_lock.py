"""A lock between processes that the operating system gives back when its holder dies: it cannot go stale."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]
    import msvcrt

_HELD_ELSEWHERE = {errno.EAGAIN, errno.EACCES, errno.EDEADLK, getattr(errno, "EWOULDBLOCK", errno.EAGAIN)}
POLL_SECONDS = 0.1
FIRST_WORD, NEXT_WORD = 2.0, 60.0  # seconds of waiting until the first line about it, and between lines


def try_lock(handle: int, *, shared: bool = False) -> bool:
    """Take the lock on an open file (a descriptor) without waiting; False when somebody else has it. It is given back when the
    file is closed. ``shared``: several may hold it, nobody exclusively; on Windows, which has none, True and no lock.

    Raises OSError where files cannot be locked, as on some network drives.
    """
    try:
        if fcntl is not None:
            fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        elif not shared:
            os.lseek(handle, 0, os.SEEK_SET)
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
    except OSError as error:
        if error.errno in _HELD_ELSEWHERE:
            return False
        raise
    return True


def unlock(handle: int) -> None:
    """Give the lock back without closing the file."""
    if fcntl is not None:
        fcntl.flock(handle, fcntl.LOCK_UN)
    else:
        os.lseek(handle, 0, os.SEEK_SET)
        msvcrt.locking(handle, msvcrt.LK_UNLCK, 1)


class FileLock:
    """``with FileLock(path):`` holds the exclusive lock on ``path``, an empty file that is made and stays: removing it would
    let two processes hold locks on two files of that name. Not reentrant."""

    def __init__(self, path: Path, waiting: Callable[[float], None] = lambda seconds: None):
        """``waiting`` is called every now and then with the seconds that the lock has been waited for."""
        self.path, self._waiting = Path(path), waiting
        self._handle: int | None = None

    def acquire(self) -> None:
        """Wait for the lock, as long as its holder lives. OSError where the file cannot be made or files cannot be locked."""
        assert self._handle is None, "not reentrant"
        handle = os.open(self.path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o666)
        try:
            started, word = time.monotonic(), FIRST_WORD
            while not try_lock(handle):
                if (waited := time.monotonic() - started) >= word:
                    word = waited + NEXT_WORD
                    self._waiting(waited)
                time.sleep(POLL_SECONDS)
            self._handle, handle = handle, -1
        finally:
            if handle >= 0:
                os.close(handle)

    def release(self) -> None:
        """Nothing happens when it is not held."""
        if self._handle is not None:
            handle, self._handle = self._handle, None
            try:
                unlock(handle)
            finally:
                os.close(handle)

    def __enter__(self) -> FileLock:
        self.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

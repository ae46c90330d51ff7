"""Reading pieces of many files from several threads, with few of them open at a time."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

LIMIT = 128  # processes may have 256 files open on macOS and 512 on Windows


class OpenFiles:
    """The files read last stay open; the one not used for longest is closed when there are more than ``limit``."""

    def __init__(self, limit: int = LIMIT):
        self._limit, self._lock = limit, threading.Lock()
        self._files: OrderedDict[Path, _File] = OrderedDict()

    def read_into(self, path: Path, offset: int, buffers: Sequence[memoryview]) -> bool:
        """Fill writable byte buffers, one after the other, from ``offset`` on. False when the file ends before."""
        with self._lock:
            file = self._files.get(path)
            if file is None:
                file = self._files[path] = _File(path)
                if len(self._files) > self._limit:
                    self._files.popitem(last=False)  # closed when the last thread that reads from it lets go
            else:
                self._files.move_to_end(path)
        return file.read_into(offset, buffers)

    def close(self) -> None:
        with self._lock:
            self._files.clear()


class _File:
    def __init__(self, path: Path):
        self._handle = -1
        self._handle = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0))
        self._lock = threading.Lock()  # where the system has no positioned read

    def __del__(self) -> None:
        if self._handle >= 0:
            with suppress(OSError):
                os.close(self._handle)

    def read_into(self, offset: int, buffers: Sequence[memoryview]) -> bool:
        left = [buffer for buffer in buffers if len(buffer)]
        if not hasattr(os, "preadv"):
            return self._read_in_turn(offset, left)
        while left:
            done = os.preadv(self._handle, left, offset)  # straight into the caller's memory, without the interpreter lock
            if done == 0:
                return False
            offset += done
            while left and done >= len(left[0]):
                done -= len(left.pop(0))
            if done:
                left[0] = left[0][done:]
        return True

    def _read_in_turn(self, offset: int, buffers: Sequence[memoryview]) -> bool:
        with self._lock, open(self._handle, "rb", buffering=0, closefd=False) as file:
            file.seek(offset)
            for buffer in buffers:
                while len(buffer):
                    done = file.readinto(buffer)
                    if not done:
                        return False
                    buffer = buffer[done:]
        return True

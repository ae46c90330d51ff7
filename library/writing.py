"""Files of weights: written at once, or by a thread from a copy of the weights while steps go on. Read back in both cases."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path

from torch import nn

from library.background import Background
from library.checkpoint.snapshot import Snapshot
from library.checkpoint.verify import Damaged, verify
from library.checkpoint.writer import require_room
from library.errors import UserError

Export = Callable[[Mapping[str, nn.Module], Path, Mapping[str, int]], None]
DAMAGED = ".damaged"  # behind the name of a file that did not read back


class Writer:
    """``export(modules, path, info)`` puts one file in place; ``needed_bytes`` is about its size.

    ``beside``: files that are not wanted at once are written by a thread from a copy in host memory. There is one copy, so the
    next file waits for the last. ``reading()`` is a context in which the modules' weights can be read (streamed ones are
    elsewhere while they train). ``on_failure`` gets what the thread could not do, in the thread that calls in.
    """

    def __init__(self, modules: Mapping[str, nn.Module], export: Export, needed_bytes: int, *, beside: bool = False,
                 reading: Callable[[], AbstractContextManager] = nullcontext,
                 on_failure: Callable[[Exception], None] | None = None):
        self.modules, self.export, self.needed_bytes, self.reading = modules, export, needed_bytes, reading
        self.on_failure = on_failure
        self.thread = Background("saving", lasting=True)
        self.snapshot = Snapshot(modules) if beside else None
        if self.snapshot is not None:
            self.snapshot.require_memory()

    def write(self, path: Path, info: Mapping[str, int], then: Callable[[], None], at_once: bool = False) -> None:
        """See ``saving.Write``. Raises NoRoom before anything is copied or written."""
        self.wait()
        require_room(path, self.needed_bytes)
        if self.snapshot is None or at_once:
            with self.reading():
                self._put(self.modules, path, info, keep_damaged=at_once)
            then()
            return
        with self.reading():
            self.snapshot.take()
        copies = self.snapshot.modules

        def job() -> None:
            self._put(copies, path, info)
            then()

        self.thread.start(job)

    def collect(self) -> None:
        """Tell of a file that the thread could not write, when there is one. Defects of ours are raised."""
        self._told(self.thread.collect)

    def wait(self) -> None:
        """Until nothing is being written, then as ``collect``."""
        self._told(self.thread.wait)

    def _told(self, ask: Callable[[], None]) -> None:
        try:
            ask()
        except (UserError, OSError) as error:
            if self.on_failure is None:
                raise
            self.on_failure(error)

    def _put(self, modules: Mapping[str, nn.Module], path: Path, info: Mapping[str, int], keep_damaged: bool = False) -> None:
        self.export(modules, path, info)
        try:
            verify(path)
        except Damaged:
            with suppress(OSError):  # nobody shall take it for a good one; where no other follows it is better than nothing
                damaged = path.with_name(path.name + DAMAGED)
                shutil.rmtree(damaged, ignore_errors=True)  # a folder cannot be replaced
                os.replace(path, damaged)
                if not keep_damaged:
                    shutil.rmtree(damaged) if damaged.is_dir() else damaged.unlink()
            raise

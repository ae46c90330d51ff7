"""Work beside the training: jobs that run one after the other in a thread, and whose errors come back to the caller."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

Job = Callable[[], None]


class Background:
    """Jobs in the order they were given. The first error of a job is kept until ``collect`` or ``wait`` raises it.

    ``lasting``: the program does not end before the jobs have (half a file is no use); otherwise their thread dies with it.
    """

    def __init__(self, name: str, lasting: bool):
        self.name, self.lasting = name, lasting
        self._lock = threading.Lock()
        self._jobs: deque[Job] = deque()
        self._errors: deque[BaseException] = deque()
        self._thread: threading.Thread | None = None

    @property
    def busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def start(self, job: Job) -> None:
        """Run ``job`` when those before it are done."""
        with self._lock:
            self._jobs.append(job)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name=self.name, daemon=not self.lasting)
                self._thread.start()

    def collect(self) -> None:
        """Raise the error of a job that has ended, if there is one that was not raised yet."""
        if self._errors:
            raise self._errors.popleft()

    def wait(self) -> None:
        """Until every job is done; then as ``collect``. A Ctrl-C gets through."""
        while (thread := self._thread) is not None:
            thread.join(0.2)  # without a limit Windows would not let a Ctrl-C through
        self.collect()

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._jobs:
                    self._thread = None
                    return
                job = self._jobs.popleft()
            try:
                job()
            except BaseException as error:  # it is the caller's
                self._errors.append(error)

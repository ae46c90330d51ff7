"""Ctrl-C, SIGTERM and SIGUSR1 end a run after the step in progress, with everything saved; a second Ctrl-C ends it at once."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

# SIGBREAK is Ctrl-Break on Windows; elsewhere SIGHUP is a closed terminal, and SIGUSR1 what job schedulers are asked to send
# some time before they take the machine away (pre-emption).
NAMES = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP", "SIGBREAK")
SIGNALS = tuple(getattr(signal, name) for name in NAMES if hasattr(signal, name))

# Exit status of a run that was stopped before its end and can go on with --resume latest: EX_TEMPFAIL of sysexits.h, which
# asks to try again later.
STOPPED_STATUS = 75


@dataclass
class StopRequest:
    """``requested`` is read by the loop after every step; ``signal_name`` is the signal that came first.

    Set ``settled`` when everything is saved: what follows takes a second, and a second Ctrl-C need not break it off.
    """

    signal_name: str | None = None
    settled: bool = False

    @property
    def requested(self) -> bool:
        return self.signal_name is not None


def _say(line: str) -> None:
    """``line`` to stderr from a signal handler, where an error would break off whatever the program is doing."""
    try:
        sys.stderr.write(line)
        sys.stderr.flush()
    except RuntimeError:
        pass  # the signal came in the middle of another write to stderr, which does not nest
    except OSError:
        # The terminal is closed (SIGHUP). Nobody reads on: whatever is printed from now on must not end the run
        # before it has saved.
        shared = os.path.sameopenfile(1, 2)
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 2)
        if shared:
            os.dup2(nowhere, 1)
        os.close(nowhere)


@contextmanager
def stop_requested() -> Iterator[StopRequest]:
    """Inside the block signals only set a flag. The handlers from before are put back at its end.

    A second Ctrl-C raises KeyboardInterrupt where the program stands. The others never do: launchers and job
    schedulers may send them again, or send one after passing on a Ctrl-C. Outside the main thread, where Python has no signals,
    nothing is installed.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def handle(number: int, _frame) -> None:
        if request.requested:
            if number == signal.SIGINT and not request.settled:
                raise KeyboardInterrupt
            return
        request.signal_name = signal.Signals(number).name
        _say(f"\n{request.signal_name}: finishing this step, then saving (Ctrl-C again stops at once)\n")

    # A signal that was ignored from the start (nohup) stays ignored.
    before = {number: signal.getsignal(number) for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN}
    for number in before:
        signal.signal(number, handle)
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

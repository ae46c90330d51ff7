import os
import signal
import sys
import threading
from pathlib import Path

import pytest

from library.interrupt import stop_requested

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="a process cannot send itself these signals on Windows")


def test_the_first_signal_asks_and_the_old_handlers_come_back(capsys):
    before = signal.getsignal(signal.SIGTERM)
    with stop_requested() as stop:
        assert not stop.requested
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested and stop.signal_name == "SIGTERM"
    assert signal.getsignal(signal.SIGTERM) == before
    assert capsys.readouterr().err.strip().count("\n") == 0


def test_a_second_ctrl_c_stops_at_once():
    with pytest.raises(KeyboardInterrupt), stop_requested():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)


def test_repeated_sigterm_never_does():
    with stop_requested() as stop:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested


def test_an_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_requested() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.requested
    finally:
        signal.signal(signal.SIGHUP, before)


def test_other_threads_get_a_request_that_nobody_makes():
    seen = []

    def work():
        with stop_requested() as stop:
            seen.append(stop.requested)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [False]


LOOP = """
import sys, time
from library.interrupt import stop_requested
with stop_requested() as stop:
    print("ready", file=sys.stderr, flush=True)
    while not stop.requested:
        time.sleep(0.01)
    print("a progress bar", file=sys.stderr, flush=True)
    print("a message", flush=True)
open(sys.argv[1], "w").write(f"saved after {stop.signal_name}")
"""


def test_a_closed_terminal_still_lets_the_run_save(tmp_path):
    import pty

    root, saved = Path(__file__).parents[2], tmp_path / "saved.txt"
    child, terminal = pty.fork()
    if child == 0:
        os.chdir(root)
        os.execv(sys.executable, [sys.executable, "-c", LOOP, str(saved)])
    seen = b""
    while b"ready" not in seen:
        seen += os.read(terminal, 1000)
    os.close(terminal)  # the window is closed: SIGHUP, and every later write to it is an error
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert saved.read_text() == "saved after SIGHUP"

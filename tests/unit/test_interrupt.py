import os
import signal
import sys
import threading

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

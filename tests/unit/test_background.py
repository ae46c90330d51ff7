import threading
import time

import pytest

from library.background import Background
from library.errors import UserError


def test_jobs_run_in_their_order_and_wait_waits():
    background, done = Background("test", lasting=True), []
    for number in range(5):
        background.start(lambda number=number: (time.sleep(0.01), done.append(number)))
    assert background.busy
    background.wait()
    assert done == [0, 1, 2, 3, 4] and not background.busy
    background.start(lambda: done.append(5))  # a new thread
    background.wait()
    assert done[-1] == 5


def test_the_caller_goes_on_meanwhile():
    background, gate = Background("test", lasting=True), threading.Event()
    background.start(gate.wait)
    assert background.busy
    background.collect()  # nothing has failed yet
    gate.set()
    background.wait()


def test_an_error_comes_back_once_and_later_jobs_run():
    background, done = Background("test", lasting=True), []

    def fails():
        raise UserError("no room")

    background.start(fails)
    background.start(lambda: done.append(1))
    with pytest.raises(UserError, match="no room"):
        background.wait()
    background.wait()
    background.collect()
    assert done == [1]


def test_only_lasting_work_holds_up_the_end_of_the_program():
    for lasting in (True, False):
        background, gate, seen = Background("test", lasting), threading.Event(), []
        background.start(lambda: (seen.append(threading.current_thread().daemon), gate.wait()))
        gate.set()
        background.wait()
        assert seen == [not lasting]

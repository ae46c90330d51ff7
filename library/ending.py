"""Training to its end, and the three ends there are: it is complete, it was stopped, it broke off."""

from __future__ import annotations

from collections.abc import Callable

from library.interrupt import STOPPED_STATUS, stop_requested
from library.loop import Task, train
from library.outputs import Outputs


def to_the_end(task: Task, outputs: Outputs, advice: Callable[[Exception], Exception | None]) -> int:
    """Train, and save what the end calls for. Returns the exit status: 0, or that of a run that was stopped and can go on.

    ``advice(error)``: what to raise in place of ``error``; None: ``error`` itself. Signals are listened to from here on: before
    that, one ends the run at once, as there is nothing to save yet.
    """
    with stop_requested() as stop:
        try:
            done = train(task, stop, outputs.after_step, outputs.go_back)
        except Exception as error:
            outputs.rescue(error)
            raise advice(error) or error
        outputs.finish(done, stop.signal_name)
        stop.settled = True
        outputs.draw_curve(done)
    return 0 if done == task.total_steps else STOPPED_STATUS

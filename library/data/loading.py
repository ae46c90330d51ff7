"""Work done ahead of its use: by one thread, or by DataLoader's worker processes. Knows nothing of pictures."""

from __future__ import annotations

import os
import queue
import signal
import threading
from collections.abc import Callable, Generator, Iterable
from contextlib import closing
from typing import TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from library.errors import UserError

T = TypeVar("T")
R = TypeVar("R")


def in_thread(produce: Callable[[], Generator[T, None, None]], ahead: int) -> Generator[T, None, None]:
    """What ``produce`` yields, computed up to ``ahead`` values early by one thread; its exception is raised here.

    Closing this generator closes the other one, in its thread, and waits for that.
    """
    results: queue.Queue[tuple[str, object]] = queue.Queue(maxsize=ahead)
    stopped = threading.Event()

    def put(kind: str, value: object) -> bool:
        while not stopped.is_set():
            try:
                results.put((kind, value), timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def run() -> None:
        try:
            with closing(produce()) as values:
                for value in values:
                    if not put("value", value):
                        return
            put("end", None)
        except BaseException as error:  # handed to the reader
            put("error", error)

    thread = threading.Thread(target=run, name="data", daemon=True)
    thread.start()
    try:
        while True:
            kind, value = results.get()
            if kind == "error":
                raise value  # type: ignore[misc]
            if kind == "end":
                return
            yield value  # type: ignore[misc]
    finally:
        stopped.set()
        thread.join()


def in_processes(work: Callable[[T], R], orders: Iterable[T], workers: int) -> Generator[R, None, None]:
    """``map(work, orders)`` by ``workers`` processes, a few orders ahead; its UserErrors are raised here.

    ``work`` is a function of a module; orders and results are pickled. The processes start with this call, in the thread that
    makes it, and end when the generator is closed.
    """
    # Without a generator of its own the loader would draw its base seed from torch's global state.
    loader = DataLoader(_Work(work), batch_size=None, sampler=orders, num_workers=workers, collate_fn=_unchanged,
                        worker_init_fn=_start_worker, generator=torch.Generator())
    running = [iter(loader)]  # torch watches over its processes from the thread that started them

    def results() -> Generator[R, None, None]:
        try:
            for result in running[0]:
                if isinstance(result, UserError):
                    raise result
                yield result
        finally:
            running.clear()  # the last reference: ends the processes
    return results()


class _Work(Dataset):
    """Order -> result, or the UserError, which torch would bury in a stack trace."""

    def __init__(self, work: Callable):
        self.work = work

    def __getitem__(self, order: object) -> object:
        try:
            return self.work(order)
        except UserError as error:
            return error


def _unchanged(value: T) -> T:
    return value


def _start_worker(index: int) -> None:
    """Ctrl-C, SIGTERM and SIGUSR1 often reach the whole process group. The main process then finishes its step and saves, so a
    worker lives on until it is told to end, after SIGTERM for half a minute at most."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def end_later(signum: int, frame: object) -> None:
        timer = threading.Timer(30, os._exit, (0,))
        timer.daemon = True
        timer.start()
    signal.signal(signal.SIGTERM, end_later)
    if hasattr(signal, "SIGUSR1"):
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # as Ctrl-C: the main process will end the workers

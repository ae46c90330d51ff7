"""Runs for the command-line tests: several in one process, under a launcher, and ones that are interrupted on their way."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import safe_open

from tests.cli.conftest import ROOT, Done, environment

SCRIPT = "flux_train.py"
LIMIT = 240  # seconds that a process of these tests may take on a busy machine

def launcher(precision: str, **more: object) -> list[str]:
    """``accelerate launch`` as people type it, up to the script's own flags."""
    flags = {"num_processes": 1, "num_machines": 1, "mixed_precision": precision, "dynamo_backend": "no", **more}
    words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    return [sys.executable, "-m", "accelerate.commands.launch", *words, SCRIPT]


def launch(command: Sequence[str], *arguments: object) -> Done:
    """``command`` with ``arguments`` behind it, run to its end."""
    done = subprocess.run([*command, *map(str, arguments)], capture_output=True, cwd=ROOT, env=environment(), timeout=LIMIT,
                          text=True, encoding="utf-8", errors="replace")
    return Done(done.returncode, done.stdout, done.stderr)


class Running:
    """A command that is under way; its output goes to a file, which nobody has to keep reading."""

    def __init__(self, command: Sequence[object], log: Path):
        self.log = log
        with log.open("wb") as file:
            # A session of its own, so that a Ctrl-C can be sent to the whole group as a terminal does.
            self.process = subprocess.Popen([str(word) for word in command], cwd=ROOT, env=environment(), stdout=file,
                                            stderr=file, start_new_session=True)

    @property
    def text(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def until(self, ready: Callable[[], object], pause: float = 0.02) -> None:
        """Wait for ``ready()`` while the command runs."""
        end = time.monotonic() + LIMIT
        while not ready():
            assert self.process.poll() is None, f"ended with {self.process.returncode}:\n{self.text}"
            assert time.monotonic() < end, self.text
            time.sleep(pause)

    def until_it_says(self, words: str) -> None:
        self.until(lambda: words in self.text)

    def end(self) -> int:
        return self.process.wait(LIMIT)


@contextmanager
def running(command: Sequence[object], log: Path) -> Iterator[Running]:
    """Start ``command``; whatever is left of it, children included, is killed at the end of the block."""
    run = Running(command, log)
    try:
        yield run
    finally:
        if hasattr(os, "killpg"):
            with suppress(ProcessLookupError):  # a child may have outlived its launcher
                os.killpg(run.process.pid, signal.SIGKILL)
        else:
            run.process.kill()
        run.process.wait(LIMIT)


def rows(folder: Path, name: str = "last") -> list[dict[str, float]]:
    """The CSV of a run: a mapping per finished step (a last line that is still being written is left out)."""
    path = folder / f"{name}_log.csv"
    if not path.exists():
        return []
    whole = path.read_text(encoding="utf-8").rpartition("\n")[0]
    return [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(whole.splitlines())]


def column(folder: Path, key: str, name: str = "last") -> list[float]:
    """The values of a column; steps without one are left out."""
    return [row[key] for row in rows(folder, name) if key in row]


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.safetensors"))


def header(path: Path) -> tuple[dict[str, tuple[int, ...]], set[str], dict[str, str]]:
    """Shapes by name, the dtypes in use, and the metadata. Refuses a file that is cut off, as every reader does."""
    with safe_open(path, "pt") as file:
        views = {name: file.get_slice(name) for name in file.keys()}
        return ({name: tuple(view.get_shape()) for name, view in views.items()}, {view.get_dtype() for view in views.values()},
                file.metadata() or {})

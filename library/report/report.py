"""The report of a run: a page in the output folder that is written again while training goes on.

Everything on it is read from what the run puts on disk anyway (``{name}_log.csv``, the folder ``sample``, checkpoints and
states), so that a resumed run goes on with the curves. Writing happens in a thread of its own, at most every
``every_seconds`` and never more than a twentieth of the time.
"""

from __future__ import annotations

import re
import threading
import time
import tomllib
from collections.abc import Callable, Collection, Mapping
from datetime import datetime
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING

from library.atomic import write_atomic
from library.config.values import toml_text
from library.data import page_cards
from library.data.page_sheet import make_cards
from library.log import log
from library.report.curves import POINTS, charts, standing
from library.report.html import BROKEN, FINISHED, STOPPED, TRAINING, Facts, render
from library.report.next_steps import find_results
from library.report.pictures import Album
from library.report.rows import Rows

if TYPE_CHECKING:
    from library.data.items import Items
    from library.data.showing import Course

__all__ = ["BROKEN", "FINISHED", "STOPPED", "TRAINING", "Report", "data_sheet"]

EVERY_SECONDS = 60.0
SHARE = 20  # of the time that a report took to write, until the next one may begin
SHEET_PICTURES = 12


class Report:
    """``{name}_report.html`` in ``folder``. On the first rank only.

    ``program``: the script, for commands; ``settings``: the resolved configuration as TOML (``parse.to_toml``), of which
    ``changed`` flags are not at their defaults; ``data``: makes the HTML of the data's contact sheet (see ``data_sheet``),
    called once, in the writing thread; ``rates(step)``: the learning rate of each group in step number ``step`` (from 1), of
    which the whole course is drawn. What goes wrong is told once in the log and never stops the training.
    """

    def __init__(self, folder: Path, name: str, *, total_steps: int, program: str, settings: str, changed: Collection[str] = (),
                 data: Callable[[], str] | None = None, rates: Callable[[int], Mapping[str, float]] | None = None,
                 samples: str = "sample", every_seconds: float = EVERY_SECONDS,
                 clock: Callable[[], float] = time.monotonic):
        self.path = folder / f"{name}_report.html"
        self._folder, self._name, self._program, self._total = folder, name, program, total_steps
        self._settings = shown_settings(settings, changed)
        self._rows, self._album = Rows(folder / f"{name}_log.csv"), Album(folder / samples, name)
        self._planned = planned_rates(rates, total_steps) if rates is not None else None
        self._make_data, self._data = data, ""
        self._every, self._clock = every_seconds, clock
        self._due, self._worker, self._complained = clock(), None, False

    def update(self) -> None:
        """After any step: starts a writing where one is due, and returns at once."""
        if self._clock() < self._due or (self._worker is not None and self._worker.is_alive()):
            return
        self._worker = threading.Thread(target=self._write_timed, args=(TRAINING, ""), name="report", daemon=True)
        self._due = self._clock() + self._every
        self._worker.start()

    def finish(self, status: str, note: str = "") -> None:
        """The last writing, before this returns; ``status`` is one of FINISHED, STOPPED, BROKEN, ``note`` a sentence about it."""
        if self._worker is not None:
            self._worker.join()
        self._write_timed(status, note)

    def _write_timed(self, status: str, note: str) -> None:
        started = self._clock()
        try:
            self.write(status, note)
        except Exception as error:  # a page is not worth a training run
            if not self._complained:
                log.warning("the report could not be written, training goes on: %s", error)
            self._complained = True
        self._due = self._clock() + max(self._every, SHARE * (self._clock() - started))

    def write(self, status: str, note: str = "") -> None:
        """Write the page now. UserError or OSError where that fails."""
        self._rows.read()
        at = standing(self._rows)
        if self._make_data is not None:
            make, self._make_data = self._make_data, None
            self._data = make()
        page = render(Facts(
            self._name, self._program, status, note, f"{datetime.now():%Y-%m-%d %H:%M}", self._total, at,
            charts(self._rows, self._planned), self._album.show(at.step), find_results(self._folder, self._name),
            self._settings, self._data))
        write_atomic(self.path, page.encode("utf-8", "replace"))  # file names may hold bytes that are no text


def data_sheet(items: Items, course: Course, steps_per_epoch: int, variants: int | None = None) -> str:
    """HTML of some of the pictures, cut and captioned as in training: the contact sheet of the data page, smaller."""
    cards, _ = make_cards(items, course, steps_per_epoch, None, SHEET_PICTURES)
    sheet = "\n".join(page_cards.sheet(cards, variants)) if cards else ""
    return re.sub(r'<h3 title="[^"]*">', "<h3>", sheet)  # where the pictures lie is nobody's business who is shown the report


def planned_rates(rates: Callable[[int], Mapping[str, float]], total_steps: int) -> dict[str, tuple[list[int], list[float]]]:
    """Name of the group -> (steps, rates) at up to ``POINTS`` steps of the whole run."""
    steps = sorted({1 + round(index * (total_steps - 1) / (POINTS - 1)) for index in range(POINTS)})
    told = [rates(step) for step in steps]
    return {name: (steps, [values[name] for values in told]) for name in told[0]}


def shown_settings(settings: str, changed: Collection[str]) -> list[tuple[str, str, str, bool]]:
    """(section, flag, value, changed) of every setting. Of absolute paths only the end is shown: reports are passed around."""
    return [(section, flag, toml_text(_short(value)), flag in changed)
            for section, flags in tomllib.loads(settings).items() for flag, value in flags.items()]


def _short(value: object) -> object:
    if isinstance(value, list):
        return [_short(item) for item in value]
    if not isinstance(value, str):
        return value
    for kind in (PurePosixPath, PureWindowsPath):
        path = kind(value)
        if path.is_absolute() and len(path.parts) > 2:
            return "…/" + "/".join(path.parts[-2:] if len(path.parts) > 3 else path.parts[-1:])
    return value

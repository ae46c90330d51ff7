"""The rows of a run's log, read as they are appended, and cut back to a step when a run goes on from there."""

from __future__ import annotations

import csv
import io
import math
from array import array
from collections.abc import Sequence
from pathlib import Path

import numpy

from library.atomic import write_atomic

_TEXTLESS = math.nan  # an empty or unreadable cell


class Rows:
    """The columns of ``{name}_log.csv``. ``read`` takes in what was appended since the last time; a file that was begun anew (a
    new header, or shorter than before) is read from its start."""

    def __init__(self, path: Path):
        self.path = path
        self._forget()

    def _forget(self) -> None:
        self._position, self._header = 0, b""
        self._columns: dict[str, array] = {}

    def read(self) -> None:
        """A last line that is not finished yet waits for the next call. A file that is not there has no rows."""
        try:
            with open(self.path, "rb") as file:
                if self._header and file.read(len(self._header)) != self._header or file.seek(0, 2) < self._position:
                    self._forget()
                file.seek(self._position)
                data = file.read()
        except OSError:
            return
        data = data[:data.rfind(b"\n") + 1]
        if not data:
            return
        self._position += len(data)
        if not self._header:
            self._header, _, data = data.partition(b"\n")
            self._header += b"\n"
            self._columns = {name: array("d") for name in next(csv.reader([self._header.decode("utf-8")]))}
        for cells in csv.reader(io.StringIO(data.decode("utf-8", "replace"), newline="")):
            for index, column in enumerate(self._columns.values()):
                column.append(_number(cells[index]) if index < len(cells) else _TEXTLESS)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._columns)

    def __len__(self) -> int:
        return len(self._columns["step"]) if "step" in self._columns else 0

    def column(self, name: str) -> numpy.ndarray:
        """(N,) float64, NaN where there is no number; empty for a column that the log does not have."""
        return numpy.array(self._columns.get(name, ()), dtype=numpy.float64)

    def points(self, name: str) -> tuple[numpy.ndarray, numpy.ndarray]:
        """(steps, values) wherever the column holds a finite number."""
        values = self.column(name)
        here = numpy.isfinite(values)
        return self.column("step")[here], values[here]


def keep_rows(path: Path, last_step: int, fields: Sequence[str]) -> int:
    """Before a resumed run appends to its log: keep the rows of steps up to ``last_step``, under the header ``fields``.

    Steps that were done after the state was saved are done again, so their rows go; so does a line cut short by a kill. Returns
    how many rows there are. Without a file it is begun. OSError and UserError where it cannot be written.
    """
    rows: dict[int, dict[str, str]] = {}
    if path.exists():
        with open(path, encoding="utf-8", errors="replace", newline="") as file:
            for row in csv.DictReader(file):
                step = _number(row.get("step") or "")
                whole = None not in row.values() and None not in row
                if math.isfinite(step) and step <= last_step and whole:
                    rows[int(step)] = row
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fields, restval="", extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows[step] for step in sorted(rows))
    write_atomic(path, text.getvalue())
    return len(rows)


def last_value(path: Path, name: str) -> float | None:
    """The last number in column ``name`` of the log at ``path``; None where there is none."""
    rows = Rows(path)
    rows.read()
    _, values = rows.points(name)
    return float(values[-1]) if len(values) else None


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return _TEXTLESS

"""Curves of loss and learning rate as pictures, for people who would rather look than read."""

from __future__ import annotations

import csv
import io
import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from library.atomic import atomic_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLOURS = ("#1f4e79", "#c55a11", "#548235", "#7f6000", "#7030a0", "#808080")  # in order of the groups

def smooth(values: list[float], window: int) -> list[float]:
    """Mean over up to ``window`` values on either side of each: centred, so that the curve does not lag behind its points."""
    sums = [0.0, *itertools.accumulate(values)]
    result = []
    for index in range(len(values)):
        first, end = max(0, index - window), min(len(values), index + window + 1)
        result.append((sums[end] - sums[first]) / (end - first))
    return result


def write_loss_curve(csv_path: Path, png_path: Path, title: str = "") -> bool:
    """Draw the columns ``step`` and ``loss`` of ``csv_path``: every step thin, their running mean bold. Where the column
    ``validation_loss`` has values, they are joined points.

    Returns False and writes nothing when there is no finite loss yet.
    """
    with Path(csv_path).open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    points, held_out = (_finite(rows, name) for name in ("loss", "validation_loss"))
    if not points:
        return False
    from matplotlib.figure import Figure  # a second to import: only when a curve is drawn

    steps, losses = zip(*points)
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    axes.plot(steps, losses, color="#9db8d2", linewidth=0.8, label="each step")
    mean = smooth(list(losses), max(2, len(losses) // 50))
    axes.plot(steps, mean, color="#1f4e79", linewidth=2, label="running mean")
    if held_out:
        axes.plot(*zip(*held_out), color="#c55a11", linewidth=1.2, marker="o", markersize=3, label="held-out pictures")
    axes.set(xlabel="step", ylabel="loss", title=title)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    _write_png(figure, png_path)
    return True


def write_rate_curve(steps: Sequence[int], rates: Mapping[str, Sequence[float]], png_path: Path, title: str = "") -> None:
    """Draw the learning rate of each group (by name) over ``steps``, as ``optim.schedule.curve`` gives them. Groups whose
    curves are the same are one line, so that many groups at one rate stay readable."""
    from matplotlib.figure import Figure

    alike: dict[tuple[float, ...], list[str]] = {}
    for name, values in rates.items():
        assert len(values) == len(steps), f"{name}: {len(values)} values for {len(steps)} steps"
        alike.setdefault(tuple(values), []).append(name)
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    for (values, names), colour in zip(alike.items(), itertools.cycle(_COLOURS)):
        label = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        axes.plot(steps, values, color=colour, linewidth=2, label=label, marker="o" if len(steps) == 1 else None)
    axes.set(xlabel="step", ylabel="learning rate", title=title)
    axes.set_ylim(bottom=0)  # a constant rate would otherwise be drawn over its own rounding
    axes.grid(alpha=0.3)
    axes.ticklabel_format(axis="y", scilimits=(-3, 3))
    if len(rates) > 1:
        figure.legend(loc="outside lower center", ncols=3, frameon=False)  # curves go everywhere: no free corner inside
    _write_png(figure, png_path)


def _write_png(figure: Figure, png_path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    picture = io.BytesIO()
    FigureCanvasAgg(figure).print_png(picture)
    with atomic_file(png_path) as file:
        file.write(picture.getvalue())


def _finite(rows: list[dict[str, str]], column: str) -> list[tuple[int, float]]:
    """(step, value) wherever the column holds a finite number."""
    points = [(int(row["step"]), float(row[column])) for row in rows if row.get(column)]
    return [(step, value) for step, value in points if math.isfinite(value)]

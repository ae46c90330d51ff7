"""The loss curve as a picture, for people who would rather look than read."""

from __future__ import annotations

import csv
import io
import itertools
import math
from pathlib import Path

from library.atomic import atomic_file


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
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # a second to import: only when a curve is drawn
    from matplotlib.figure import Figure

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
    picture = io.BytesIO()
    FigureCanvasAgg(figure).print_png(picture)
    with atomic_file(png_path) as file:
        file.write(picture.getvalue())
    return True


def _finite(rows: list[dict[str, str]], column: str) -> list[tuple[int, float]]:
    """(step, value) wherever the column holds a finite number."""
    points = [(int(row["step"]), float(row[column])) for row in rows if row.get(column)]
    return [(step, value) for step, value in points if math.isfinite(value)]

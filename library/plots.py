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
    """Draw the columns ``step`` and ``loss`` of ``csv_path``: every step thin, their running mean bold.

    Returns False and writes nothing when there is no finite loss yet.
    """
    with Path(csv_path).open(encoding="utf-8", newline="") as file:
        points = [(int(row["step"]), float(row["loss"])) for row in csv.DictReader(file) if row.get("loss")]
    points = [(step, loss) for step, loss in points if math.isfinite(loss)]
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
    axes.set(xlabel="step", ylabel="loss", title=title)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    picture = io.BytesIO()
    FigureCanvasAgg(figure).print_png(picture)
    with atomic_file(png_path) as file:
        file.write(picture.getvalue())
    return True

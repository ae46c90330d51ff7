"""The loss curve as a picture, for people who would rather look than read."""

from __future__ import annotations

import csv
import io
import math
from pathlib import Path

from library.atomic import atomic_file


def smooth(values: list[float], weight: float) -> list[float]:
    """Exponential mean with the bias of its start removed (Kingma and Ba 2015, section 3)."""
    result, mean = [], 0.0
    for count, value in enumerate(values, 1):
        mean = weight * mean + (1 - weight) * value
        result.append(mean / (1 - weight**count))
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
    mean = smooth(list(losses), 1 - 1 / max(5, min(100, len(losses) // 20)))
    axes.plot(steps, mean, color="#1f4e79", linewidth=2, label="running mean")
    axes.set(xlabel="step", ylabel="loss", title=title)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    picture = io.BytesIO()
    FigureCanvasAgg(figure).print_png(picture)
    with atomic_file(png_path) as file:
        file.write(picture.getvalue())
    return True

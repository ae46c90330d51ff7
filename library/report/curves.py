"""From the columns of the log to the few hundred points that a page draws, and what can be said about them in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy

from library.report.rows import Rows

POINTS = 600  # of a curve; of a longer log each point stands for several steps
RISE = 0.02  # of the loss on held-out pictures over its lowest value, from where it is worth a word
LATER = 3  # of the latest measurements have to be that much higher


def charts(rows: Rows, planned: Mapping[str, tuple[Sequence[int], Sequence[float]]] | None = None) -> list[dict[str, Any]]:
    """What the page's script draws: charts of series, each with points ``x`` (steps) and ``y``, and ``lo`` and ``hi`` where a
    point is the mean of several steps. ``role``: raw (smoothed by the script), line, marks, or
    plan. ``planned``: the whole course of learning rates, name of the group -> (steps, rates).
    """
    held_out = [_series(rows, name, _held_out_title(name), "marks") for name in rows.names if name.startswith("validation_loss")]
    rates = [name for name in rows.names if name.startswith("lr/")] or ["learning_rate"]
    ahead = [{"title": f"{name.replace('_', ' ')}, planned", "role": "plan", "x": list(steps), "y": _short(numpy.array(values))}
             for name, (steps, values) in (planned or {}).items()]
    found = [
        _chart("loss", "Loss", "", [_series(rows, "loss", "each step", "raw"), *held_out], wide=True, fitted=True),
        _chart("rate", "Learning rate", "", [_series(rows, name, name.removeprefix("lr/").replace("_", " "), "line")
                                             for name in rates], ahead=ahead),
        _chart("norm", "Gradient norm before clipping", "", [_series(rows, "grad_norm", "each step", "raw")], fitted=True),
        _chart("speed", "Speed", "images/s", [_series(rows, "images_per_second", "images/s", "raw")], fitted=True, zero=True),
        _chart("wait", "Waiting for pictures", "%", [_series(rows, "data_wait", "share of a step", "raw", 100)],
               zero=True),
        _chart("mfu", "Use of the card's arithmetic", "%", [_series(rows, "mfu", "of its peak", "raw", 100)], zero=True),
        _chart("memory", "Most memory in use", "GiB", [_series(rows, "peak_bytes", "peak", "line", 2**-30)], zero=True),
    ]
    return [chart for chart in found if chart["series"] or chart["ahead"]]


def _held_out_title(name: str) -> str:
    rest = name.removeprefix("validation_loss").strip("/_ ").replace("_", " ")
    return f"held-out pictures, {rest}" if rest else "held-out pictures"


def _chart(key: str, title: str, unit: str, series: list[dict[str, Any] | None], *, wide: bool = False, fitted: bool = False,
           zero: bool = False, ahead: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
    """``fitted``: the axis is fitted to the bulk of the points, outliers are cut off; ``zero``: it begins at 0. ``ahead``: series
    that go on to where the run will end, drawn under those of the same place in the list."""
    return {"key": key, "title": title, "unit": unit, "series": [each for each in series if each], "wide": wide,
            "fitted": fitted, "zero": zero, "ahead": list(ahead)}


def _series(rows: Rows, column: str, title: str, role: str, scale: float = 1.0) -> dict[str, Any] | None:
    steps, values = rows.points(column)
    if not len(steps):
        return None
    thinned = thin(steps, values * scale)
    return {"title": title, "role": role, "x": [int(step) for step in thinned.steps], "y": _short(thinned.mean),
            **({"lo": _short(thinned.low), "hi": _short(thinned.high)} if len(steps) > len(thinned.steps) else {})}


@dataclass(frozen=True)
class Thinned:
    """Equal lengths; where nothing had to be thinned, low, mean and high are the values themselves."""

    steps: numpy.ndarray
    mean: numpy.ndarray
    low: numpy.ndarray
    high: numpy.ndarray


def thin(steps: numpy.ndarray, values: numpy.ndarray, most: int = POINTS) -> Thinned:
    """(N,) and (N,) -> at most ``most`` points, each for a stretch of neighbours; its step is the last of the stretch, so that a
    curve ends where the training stands."""
    if len(steps) <= most:
        return Thinned(steps, values, values, values)
    starts = numpy.linspace(0, len(steps), most + 1).astype(numpy.int64)[:-1]
    ends = numpy.append(starts[1:], len(steps))
    mean = numpy.add.reduceat(values, starts) / (ends - starts)
    return Thinned(steps[ends - 1], mean, numpy.minimum.reduceat(values, starts), numpy.maximum.reduceat(values, starts))


def _short(values: numpy.ndarray) -> list[float]:
    return [float(f"{value:.5g}") for value in values.tolist()]


@dataclass(frozen=True)
class Standing:
    """Where the training is. Numbers are None where the log does not tell them."""

    step: int
    epoch: int
    samples: int
    seconds: float  # in steps, over all runs of this log
    loss: float | None  # mean over the last steps
    images_per_second: float | None
    seconds_per_step: float | None
    peak_bytes: float | None
    best_step: int | None  # of the lowest loss on held-out pictures
    best_loss: float | None
    latest_held_out: float | None
    turned: bool  # it has been rising since


def standing(rows: Rows) -> Standing:
    step, epoch, seconds, speed = (rows.column(name) for name in ("step", "epoch", "seconds", "images_per_second"))
    known = numpy.isfinite(seconds) & numpy.isfinite(speed) if len(seconds) == len(speed) else numpy.zeros(0, dtype=bool)
    held_steps, held = rows.points("validation_loss")
    best = int(held.argmin()) if len(held) else None
    turned = turned_after(held.tolist()) is not None
    return Standing(
        int(_last(step) or 0), int(_last(epoch) or 0), round(float((seconds[known] * speed[known]).sum())) if len(known) else 0,
        float(numpy.nansum(seconds)) if len(seconds) else 0.0, _recent(rows.points("loss")[1]),
        _recent(rows.points("images_per_second")[1]), _recent(rows.points("seconds")[1]), _last(rows.points("peak_bytes")[1]),
        int(held_steps[best]) if best is not None else None, float(held[best]) if best is not None else None,
        _last(held), turned)


def turned_after(losses: Sequence[float]) -> int | None:
    """Which of the measured losses on held-out pictures was the lowest, when all of the latest are clearly higher; else None."""
    if not losses:
        return None
    best = min(range(len(losses)), key=losses.__getitem__)
    rising = len(losses) - 1 - best >= LATER and all(loss > losses[best] * (1 + RISE) for loss in losses[-LATER:])
    return best if rising else None


def _last(values: numpy.ndarray) -> float | None:
    return float(values[-1]) if len(values) and numpy.isfinite(values[-1]) else None


def _recent(values: numpy.ndarray) -> float | None:
    """The mean over the last fiftieth of the run, and 20 steps at least."""
    return float(values[-max(20, len(values) // 50):].mean()) if len(values) else None


def facts_of(standing: Standing, total_steps: int) -> Mapping[str, str]:
    """Tiles: name -> value."""
    left = None if standing.seconds_per_step is None else (total_steps - standing.step) * standing.seconds_per_step
    lowest = f"lowest held-out loss (step {standing.best_step:,})" if standing.best_step is not None else ""
    told = {
        f"of {total_steps:,} steps": f"{standing.step:,}",
        "epoch": f"{standing.epoch:,}" if standing.epoch else None,
        "showings of pictures": f"{standing.samples:,}" if standing.samples else None,
        "loss, mean of the last steps": _number(standing.loss),
        lowest: _number(standing.best_loss),
        "images a second": _number(standing.images_per_second, 3),
        "seconds a step": _number(standing.seconds_per_step, 3),
        "GiB of memory at most": _number(None if standing.peak_bytes is None else standing.peak_bytes / 2**30, 3),
        "spent in steps": duration(standing.seconds) if standing.seconds else None,
        "left at this speed": duration(left) if left else None,
    }
    return {name: value for name, value in told.items() if value is not None}


def _number(value: float | None, digits: int = 4) -> str | None:
    return None if value is None else f"{value:,.{digits}g}" if abs(value) < 1000 else f"{value:,.0f}"


def duration(seconds: float) -> str:
    """Two figures of it."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours // 24} d {hours % 24} h" if hours >= 48 else f"{hours} h {minutes:02d}" if hours else f"{minutes} min"

"""The numbers of a step that go into the log, the CSV and the trackers, under the names they have there."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

import torch

from library.report.curves import turned_after

if TYPE_CHECKING:
    from library.loop import StepReport

# Name in the CSV -> name in the trackers. Learning rates of groups are "lr/<group>" there.
NAMES = {"loss": "loss/step", "mean_loss": "loss/average", "validation_loss": "loss/validation", "grad_norm": "loss/grad_norm",
         "learning_rate": "lr", "seconds": "speed/seconds_per_step", "images_per_second": "speed/images_per_second",
         "data_wait": "speed/data_wait_share", "mfu": "speed/mfu", "peak_bytes": "memory/peak_bytes"}

# Dense matrix products in bf16 or fp16 with float32 sums, 1e12 operations per second: from the maker's data sheets and, for
# GeForce, its papers on Ampere, Ada and Blackwell. The first name that is part of the device's own name counts.
PEAKS = (
    ("B200", 2250), ("H100 PCIe", 756), ("H100 NVL", 835), ("H100", 989), ("H200 NVL", 835), ("H200", 989), ("A100", 312),
    ("A800", 312), ("L40S", 362), ("L40", 181), ("L4", 121), ("RTX 6000 Ada", 364), ("RTX A6000", 155), ("A40", 150),
    ("A10", 125), ("RTX 5090", 209.5), ("RTX 5080", 112.6), ("RTX 4090 D", 147), ("RTX 4090", 165.2), ("RTX 4080 SUPER", 104.4),
    ("RTX 4080", 97.5), ("RTX 3090 Ti", 80), ("RTX 3090", 71), ("RTX 3080 Ti", 68), ("RTX 3080", 59.5),
)


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Floating-point operations per second that ``device`` can do in products of ``dtype``; None where that is not known."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return None
    return known_peak(torch.cuda.get_device_name(device))


def known_peak(name: str) -> float | None:
    """The same by the name of the device, e.g. ``NVIDIA H100 80GB HBM3``."""
    words = f" {name} ".replace("-", " ")
    if " Laptop " in words or " Max Q " in words:
        return None  # the same number on another chip
    return next((peak * 1e12 for part, peak in PEAKS if f" {part} " in words), None)


class Measures:
    """Makes the numbers of each step. ``rates(step)``: the learning rate of each group in step number ``step`` (from 1).

    ``step_flops(report)``: floating-point operations of a step over all devices, forward and backward, without what is
    computed twice; ``peak``: of all devices together. Without one of them there is no ``mfu``. ``mean_loss``: where a run that
    goes on had come to.
    """

    def __init__(self, rates: Callable[[int], Mapping[str, float]],
                 step_flops: Callable[[StepReport], float | None] | None = None, peak: float | None = None,
                 mean_loss: float | None = None):
        self.rates, self.step_flops, self.peak = rates, step_flops, peak
        self.mean_loss = mean_loss

    @property
    def known_mean(self) -> float | None:
        """The running mean, where it is a number."""
        return self.mean_loss if self.mean_loss is not None and math.isfinite(self.mean_loss) else None

    def of(self, report: StepReport) -> dict[str, float]:
        """By the names of the CSV; rates of groups as ``lr/<group>``. ``mean_loss`` is a running mean over some twenty steps.
        A step that was left out has no loss."""
        left_out = report.update.left_out
        if self.mean_loss is None or math.isnan(self.mean_loss):
            self.mean_loss = report.loss
        elif not left_out:
            self.mean_loss = 0.95 * self.mean_loss + 0.05 * report.loss
        values = {"loss": report.loss, "mean_loss": self.mean_loss, "learning_rate": report.update.learning_rate,
                  "grad_norm": report.update.grad_norm, "seconds": report.seconds,
                  "images_per_second": report.samples / report.seconds, "data_wait": report.waited / report.seconds,
                  "peak_bytes": report.peak_bytes}
        if left_out:
            del values["loss"], values["grad_norm"]
        if self.step_flops is not None and self.peak and (flops := self.step_flops(report)) is not None:
            values["mfu"] = flops / report.seconds / self.peak
        return values | {f"lr/{name}": rate for name, rate in self.rates(report.step).items()}


def for_trackers(values: Mapping[str, float]) -> dict[str, float]:
    """The same under the trackers' names; the rate of the first group is there by its group's name."""
    return {NAMES.get(name, name).replace("validation_loss", NAMES["validation_loss"]): value
            for name, value in values.items() if name != "learning_rate"}


class HeldOut:
    """The course of the loss on held-out pictures, and a word when it turns. ``points``: (step, loss) of before a resume."""

    def __init__(self, points: Iterable[tuple[int, float]] = ()):
        self.points = list(points)
        best = turned_after([loss for _, loss in self.points])
        self.told = None if best is None else self.points[best][0]

    def add(self, step: int, loss: float) -> str | None:
        """Take in a measurement. What there is to say now; once for each lowest value."""
        self.points.append((step, loss))
        best = turned_after([value for _, value in self.points])
        if best is None or self.points[best][0] == self.told:
            return None
        self.told, lowest = self.points[best]
        return (f"the loss on the held-out pictures was lowest after step {self.told} ({lowest:.5f}) and is {loss:.5f} now: the "
                "model learns its pictures by heart; the files saved about then are likely the better ones. More pictures, fewer "
                "steps or a lower --learning_rate move that point")

"""Flags of the loss: how the difference between a prediction and its target is measured."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from library.config.check import Problem, conflict
from library.config.schema import flag

if TYPE_CHECKING:
    from library.config.parse import Config

_ROUNDED = ("huber", "smooth_l1")


@dataclass(frozen=True)
class LossOptions:
    """``huber_*`` act on the two losses that are quadratic near zero and linear far from it."""

    title: ClassVar[str] = "Loss"

    loss_type: str = flag("l2", "squared error (l2), absolute error (l1), or squared near zero and absolute far from it",
                          choices=("l2", "l1", "huber", "smooth_l1"))
    huber_schedule: str = flag("snr", "how the width of the squared part depends on the noise level: by the signal-to-noise "
                               "ratio, falling exponentially with noise, or not at all",
                               choices=("snr", "exponential", "constant"))
    huber_c: float = flag(0.1, "width of the squared part at the noisiest level, or at all with the constant schedule",
                          above=0)
    huber_scale: float = flag(1.0, "factor on that width (not with the snr schedule)", above=0)

    @property
    def rounded(self) -> bool:
        """Whether the loss has a squared part, so that ``huber_*`` act."""
        return self.loss_type in _ROUNDED

    def problems(self, config: Config) -> Iterator[Problem]:
        """Settings that would change nothing. A schedule alone asks for nothing: other programs write it into every file."""
        changed = config.changed()
        for name in ("huber_c", "huber_scale"):
            if name in changed and not self.rounded:
                yield conflict(config, f"{name} loss_type", f"has no effect with --loss_type {self.loss_type}",
                               "leave it out, or use --loss_type huber or smooth_l1")
        if "huber_scale" in changed and self.rounded and self.huber_schedule == "snr":
            yield conflict(config, "huber_scale huber_schedule", "has no effect with --huber_schedule snr",
                           "leave it out, or use another --huber_schedule")

"""Learning-rate schedules as pure functions of the step: nothing to store, so a resumed run follows the same curve."""

from __future__ import annotations

import math
from dataclasses import dataclass

from library.errors import UserError, nearest

_DECAYS = {
    "constant": lambda progress: 1.0,
    "constant_with_warmup": lambda progress: 1.0,
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
    "linear": lambda progress: 1 - progress,
}
NAMES = tuple(_DECAYS)


def multiplier(name: str, step: int, total_steps: int, warmup_steps: int) -> float:
    """Factor on the learning rate for the update number ``step`` (counted from 0) of ``total_steps``.

    Warm-up rises linearly and reaches 1 with the last of its steps; no update is made at 0 (the usual libraries start at 0
    and so waste the first one). Then the factor falls from 1 towards 0, which it would reach at ``total_steps``.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return _DECAYS[name](min(1.0, progress))


def resolve_warmup(value: str | int | float | None, total_steps: int) -> int:
    """Steps of warm-up: a whole number, a ratio below 1 (``0.05``) or a percentage (``5%``) of ``total_steps``.

    Raises UserError for anything else and for a warm-up longer than the run.
    """
    if value is None or value == "":
        return 0
    text = str(value).strip()
    ratio = text.endswith("%")
    try:
        number = float(text.removesuffix("%"))
    except ValueError:
        number = math.nan
    if ratio:
        number /= 100
    if not 0 <= number < math.inf or (ratio and number > 1) or (not ratio and number >= 1 and number != int(number)):
        raise UserError(f"{text!r} is not a length of warm-up", place="--lr_warmup_steps",
                        remedy="give a whole number of steps, a ratio below 1 such as 0.05, or a percentage such as 5%")
    steps = round(number * total_steps) if ratio or number < 1 else int(number)
    if steps > total_steps:
        raise UserError(f"{steps} steps of warm-up are more than the {total_steps} steps of the run", place="--lr_warmup_steps",
                        remedy="lower --lr_warmup_steps or raise --max_train_steps")
    return steps


@dataclass(frozen=True)
class Schedule:
    """A schedule chosen by name. Raises UserError for an unknown name, and for ``constant`` with a warm-up."""

    name: str
    warmup_steps: int = 0

    def __post_init__(self):
        if self.name not in _DECAYS:
            raise UserError(f"unknown schedule {self.name!r}", place="--lr_scheduler",
                            remedy=nearest(self.name, NAMES) or f"choose one of {', '.join(NAMES)}")
        if self.name == "constant" and self.warmup_steps:
            raise UserError(f"a constant learning rate has no warm-up ({self.warmup_steps} steps were asked for)",
                            place="--lr_warmup_steps", remedy="use --lr_scheduler constant_with_warmup or --lr_warmup_steps 0")

    def __call__(self, step: int, total_steps: int) -> float:
        return multiplier(self.name, step, total_steps, self.warmup_steps)

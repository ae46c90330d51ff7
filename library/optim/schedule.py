"""Learning-rate schedules as pure functions of the step: nothing to store, so a resumed run follows the same curve, and
nothing to count, so any number of processes does."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from library.errors import UserError, nearest

if TYPE_CHECKING:
    from library.config.schema import OptimizerOptions
    from library.optim.groups import Group


class Curve(Protocol):
    """Factor on the learning rate of every group for update ``step`` (from 0) of ``total_steps``. May have ``rates(step,
    total_steps, base_rates)``, which then gives each group's learning rate instead."""

    def __call__(self, step: int, total_steps: int) -> float: ...


def learning_rates(curve: Curve, step: int, total_steps: int, base_rates: Sequence[float]) -> list[float]:
    """The learning rate of each group for update number ``step``; ``base_rates``: what the groups were given."""
    if hasattr(curve, "rates"):
        return list(curve.rates(step, total_steps, base_rates))
    factor = curve(step, total_steps)
    return [rate * factor for rate in base_rates]


def by_name(curve: Curve, groups: Sequence[Group], total_steps: int, step: int) -> dict[str, float]:
    """Name of each group -> its learning rate in step number ``step``, counted from 1."""
    rates = learning_rates(curve, step - 1, total_steps, [group.learning_rate for group in groups])
    return {group.name: rate for group, rate in zip(groups, rates, strict=True)}


@dataclass(frozen=True)
class Shape:
    """What some schedules need besides their name; the rest ignore it.

    ``cycles``: waves, or restarts. ``power``: of ``polynomial``. ``timescale``: steps in which ``inverse_sqrt`` falls to 0.71
    (None: the warm-up, or 10,000). ``lowest``: where the falling ones end. ``decay_steps``: the end of ``warmup_stable_decay``.
    ``rules``: (factor, first step it no longer holds for) of ``piecewise_constant``, the last one open.
    """

    cycles: int = 1
    power: float = 1.0
    timescale: int | None = None
    lowest: float = 0.0
    decay_steps: int = 0
    rules: tuple[tuple[float, float], ...] = ()


@dataclass(frozen=True)
class Now:
    """Where a run stands. ``progress``: of what follows the warm-up, from 0 to 1."""

    step: int
    total_steps: int
    warmup_steps: int

    @property
    def progress(self) -> float:
        return min(1.0, (self.step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps))


def _cosine(progress: float, waves: float = 1.0) -> float:
    """From 1 to 0 in half a wave."""
    return 0.5 * (1 + math.cos(math.pi * waves * progress))


def _above(lowest: float, factor: float) -> float:
    return lowest + (1 - lowest) * factor


def _restarts(now: Now, shape: Shape) -> float:
    return _cosine((shape.cycles * now.progress) % 1) if now.progress < 1 else 0.0


def _stable_decay(now: Now, shape: Shape) -> float:
    steps = now.total_steps - shape.decay_steps  # of warm-up and of the plateau
    progress = min(1.0, max(0, now.step - steps) / max(1, shape.decay_steps))
    return _above(shape.lowest, _cosine(progress, shape.cycles)) if progress < 1 else shape.lowest


def _inverse_sqrt(now: Now, shape: Shape) -> float:
    timescale = shape.timescale or now.warmup_steps or 10_000
    return 1 / math.sqrt((now.step - now.warmup_steps + timescale) / timescale)


def _piecewise(now: Now, shape: Shape) -> float:
    return next(factor for factor, end in shape.rules if now.step < end)


_CURVES: dict[str, Callable[[Now, Shape], float]] = {
    "constant": lambda now, shape: 1.0,
    "constant_with_warmup": lambda now, shape: 1.0,
    "linear": lambda now, shape: 1 - now.progress,
    "cosine": lambda now, shape: _cosine(now.progress),
    "cosine_with_restarts": _restarts,
    "cosine_with_min_lr": lambda now, shape: _above(shape.lowest, _cosine(now.progress, shape.cycles)),
    "polynomial": lambda now, shape: _above(shape.lowest, (1 - now.progress) ** shape.power),
    "inverse_sqrt": _inverse_sqrt,
    "warmup_stable_decay": _stable_decay,
    "piecewise_constant": _piecewise,
    # Adafactor's own rate (Shazeer & Stern 2018, section 9), an absolute one: with --learning_rate 1 it is theirs.
    "adafactor": lambda now, shape: min(1e-2, 1 / math.sqrt(now.step + 1)),
}
NAMES = tuple(_CURVES)
UNWARMED = ("constant", "piecewise_constant")


def multiplier(name: str, step: int, total_steps: int, warmup_steps: int, shape: Shape = Shape()) -> float:
    """Factor on the learning rate for the update number ``step`` (counted from 0) of ``total_steps``.

    Warm-up rises linearly and reaches the curve with the last of its steps; no update is made at 0 (the usual libraries start
    at 0 and so waste the first one). Then the factor follows the curve, which would reach its end at ``total_steps``.
    """
    factor = _CURVES[name](Now(max(step, warmup_steps), total_steps, warmup_steps), shape)
    return factor * (step + 1) / warmup_steps if step < warmup_steps else factor


def resolve_warmup(value: str | int | float | None, total_steps: int) -> int:
    """Steps of warm-up: a whole number, a ratio below 1 (``0.05``) or a percentage (``5%``) of ``total_steps``.

    Raises UserError for anything else and for a warm-up longer than the run.
    """
    return resolve_steps(value, total_steps, "--lr_warmup_steps", "warm-up")


def resolve_steps(value: str | int | float | None, total_steps: int, place: str, what: str) -> int:
    """The same for any part of the run."""
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
        raise UserError(f"{text!r} is not a length of {what}", place=place,
                        remedy="give a whole number of steps, a ratio below 1 such as 0.05, or a percentage such as 5%")
    steps = round(number * total_steps) if ratio or number < 1 else int(number)
    if steps > total_steps:
        raise UserError(f"{steps} steps of {what} are more than the {total_steps} steps of the run", place=place,
                        remedy=f"lower {place} or raise --max_train_steps")
    return steps


def read_rules(text: str) -> tuple[tuple[float, float], ...]:
    """``1:100,0.1:200,0.01``: factor 1 before step 100, 0.1 before step 200, 0.01 from there on. UserError otherwise."""
    place, remedy = "--lr_scheduler_args", "write for example step_rules=1:100,0.1:200,0.01"
    *bounded, last = text.split(",")
    try:
        rules = [(float(factor), float(int(end))) for factor, end in (part.split(":") for part in bounded)]
        rules.append((float(last), math.inf))
    except ValueError:
        raise UserError(f"{text!r} are not step_rules", place=place, remedy=remedy) from None
    ends = [end for _, end in rules]
    if ends != sorted(set(ends)) or ends[0] <= 0 or any(not 0 <= factor < math.inf for factor, _ in rules):
        raise UserError(f"the steps of step_rules have to rise, and its factors to be 0 or more ({text})", place=place,
                        remedy=remedy)
    return tuple(rules)


@dataclass(frozen=True)
class Schedule:
    """A schedule chosen by name. Raises UserError for an unknown name, a warm-up that it has not, and missing rules."""

    name: str
    warmup_steps: int = 0
    shape: Shape = Shape()

    def __post_init__(self):
        if self.name not in _CURVES:
            raise UserError(f"unknown schedule {self.name!r}", place="--lr_scheduler",
                            remedy=nearest(self.name, NAMES) or f"choose one of {', '.join(NAMES)}")
        if self.name in UNWARMED and self.warmup_steps:
            kind = self.name.replace("_", " ")
            raise UserError(f"a {kind} learning rate has no warm-up ({self.warmup_steps} steps were asked for)",
                            place="--lr_warmup_steps", remedy="use --lr_scheduler constant_with_warmup or --lr_warmup_steps 0")
        if self.name == "piecewise_constant" and not self.shape.rules:
            raise UserError("piecewise_constant needs its steps", place="--lr_scheduler_args",
                            remedy="write for example step_rules=1:100,0.1:200,0.01")

    def __call__(self, step: int, total_steps: int) -> float:
        return multiplier(self.name, step, total_steps, self.warmup_steps, self.shape)


def from_options(options: OptimizerOptions, total_steps: int) -> Curve:
    """The schedule of a run of ``total_steps``. Raises every UserError about it; a class is tried out for one step."""
    if options.lr_scheduler_type:
        from library.optim.class_schedule import ClassSchedule
        return ClassSchedule(options.lr_scheduler_type, options.lr_scheduler_args, total_steps, options.learning_rate)
    warmup = resolve_warmup(options.lr_warmup_steps, total_steps)
    decay = resolve_steps(options.lr_decay_steps, total_steps, "--lr_decay_steps", "decay")
    if options.lr_scheduler == "warmup_stable_decay" and warmup + decay > total_steps:
        raise UserError(f"{warmup} steps of warm-up and {decay} of decay are more than the {total_steps} of the run",
                        place="--lr_decay_steps", remedy=f"give at most {total_steps - warmup}")
    shape = Shape(options.lr_scheduler_num_cycles, options.lr_scheduler_power, options.lr_scheduler_timescale,
                  options.lr_scheduler_min_lr_ratio or 0.0, decay, _rules_of(options))
    return Schedule(options.lr_scheduler, warmup, shape)


def _rules_of(options: OptimizerOptions) -> tuple[tuple[float, float], ...]:
    rules: tuple[tuple[float, float], ...] = ()
    for arg in options.lr_scheduler_args:
        key, _, text = arg.partition("=")
        if key.strip() != "step_rules" or options.lr_scheduler != "piecewise_constant":
            raise UserError(f"--lr_scheduler {options.lr_scheduler} takes no {key.strip()!r}", place="--lr_scheduler_args",
                            remedy="use --lr_scheduler_num_cycles and the like, or name a class with --lr_scheduler_type")
        rules = read_rules(text.strip().strip("'\""))
    return rules


def curve(rates: Curve, total_steps: int, base_rates: Sequence[float], points: int = 1000) -> tuple[list[int], list[list[float]]]:
    """Steps (from 1, at most about ``points`` of them, the first and the last always) and each group's learning rates there."""
    steps = sorted({*range(0, total_steps, max(1, total_steps // points)), total_steps - 1})
    values = [learning_rates(rates, step, total_steps, base_rates) for step in steps]
    return [step + 1 for step in steps], [list(group) for group in zip(*values, strict=True)]

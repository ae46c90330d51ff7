"""A learning-rate scheduler class of torch, or any other one, as a function of the step.

Such classes count for themselves and write into an optimizer. Here they write into one that holds no weights, are driven step
by step once, and what they wrote is remembered: the schedule can be asked for any step in any order, a resumed run replays it
in a moment, and every process sees the same numbers.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch

from library.errors import UserError, nearest
from library.optim import arguments

_PLACE, _ARGS_PLACE = "--lr_scheduler_type", "--lr_scheduler_args"
_RESERVED = {"optimizer": "it is filled in", "last_epoch": "a resumed run goes on by itself"}
_LENGTHS = ("total_steps", "num_training_steps", "T_max")  # names under which classes ask for the length of the run


class _Rates(torch.optim.Optimizer):
    """Learning rates without weights. It has no momentum, so that a scheduler that would change it too is refused by torch."""

    def __init__(self, rates: Sequence[float]):
        super().__init__([{"params": [torch.zeros(1)], "lr": rate} for rate in rates], {"lr": 0.0})

    def step(self, closure=None):
        pass


class ClassSchedule:
    """The scheduler ``name``, a class of torch.optim.lr_scheduler or a dotted path, with ``args`` (``key=value``).

    An argument for the length of the run is filled in with ``total_steps``; ``cycle_momentum`` is off. Raises UserError for what
    cannot be found or called, and for a scheduler that wants to see the loss.
    """

    def __init__(self, name: str, args: Sequence[str], total_steps: int, learning_rate: float):
        self._name, self._args, self._total_steps = name, tuple(args), total_steps
        self._base = learning_rate
        self._factory = _find(name)
        self._given = self._arguments()
        self._values: dict[tuple[float, ...], tuple[Any, _Rates, list[list[float]]]] = {}
        self.rates(min(1, total_steps - 1), total_steps, [learning_rate])  # so that it fails now

    def __call__(self, step: int, total_steps: int) -> float:
        """The factor on ``--learning_rate``; of several groups with rates of their own use ``rates``."""
        return self.rates(step, total_steps, [self._base])[0] / self._base if self._base else 1.0

    def rates(self, step: int, total_steps: int, base_rates: Sequence[float]) -> list[float]:
        """Learning rate of each group for update number ``step``."""
        assert total_steps == self._total_steps, "made for a run of another length"
        key = tuple(base_rates)
        if key not in self._values:
            optimizer = _Rates(key)
            self._values[key] = (self._call(lambda: self._factory(optimizer, **self._given)), optimizer, [_read(optimizer)])
        scheduler, optimizer, values = self._values[key]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about steps beyond the end and calls out of order, which are ours
            while len(values) <= step:
                optimizer.step()
                self._call(scheduler.step)
                values.append(_read(optimizer))
        return values[step]

    def _arguments(self) -> dict[str, Any]:
        given = arguments.read(self._args, self._factory, owner=self._name, place=_ARGS_PLACE, reserved=_RESERVED,
                               refused={"cycle_momentum": "only learning rates are scheduled"})
        known, _ = arguments.parameters(self._factory)
        lengths = {key: self._total_steps for key in _LENGTHS if key in known}
        if "epochs" in given or "steps_per_epoch" in given:
            lengths.pop("total_steps", None)
        return lengths | ({"cycle_momentum": False} if "cycle_momentum" in known else {}) | given

    def _call(self, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except Exception as error:
            if "metrics" in str(error):
                raise UserError(f"{self._name} follows the loss, which makes a run depend on its own noise and cannot be "
                                "replayed", place=_PLACE, remedy="use a schedule that follows the step") from error
            raise UserError(f"{self._name} refuses its arguments ({' '.join(self._args)}): {error}", place=_ARGS_PLACE,
                            remedy="correct or remove them") from error


def _read(optimizer: torch.optim.Optimizer) -> list[float]:
    return [float(group["lr"]) for group in optimizer.param_groups]


def _find(name: str) -> Callable:
    module, _, attribute = name.rpartition(".")
    try:
        home = importlib.import_module(module or "torch.optim.lr_scheduler")
    except ImportError as error:
        raise UserError(f"{name} cannot be imported: {error}", place=_PLACE,
                        remedy="install the package it is in, or check the spelling") from error
    found = getattr(home, attribute, None)
    if not callable(found):
        known = [one for one in dir(home) if one[0].isupper()]
        raise UserError(f"there is no {attribute!r} in {home.__name__}", place=_PLACE,
                        remedy=nearest(attribute, known) or "name a class by its dotted path, such as package.module.Class")
    return found

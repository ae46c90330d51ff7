"""What the two updaters have in common: an optimizer over named groups, its learning rates, its state, the weights to look at."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from library.errors import UserError
from library.optim import modes, table
from library.optim.groups import Group, named_parameters
from library.optim.rounding import StochasticRounding
from library.optim.schedule import Curve, by_name, learning_rates
from library.optim.state import Shared


class Updating:
    """An optimizer over ``groups`` at the learning rates of ``schedule``: a factor on each group's rate, or the rates themselves
    (``schedule.Curve``).

    With ``rounding``, ``optimizer`` was built over ``rounding.groups``; ``groups`` always hold the model's own parameters.
    ``optimizer`` has to be as ``table.build`` made it: what changes from then on is state.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, groups: Sequence[Group], schedule: Curve,
                 rounding: StochasticRounding | None = None):
        self._optimizer = optimizer
        self._groups = tuple(groups)
        self._schedule = schedule
        self._rounding = rounding
        self._parameters = named_parameters(groups)
        self._stepped = named_parameters(rounding.groups if rounding else groups)  # what the optimizer's state belongs to
        self._shared = Shared(optimizer, [group.name for group in groups])
        self._evaluating = False
        held = [[id(p) for p in group["params"]] for group in optimizer.param_groups]
        named = [[id(p) for _, p in group.params] for group in (rounding.groups if rounding else groups)]
        assert held == named, "the optimizer was built over other parameters than the updater's groups"

    def _set_learning_rates(self, step: int, total_steps: int) -> float:
        """Those of update number ``step`` (from 0); returns the first group's."""
        rates = learning_rates(self._schedule, step, total_steps, [group.learning_rate for group in self._groups])
        for rate, held in zip(rates, self._optimizer.param_groups, strict=True):
            held["lr"] = rate
        return rates[0]

    def _first_rate(self, step: int, total_steps: int) -> float:
        """What ``_set_learning_rates`` would return."""
        return learning_rates(self._schedule, step, total_steps, [group.learning_rate for group in self._groups])[0]

    def rates_at(self, total_steps: int, step: int) -> dict[str, float]:
        """By group: the learning rate in step number ``step``, from 1; times the step size that the optimizer has found itself by
        now (Prodigy, D-Adaptation)."""
        rates = by_name(self._schedule, self._groups, total_steps, step)
        return {name: rate * float(held.get("d", 1.0))
                for (name, rate), held in zip(rates.items(), self._optimizer.param_groups, strict=True)}

    @property
    def has_modes(self) -> bool:
        """Whether the weights to save, validate and draw with are others than those that train."""
        return table.has_modes(self._optimizer)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Around previews, validation and the saving of weights: a schedule-free optimizer delivers others than it trains at.

        Afterwards the weights are those of the training again, bit for bit. No step, and no ``state_dict``, inside. Does nothing
        for all other optimizers. Weights must be readable where it begins and where it ends.
        """
        if not self.has_modes or self._evaluating:
            yield
            return
        pairs = list(zip(self._parameters.values(), self._stepped.values(), strict=True))
        self._evaluating = True
        try:
            with modes.evaluating(self._optimizer, pairs, self._rounding):
                yield
        finally:
            self._evaluating = False

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """The optimizer's state by parameter name: {name: {key: tensor, number or tuple}}. Tensors are the live ones, not copies.

        Where the optimizer keeps numbers for a whole group or for all, there are entries ``group:NAME`` and ``optimizer:`` too.
        Learning rates and other settings are not part of it: they come from the configuration of the run that continues.
        """
        assert not self._evaluating, "the state belongs to the weights of the training: not inside evaluating()"
        own = {name: dict(self._optimizer.state.get(parameter, {})) for name, parameter in self._stepped.items()}
        return {**own, **self._shared.state_dict()}

    def load_state_dict(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Take over a state made by ``state_dict`` of either updater, bit for bit. UserError when it is of other parameters."""
        for _ in self._loading(state):
            pass

    def _loading(self, state: Mapping[str, Mapping[str, Any]]) -> Iterator[Tensor]:
        """One parameter after the other has its state in ``optimizer.state``; shared numbers come first.

        The optimizers' own load_state_dict is avoided: it matches parameters by position, and casts float state to the dtype of
        the weights, which for bfloat16 weights loses most of it.
        """
        shared = {name: values for name, values in state.items() if ":" in name}
        stray = sorted((state.keys() - shared.keys()) ^ self._stepped.keys())
        if stray:
            raise UserError(f"the saved optimizer state is of other weights ({len(stray)} names stand on one side only, such as "
                            f"{stray[0]!r})", remedy="resume with the model and the settings that the state was saved with")
        self._shared.load_state_dict(shared)
        places = {id(parameter): (gindex, pindex) for gindex, group in enumerate(self._optimizer.param_groups)
                  for pindex, parameter in enumerate(group["params"])}
        for name, parameter in self._stepped.items():
            self._optimizer.state.pop(parameter, None)
            if state[name]:  # optimizers take an absent entry, not an empty one, for a parameter that was never stepped
                self._take_over(state[name], parameter, *places[id(parameter)])
            yield parameter

    def _take_over(self, saved: Mapping[str, Any], parameter: Tensor, gindex: int, pindex: int) -> None:
        group = self._optimizer.param_groups[gindex]
        values = {key: _placed(key, value, parameter, group) for key, value in saved.items()}
        if getattr(self._optimizer, "is_paged", False):  # bitsandbytes: only memory that it allocates itself can be paged
            self._optimizer.init_state(group, parameter, gindex, pindex)
            for key in ("state1", "state2"):
                if key in values:
                    values[key] = self._optimizer.state[parameter][key].copy_(values[key])
        self._optimizer.state[parameter] = values


def _placed(key: str, value: Any, parameter: Tensor, settings: Mapping[str, Any]) -> Any:
    """A copy of ``value`` on the device where the optimizer expects it: torch's step counters stay on the CPU unless fused."""
    if not isinstance(value, Tensor):
        return value
    on_cpu = key == "step" and not (settings.get("fused") or settings.get("capturable"))
    return value.detach().clone().to("cpu" if on_cpu else parameter.device)

"""From gradients to new weights: unscale, clip, set the learning rate, step, clear."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_

from library.errors import UserError
from library.optim import modes, table
from library.optim.groups import Group, named_parameters
from library.optim.rounding import StochasticRounding
from library.optim.schedule import Curve, learning_rates
from library.optim.state import Shared

_SKIPS_UNTIL_ERROR = 40  # the scale of float16 gradients halves with every skip: after 40 it cannot be the scale


class NonFinite(UserError):
    """The training has diverged or its input is broken: a NaN or an infinity where a number is needed. No weight was touched."""


@dataclass(frozen=True)
class UpdateInfo:
    """``grad_norm`` before clipping (over all parameters), ``learning_rate`` of the first group; ``skipped``: float16
    gradients overflowed, the weights are unchanged and the scale was lowered (grad_norm is then not finite)."""

    grad_norm: float
    learning_rate: float
    skipped: bool = False


class StepAfterBackward:
    """The plain updater: after the last micro-batch of a step, one update of all parameters.

    ``schedule``: a factor on each group's learning rate, or the rates themselves (``schedule.Curve``).
    ``max_grad_norm`` 0 turns clipping off. With ``rounding``, ``optimizer`` was built over ``rounding.groups``; ``groups`` always
    hold the model's own parameters. ``optimizer`` has to be as ``table.build`` made it: what changes from then on is state.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, groups: Sequence[Group], schedule: Curve,
                 max_grad_norm: float, rounding: StochasticRounding | None = None):
        self._optimizer = optimizer
        self._groups = tuple(groups)
        self._schedule = schedule
        self._max_grad_norm = max_grad_norm
        self._rounding = rounding
        self._parameters = named_parameters(groups)
        self._stepped = named_parameters(rounding.groups if rounding else groups)  # what the optimizer's state belongs to
        self._skips_in_a_row = 0
        self._shared = Shared(optimizer, [group.name for group in groups])
        self._evaluating = False
        held = [[id(p) for p in group["params"]] for group in optimizer.param_groups]
        named = [[id(p) for _, p in group.params] for group in (rounding.groups if rounding else groups)]
        assert held == named, "the optimizer was built over other parameters than the updater's groups"

    def after_backward(self, step: int, total_steps: int, last_microbatch: bool,
                       scaler: torch.amp.GradScaler | None = None) -> UpdateInfo | None:
        """Update number ``step`` (counted from 0), or None while more micro-batches of it follow.

        Gradients are gone afterwards. ``scaler``: the gradients are of a loss that it scaled; it is updated here. The one wait
        for the device is for the gradient norm, needed before the step so that a NaN never reaches a weight.
        Raises NonFinite, with the weights as they were, naming the step (counted from 1, as shown to users) and the parameters.
        """
        assert not self._evaluating, "a step inside evaluating()"
        if not last_microbatch:
            return None
        if scaler is not None:
            assert self._rounding is None, "float16 gradient scaling and bfloat16 weights do not go together"
            scaler.unscale_(self._optimizer)
        trained = [parameter for parameter in self._parameters.values() if parameter.grad is not None]
        assert trained, "no gradient reached any trained parameter"
        norm_tensor = _norm([parameter.grad for parameter in trained])
        norm = norm_tensor.item()  # waits for the device
        skipped = not math.isfinite(norm)
        self._skips_in_a_row = self._skips_in_a_row + 1 if skipped else 0
        if skipped and (scaler is None or self._skips_in_a_row >= _SKIPS_UNTIL_ERROR):
            raise self._non_finite(norm, step)
        learning_rate = self._set_learning_rates(step, total_steps)
        if not skipped:
            if 0 < self._max_grad_norm < norm + 1e-6:  # 1e-6: as in clip_grad_norm_, of which this is the second half
                clip_grads_with_norm_(trained, self._max_grad_norm, norm_tensor)
            self._step(step)
        if scaler is not None:
            scaler.update()
        for parameter in self._parameters.values():
            parameter.grad = None
        return UpdateInfo(norm, learning_rate, skipped)

    def _step(self, step: int) -> None:
        if self._rounding is not None:
            self._rounding.step(self._optimizer, step)
        else:
            self._optimizer.step()

    def _set_learning_rates(self, step: int, total_steps: int) -> float:
        rates = learning_rates(self._schedule, step, total_steps, [group.learning_rate for group in self._groups])
        for rate, held in zip(rates, self._optimizer.param_groups, strict=True):
            held["lr"] = rate
        return rates[0]

    def learning_rates(self) -> dict[str, float]:
        """By group, as of the last step; times the step size that the optimizer found itself (Prodigy, D-Adaptation)."""
        return {group.name: held["lr"] * float(held.get("d", 1.0))
                for group, held in zip(self._groups, self._optimizer.param_groups, strict=True)}

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Around previews, validation and the saving of weights: a schedule-free optimizer delivers others than it trains at.

        Afterwards the weights are those of the training again, bit for bit. No step, and no ``state_dict``, inside. Does nothing
        for all other optimizers.
        """
        if not table.has_modes(self._optimizer) or self._evaluating:
            yield
            return
        pairs = list(zip(self._parameters.values(), self._stepped.values(), strict=True))
        self._evaluating = True
        try:
            with modes.evaluating(self._optimizer, pairs, self._rounding):
                yield
        finally:
            self._evaluating = False

    def _non_finite(self, norm: float, step: int) -> NonFinite:
        bad = [name for name, p in self._parameters.items() if p.grad is not None and not p.grad.isfinite().all()]
        where = f" (in {', '.join(bad[:3])}{f' and {len(bad) - 3} more' if len(bad) > 3 else ''})" if bad else ""
        return NonFinite(f"the gradient norm is {norm}{where}", place=f"step {step + 1}", remedy="the weights were not "
                         "touched; lower --learning_rate, use --mixed_precision bf16 instead of fp16, or look for broken "
                         "pictures in this step")

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """The optimizer's state by parameter name: {name: {key: tensor, number or tuple}}. Tensors are the live ones, not copies.

        Where the optimizer keeps numbers for a whole group or for all, there are entries ``group:NAME`` and ``optimizer:`` too.
        Learning rates and other settings are not part of it: they come from the configuration of the run that continues.
        """
        assert not self._evaluating, "the state belongs to the weights of the training: not inside evaluating()"
        own = {name: dict(self._optimizer.state.get(parameter, {})) for name, parameter in self._stepped.items()}
        return {**own, **self._shared.state_dict()}

    def load_state_dict(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Take over a state made by ``state_dict``, bit for bit. UserError when it is of other parameters.

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

    def _take_over(self, saved: Mapping[str, Any], parameter: Tensor, gindex: int, pindex: int) -> None:
        group = self._optimizer.param_groups[gindex]
        values = {key: _placed(key, value, parameter, group) for key, value in saved.items()}
        if getattr(self._optimizer, "is_paged", False):  # bitsandbytes: only memory that it allocates itself can be paged
            self._optimizer.init_state(group, parameter, gindex, pindex)
            for key in ("state1", "state2"):
                if key in values:
                    values[key] = self._optimizer.state[parameter][key].copy_(values[key])
        self._optimizer.state[parameter] = values


def _norm(gradients: Sequence[Tensor]) -> Tensor:
    """The norm over all of them, a float32 scalar: torch's own get_total_norm rounds it to the dtype of the gradients."""
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(list(gradients), 2, dtype=torch.float32)))


def _placed(key: str, value: Any, parameter: Tensor, settings: Mapping[str, Any]) -> Any:
    """A copy of ``value`` on the device where the optimizer expects it: torch's step counters stay on the CPU unless fused."""
    if not isinstance(value, Tensor):
        return value
    on_cpu = key == "step" and not (settings.get("fused") or settings.get("capturable"))
    return value.detach().clone().to("cpu" if on_cpu else parameter.device)

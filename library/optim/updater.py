"""From gradients to new weights: unscale, clip, set the learning rate, step, clear."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_

from library.errors import UserError
from library.optim.groups import Group
from library.optim.rounding import StochasticRounding
from library.optim.schedule import Curve
from library.optim.updating import Updating

_SKIPS_UNTIL_ERROR = 40  # the scale of float16 gradients halves with every skip: after 40 it cannot be the scale


class NonFinite(UserError):
    """The training has diverged or its input is broken: a NaN or an infinity where a number is needed."""

    weights_touched = False  # some weights were updated before it was seen
    hopeless = False  # leaving the step out would not help


@dataclass(frozen=True)
class UpdateInfo:
    """``grad_norm`` before clipping (over all parameters), ``learning_rate`` of the first group; ``skipped``: float16
    gradients overflowed, the weights are unchanged and the scale was lowered (grad_norm is then not finite). ``left_out``: no
    update was made, whatever the gradients were (see ``nan_policy``)."""

    grad_norm: float
    learning_rate: float
    skipped: bool = False
    left_out: bool = False


class StepAfterBackward(Updating):
    """The plain updater: after the last micro-batch of a step, one update of all parameters.

    ``max_grad_norm`` 0 turns clipping off. For the rest see ``Updating``.
    """

    inside_backward = False  # whether weights change before the backward pass is at its end

    def __init__(self, optimizer: torch.optim.Optimizer, groups: Sequence[Group], schedule: Curve,
                 max_grad_norm: float, rounding: StochasticRounding | None = None):
        super().__init__(optimizer, groups, schedule, rounding)
        self._max_grad_norm = max_grad_norm
        self._skips_in_a_row = 0

    def begin_microbatch(self, step: int, total_steps: int, last_microbatch: bool) -> None:
        """Before the forward pass of every micro-batch; means something to ``StepInBackward`` alone."""

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
        norm_tensor = total_norm([parameter.grad for parameter in trained])
        norm = norm_tensor.item()  # waits for the device
        skipped = not math.isfinite(norm)
        self._skips_in_a_row = self._skips_in_a_row + 1 if skipped else 0
        if skipped and (scaler is None or self._skips_in_a_row >= _SKIPS_UNTIL_ERROR):
            error = self._non_finite(norm, step)
            error.hopeless = scaler is not None
            raise error
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

    def leave_out(self, step: int, total_steps: int) -> UpdateInfo:
        """Update number ``step`` (counted from 0) is not made: whatever gradients there are, are given up."""
        for parameter in self._parameters.values():
            parameter.grad = None
        return UpdateInfo(math.nan, self._first_rate(step, total_steps), skipped=True, left_out=True)

    def _step(self, step: int) -> None:
        if self._rounding is not None:
            self._rounding.step(self._optimizer, step)
        else:
            self._optimizer.step()

    def _non_finite(self, norm: float, step: int) -> NonFinite:
        bad = [name for name, p in self._parameters.items() if p.grad is not None and not p.grad.isfinite().all()]
        return non_finite(norm, bad, step, "the weights were not touched")


def non_finite(norm: float, names: Sequence[str], step: int, consequence: str) -> NonFinite:
    """The error for a gradient norm that is not finite; ``names`` are the parameters to blame, ``step`` counts from 0."""
    where = f" (in {', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''})" if names else ""
    return NonFinite(f"the gradient norm is {norm}{where}", place=f"step {step + 1}", remedy=f"{consequence}; lower "
                     "--learning_rate, use --mixed_precision bf16 instead of fp16, or look for broken pictures in this step")


def total_norm(gradients: Sequence[Tensor]) -> Tensor:
    """The norm over all of them, a float32 scalar: torch's own get_total_norm rounds it to the dtype of the gradients."""
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(list(gradients), 2, dtype=torch.float32)))

"""What happens after a step whose loss or gradient is NaN or infinite: the run stops, leaves the step out, or goes back.

A step that is left out changes no weight, no optimizer state and no average; the schedule and the place in the data go on as
if it had been made, so noise, pictures and learning rate of every other step are what they would have been. ``skipped`` has the
numbers of all such steps and is part of every state. That keeps a run that is killed and goes on the same as one that is not:

- ``skip``: steps up to the state are in its weights, left out or not; a later NaN comes again as it came before.
- ``rollback``: the run goes back to its newest state and makes the steps from there again, without the one that failed. A run
  that is killed after that goes on either from an older state, finds the same NaN, and goes back to the same state; or from one
  that was written on the way again, which has the failed step among its ``skipped`` ones, although it is yet to come.

So both limits below are counted from ``skipped`` alone. The same holds under another policy after a resume: steps that a
state says are left out stay left out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from library.config.nan_policies import ROLLBACK, SKIP, STOP
from library.dist import Runtime
from library.log import log
from library.optim.updater import NonFinite

MOST_IN_A_ROW = 10  # steps left out one after the other: the model, and not a picture, is broken
MOST_ROLLBACKS = 10  # to one and the same state
SHOWN = 4  # pictures named in a message


@dataclass(frozen=True)
class NanPolicy:
    """``kind``: see ``config.nan_policies``. All ranks come to the same decisions: losses are exchanged here, and gradients are
    means over all ranks before anybody looks at them."""

    runtime: Runtime
    kind: str = STOP
    skipped: set[int] = field(default_factory=set)  # numbers of steps, from 1

    def look(self, losses: Sequence[Tensor], step: int) -> None:
        """NonFinite where a loss (B,) of step number ``step`` is NaN or infinite, before an update uses its gradients. It waits
        for the device, so ``stop`` leaves it to the looks at the gradient norm and the mean loss, which are waited for anyway."""
        if self.kind != STOP and self.runtime.any_rank(not all(bool(part.isfinite().all()) for part in losses)):
            raise NonFinite("the loss is NaN or infinite", place=f"step {step}")

    def goes_back(self, error: NonFinite, step: int) -> bool:
        """Settle what ``error`` in step number ``step``, which names its pictures, means: True to go back to the newest state and
        train from there; False to go on with the next step; or the error is raised."""
        if self.kind == STOP or error.hopeless:
            raise error
        if self.kind == SKIP and error.weights_touched:
            raise NonFinite(f"{error.message}; some weights were updated with it already, as that happens during the backward "
                            "pass, so the step cannot be left out", place=error.place,
                            remedy="go on from the newest state with --nan_policy rollback, or without --fused_backward_pass, "
                                   "--blockwise_fused_optimizers and --blocks_to_swap") from error
        self.skipped.add(step)
        in_a_row = self.in_a_row(step)
        if in_a_row > MOST_IN_A_ROW:
            raise NonFinite(f"{error.message}, and so were the {MOST_IN_A_ROW} steps before it, which were left out",
                            place=error.place, remedy=error.remedy) from error
        log.warning("step %d is left out: %s (--nan_policy %s; %d left out in all, %d in a row, %d at most)", step, error.message,
                    self.kind, len(self.skipped), in_a_row, MOST_IN_A_ROW)
        return self.kind == ROLLBACK

    def allow(self, state_step: int) -> None:
        """NonFinite where the state of step ``state_step``, which was gone back to, has been gone back to too often."""
        since = sorted(step for step in self.skipped if step > state_step)
        if len(since) > MOST_ROLLBACKS:
            raise NonFinite(f"the loss or a gradient was NaN or infinite in {len(since)} steps, and every time the state of step "
                            f"{state_step} was gone back to", place=f"step {since[-1]}",
                            remedy="lower --learning_rate, and look at the pictures that are named above")
        log.warning("went back to the state of step %d; left out on the way: %s", state_step, ", ".join(map(str, since)))

    def in_a_row(self, step: int) -> int:
        """How many steps up to and with number ``step`` are left out."""
        count = 0
        while step - count in self.skipped:
            count += 1
        return count

    def left_out(self, step: int) -> int:
        """How many steps up to and with number ``step`` are left out, of the whole run."""
        return sum(one <= step for one in self.skipped)


def with_pictures(error: NonFinite, runtime: Runtime, step: int, losses: Sequence[Tensor],
                  paths: Sequence[Sequence[str]]) -> NonFinite:
    """``error`` of step number ``step`` with the names of the pictures whose loss is not finite or, where all of ``losses`` are,
    of all pictures of the step. ``losses``: (B,) for each of the first micro-batches of this rank; ``paths``: of all of them.
    To be called on all ranks."""
    bad = [path for part, names in zip(losses, paths) for value, path in zip(part.tolist(), names) if not math.isfinite(value)]
    names = runtime.join_over_ranks(bad)
    if names:
        message = f"the loss is NaN or infinite for {_some(names)}"
        remedy = ("lower --learning_rate or raise --lr_warmup_steps, and look at these pictures and captions; the weights of "
                  "this step were not saved, earlier files are untouched")
    else:
        names = runtime.join_over_ranks([path for part in paths for path in part])
        message, remedy = f"{error.message}, in a step of {_some(names)}", error.remedy
    told = NonFinite(message, place=f"step {step}", remedy=remedy)
    told.weights_touched, told.hopeless = error.weights_touched, error.hopeless
    return told


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (" and others" if len(names) > SHOWN else "")

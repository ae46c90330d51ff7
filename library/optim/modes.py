"""Weights to look at: schedule-free optimizers train at one point and deliver another (Defazio et al. 2024, "The Road Less
Scheduled").

Their own eval() and train() move the weights to the average and back by interpolation, which returns to the same numbers only
up to rounding: a preview would change the training, and in bfloat16 visibly so. Here the weights of the training are kept
aside (in CPU memory) meanwhile and put back bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from library.optim.rounding import StochasticRounding
from library.optim.state import only


@contextmanager
def evaluating(optimizer: torch.optim.Optimizer, parameters: Sequence[tuple[Tensor, Tensor]],
               rounding: StochasticRounding | None) -> Iterator[None]:
    """The weights are those to save, validate and draw with meanwhile; afterwards those of the training, bit for bit.

    ``parameters``: (weight, what the optimizer was built over in its place) for each one. Weights may lie on any device, but
    have to stay where they are between one block and the next: streamed blocks must be at rest on entry and exit.
    """
    moved = [weight for weight, stepped in parameters if optimizer.state.get(stepped)]
    kept = [weight.detach().to("cpu", copy=True) for weight in moved]
    try:
        with torch.no_grad():
            if rounding is None:
                optimizer.eval()  # type: ignore[attr-defined]
            else:
                rounding.evaluate(optimizer)
        yield
    finally:
        with torch.no_grad():
            with only(optimizer, ()):  # for its own record of the mode: the weights come from the copy
                optimizer.train()  # type: ignore[attr-defined]
            for weight, values in zip(moved, kept, strict=True):
                weight.detach().copy_(values)

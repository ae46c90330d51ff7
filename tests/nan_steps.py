"""Makes chosen steps of a run fail: their loss becomes NaN, or their gradients do while the loss is fine."""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch

from library import loop


class _SpoiledGradient(torch.autograd.Function):
    @staticmethod
    def forward(_context, losses):
        return losses.clone()

    @staticmethod
    def backward(_context, gradient):
        return gradient * float("nan")


def spoil(set_attribute: Callable[[object, str, object], None], steps: Collection[int], kind: str = "loss",
          here: Callable[[], bool] = lambda: True) -> list[int]:
    """``steps``: numbers from 1. ``here()``: whether this process spoils them. Returns the list of all steps that are computed, one
    entry for each micro-batch, as it grows."""
    draw, training_losses, seen = loop.draw, loop.training_losses, []

    def note(seed, step, *rest):
        seen.append(step + 1)
        return draw(seed, step, *rest)

    def losses(*arguments):
        found = training_losses(*arguments)
        if seen[-1] not in steps or not here():
            return found
        return found * float("nan") if kind == "loss" else _SpoiledGradient.apply(found)

    set_attribute(loop, "draw", note)
    set_attribute(loop, "training_losses", losses)
    return seen

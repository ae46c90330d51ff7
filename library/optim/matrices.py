"""Convolutions as matrices, for optimizers that factor the last two dimensions of what they are given.

Of a 3x3 kernel (outputs, inputs, 3, 3) those are the 3x3: the factors would hold two thirds as many numbers as the weight, and
of a 1x1 kernel twice as many. As the matrix (outputs, inputs * 9) it has outputs + inputs * 9 of them, and the rows that
share a statistic are the filters (Shazeer & Stern 2018, "Adafactor", define it for matrices only).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor
from torch.nn import Parameter


@cache
def over_matrices(cls: type[torch.optim.Optimizer]) -> type[torch.optim.Optimizer]:
    """A subclass of ``cls`` with its name whose step sees weights of more than two dimensions as (first, all others)."""

    class OverMatrices(cls):  # type: ignore[valid-type, misc]
        @torch.no_grad()
        def step(self, closure=None):
            assert closure is None, "a closure would see the flattened weights"
            with as_matrices([p for group in self.param_groups for p in group["params"] if p.grad is not None and p.ndim > 2]):
                return super().step()

    OverMatrices.__name__ = OverMatrices.__qualname__ = cls.__name__
    return OverMatrices


@contextmanager
def as_matrices(parameters: list[Parameter]) -> Iterator[None]:
    """Each parameter, and its gradient, is a two-dimensional view of itself meanwhile. The objects stay the same ones."""
    originals = [(parameter, parameter.data, parameter.grad) for parameter in parameters]
    try:
        for parameter, data, gradient in originals:
            parameter.grad = None  # torch refuses a gradient and data of different shapes, even for a moment
            parameter.data, flat_gradient = _flat(data, gradient)
            parameter.grad = flat_gradient
        yield
    finally:
        for parameter, data, gradient in originals:
            parameter.grad = None
            parameter.data = data
            parameter.grad = gradient


def _flat(data: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """``data`` as a view (first, all others), and ``gradient`` in the same order (a copy where its layout differs)."""
    order = (0, *range(2, data.ndim), 1) if not data.is_contiguous() else tuple(range(data.ndim))  # channels_last
    return data.permute(order).flatten(1), gradient.permute(order).flatten(1)

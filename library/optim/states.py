"""How much an optimizer remembers of each weight: as its record declares; a class without one is asked, with small parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import numpy
import torch
from torch.nn import Parameter

from library.optim import table
from library.optim.groups import Group
from library.optim.records import RECORDS

SMALL = 4096  # elements; 8-bit optimizers keep float32 states of smaller parameters
# Bytes are a sum of multiples of: elements, rows and columns of the last two dimensions taken as a matrix, and one.
_MATRICES = {False: ((64, 256), (128, 256), (64, 512), (128, 512)), True: ((16, 32), (32, 32), (16, 64), (32, 64))}
_VECTORS = {False: (8192, 16384), True: (64, 128)}


def state_bytes(name: str, args: Sequence[str]) -> Callable[[Sequence[int]], int]:
    """Shape -> bytes of the tensors that optimizer ``name`` keeps for a float32 parameter (bfloat16 ones are stepped through
    float32 stand-ins), without single numbers such as step counters. Of a class that is not in the table exact where bytes are
    a linear function of the number of elements, rows and columns; where blocks of elements share a number, up to one block.
    """
    record = table.find(name)
    if record in RECORDS:
        given = table.given_arguments(name, args)
        return lambda shape: record.state_bytes(given, tuple(shape))

    @cache
    def law(matrix: bool, small: bool) -> numpy.ndarray:
        shapes = _MATRICES[small] if matrix else [(size,) for size in _VECTORS[small]]
        features = numpy.array([_features(shape) for shape in shapes], dtype=float)
        return numpy.linalg.solve(features, numpy.array([_probe(name, args, shape) for shape in shapes], dtype=float))

    def of(shape: Sequence[int]) -> int:
        if not shape:
            return 0
        return round(float(numpy.dot(_features(shape), law(len(shape) > 1, torch.Size(shape).numel() < SMALL))))
    return of


def _features(shape: Sequence[int]) -> list[float]:
    count = torch.Size(shape).numel()
    return [count, count / shape[-1], count / shape[-2], 1] if len(shape) > 1 else [count, 1]


def _probe(name: str, args: Sequence[str], shape: Sequence[int]) -> int:
    parameters = [Parameter(torch.zeros(tuple(shape))) for _ in range(2)]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer = table.build(name, args, [Group("probe", tuple((str(i), p) for i, p in enumerate(parameters)), 1e-3)], 1e-3)
    optimizer.step()
    first, second = ({key: value for key, value in optimizer.state[parameter].items()
                      if isinstance(value, torch.Tensor) and value.numel() > 1} for parameter in parameters)
    # what two parameters have at one address belongs to the optimizer
    return sum(value.numel() * value.itemsize for key, value in first.items() if value.data_ptr() != second[key].data_ptr())

"""States of small models for the tests of saving and resuming."""

from __future__ import annotations

import torch

from library.checkpoint.train_state import StateFacts
from library.optim import rounding, table, updater
from library.optim.groups import Group


def facts(step=3, **more) -> StateFacts:
    return StateFacts(**{"step": step, "epoch": 1, "total_steps": 10, "stride": 1, "steps_per_epoch": 5, "world_size": 1,
                         "model": "m", "data": "d", "config": "[general]\nseed = 1\n", "serial": step, **more})


class Trainer:
    """Three parameters (one large enough for 8-bit states, one scalar) under a real optimizer, as a run builds it."""

    def __init__(self, name: str, dtype: torch.dtype, args=(), seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        shapes = {"block.weight": (96, 64), "block.bias": (96,), "scale": ()}
        self.weights = {key: torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for key, shape in shapes.items()}
        groups = [Group("all", tuple(self.weights.items()), 0.01)]
        rounded = rounding.StochasticRounding(groups, 0) if dtype is torch.bfloat16 else None
        optimizer = table.build(name, args, rounded.groups if rounded else groups, 0.01)
        self.updater = updater.StepAfterBackward(optimizer, groups, lambda step, total: 1 / (step + 1), 1.0, rounded)

    def run(self, first: int, stop: int) -> None:
        for step in range(first, stop):
            generator = torch.Generator().manual_seed(1000 + step)
            for weight in self.weights.values():
                weight.grad = torch.randn(weight.shape, generator=generator).to(weight.dtype)
            self.updater.after_backward(step, stop, True)

    def same(self, other: Trainer) -> bool:
        """Bit for bit, weights and states."""
        return all(same(self.weights[key], other.weights[key]) for key in self.weights) and all(
            entry.keys() == other.updater.state_dict()[key].keys()
            and all(same(value, other.updater.state_dict()[key][name]) for name, value in entry.items())
            for key, entry in self.updater.state_dict().items())


def same(one, two) -> bool:
    if not isinstance(one, torch.Tensor):
        return type(one) is type(two) and repr(one) == repr(two)
    return one.dtype == two.dtype and one.shape == two.shape and torch.equal(
        one.detach().reshape(-1).contiguous().view(torch.uint8), two.detach().reshape(-1).contiguous().view(torch.uint8))

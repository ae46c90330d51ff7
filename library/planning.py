"""What a run would need, before a weight is read: the memory planner put to work on a configuration."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from library.architectures.base import Architecture
from library.config.loss_options import LossOptions
from library.memory.measure import Measured, measure
from library.objectives.noise import Draws
from library.step import training_losses

if TYPE_CHECKING:
    from collections.abc import Callable


def measure_step(arch: Architecture, loss: LossOptions, size: tuple[int, int], batch: int, weights: torch.dtype,
                 autocast: torch.dtype | None, trains: Callable[[nn.Module], object], cuda: bool = True) -> Measured:
    """A micro-batch of ``batch`` pictures of ``size`` (width, height), under ``--mixed_precision`` as ``autocast`` says.
    ``trains`` switches gradients on for what trains."""
    denoiser = arch.meta_denoiser(weights)
    trains(denoiser)
    objective = arch.objective(loss)

    def losses() -> torch.Tensor:
        return micro_batch(arch, denoiser, objective, size, batch, autocast or weights)
    return measure(denoiser, arch.blocks(denoiser), losses, autocast, cuda)


def micro_batch(arch: Architecture, denoiser: nn.Module, objective: object, size: tuple[int, int], batch: int,
                text_dtype: torch.dtype) -> torch.Tensor:
    """(B,) losses of a made-up micro-batch, as ``loop.py`` computes them of a real one."""
    latent = (arch.latent.channels, size[1] // arch.latent.factor, size[0] // arch.latent.factor)
    rows = tuple(str(row) for row in range(batch))
    draws = Draws(torch.zeros(batch, *latent), torch.zeros(batch), torch.zeros(batch), rows)
    text = arch.vary_text(arch.meta_text(batch, text_dtype), draws)
    return training_losses(arch, denoiser, objective, torch.zeros(batch, *latent), text, torch.zeros(batch, 6, dtype=torch.int64),
                           torch.ones(batch), None, draws)

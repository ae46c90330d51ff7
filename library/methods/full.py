"""Full fine-tuning: every weight of the denoiser trains, and the whole denoiser is exported."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from library.architectures.base import Architecture
from library.optim.groups import Group


def prepare(denoiser: nn.Module, learning_rate: float) -> list[Group]:
    """Switch gradients on and name what trains."""
    denoiser.requires_grad_(True)
    denoiser.train()
    return [Group("denoiser", list(denoiser.named_parameters()), learning_rate)]


def export(arch: Architecture, denoiser: nn.Module, path: Path, dtype: torch.dtype | None, metadata: Mapping[str, str]) -> None:
    """Write the trained weights as one file in the layout of the input."""
    arch.export(denoiser, path, dtype, metadata)

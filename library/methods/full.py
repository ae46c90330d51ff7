"""Full fine-tuning: every weight of the modules that train, and the whole of them is exported."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from library.architectures.base import Architecture, TextEncoders
from library.optim.groups import Group


def prepare(arch: Architecture, denoiser: nn.Module, encoders: TextEncoders, learning_rate: float) -> list[Group]:
    """Switch gradients on, by ``arch.groups``, and name what trains. ``encoders``: those that train."""
    groups = arch.groups(denoiser, encoders, learning_rate)
    for module in (denoiser, *encoders.modules.values()):
        module.train()
    return groups


def export(arch: Architecture, modules: Mapping[str, nn.Module], path: Path, dtype: torch.dtype | None,
           metadata: Mapping[str, str], save_format: str) -> None:
    """Write the model with its trained weights; see ``Architecture.export``."""
    arch.export(modules, path, dtype, metadata, save_format)


def saved_bytes(arch: Architecture, modules: Mapping[str, nn.Module], dtype: torch.dtype | None, save_format: str) -> int:
    """About how much room ``export`` takes."""
    return arch.saved_bytes(modules, dtype, save_format)

"""One micro-batch, from clean latents to weighted losses: noise, predict, compare."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from library.architectures.base import Architecture
from library.objectives.base import Objective
from library.objectives.noise import Draws


def training_losses(arch: Architecture, denoiser: nn.Module, objective: Objective, latents: torch.Tensor,
                    text: Mapping[str, torch.Tensor], geometry: torch.Tensor, weight: torch.Tensor, mask: torch.Tensor | None,
                    draws: Draws) -> torch.Tensor:
    """(B,) float32: each sample's loss times its weights, with gradients.

    ``latents`` (B, C, h, w); ``text`` named tensors (B, ...); ``geometry`` (B, 6); ``weight`` (B,); ``mask`` (B, 1, h, w) in 0..1
    or None; ``draws`` of the same batch and latent shape.
    """
    level = objective.level(draws, arch.latent.tokens(*latents.shape[2:]))  # (B,)
    noisy = objective.noise(latents, draws, level)
    output = arch.predict(denoiser, noisy.x_t, noisy.level, text, geometry)  # (B, C, h, w)
    return objective.losses(output, noisy, mask) * objective.weight(level) * weight


@contextmanager
def evaluating(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Modules in evaluation mode; afterwards each is in the mode it was in."""
    modes = [(module, module.training) for module in modules]
    for module, _ in modes:
        module.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.train(training)

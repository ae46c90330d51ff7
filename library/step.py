"""One micro-batch, from clean latents to weighted losses: noise, predict, compare."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from library.architectures.base import Architecture
from library.objectives.flow import Flow
from library.objectives.loss import per_sample
from library.objectives.noise import Draws


def training_losses(arch: Architecture, denoiser: nn.Module, objective: Flow, latents: torch.Tensor,
                    text: Mapping[str, torch.Tensor], weight: torch.Tensor, mask: torch.Tensor | None,
                    draws: Draws) -> torch.Tensor:
    """(B,) float32: each sample's loss times its weights, with gradients.

    ``latents`` (B, C, h, w); ``text`` named tensors (B, ...); ``weight`` (B,); ``mask`` (B, 1, h, w) in 0..1 or None;
    ``draws`` of the same batch and latent shape.
    """
    level = objective.level(draws, arch.latent.tokens(*latents.shape[2:]))  # (B,)
    noisy = objective.noise(latents, draws, level)
    output = arch.predict(denoiser, noisy.x_t, noisy.level, text)  # (B, C, h, w)
    loss = per_sample(objective.prediction(output, noisy), noisy.target, mask)  # (B,)
    return loss * objective.weight(level) * weight

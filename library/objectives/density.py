"""Densities of the noise level: pure functions from random numbers to levels, each (B,) float32 -> (B,) float32.

A level is sigma of rectified flow: 0 is the clean latent, 1 is pure noise. ``uniform`` stands for samples of U(0, 1),
``normal`` for samples of N(0, 1).

Sources: Esser et al. 2024, "Scaling Rectified Flow Transformers", sections 3.1 and 5.3.2 (logit-normal, mode, cosmap and
the resolution shift); Black Forest Labs' ``flux/sampling.py`` for the shift that depends on the number of tokens.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

LEVELS = 1000  # steps of the discrete table; also the number of timesteps that min/max_timestep count in

# The two points through which the resolution shift is linear: (image tokens, mu). 4096 tokens are 1024x1024 pixels
# at 8 pixels per latent cell and 2x2 cells per token.
_FEW_TOKENS, _FEW_MU = 256, 0.5
_MANY_TOKENS, _MANY_MU = 4096, 1.15


def logit_normal(normal: Tensor, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """sigmoid(N(mean, std)): most samples in the middle; ``mean`` > 0 leans to noise, a large ``std`` to both ends."""
    return torch.sigmoid(normal * std + mean)


def mode(uniform: Tensor, scale: float = 1.29) -> Tensor:
    """1 - u - scale * (cos(pi u / 2)^2 - 1 + u): heavier in the middle for ``scale`` > 0, at the ends for < 0."""
    return 1 - uniform - scale * (torch.cos(math.pi * uniform / 2) ** 2 - 1 + uniform)


def shift(level: Tensor, factor: float) -> Tensor:
    """factor * l / (1 + (factor - 1) * l): moves levels towards noise for ``factor`` > 1, keeps 0 and 1 in place."""
    return factor * level / (1 + (factor - 1) * level)


def resolution_shift_factor(tokens: int) -> float:
    """exp(mu), with mu linear in the number of image tokens: larger pictures need more noise to be destroyed alike."""
    slope = (_MANY_MU - _FEW_MU) / (_MANY_TOKENS - _FEW_TOKENS)
    return math.exp(_FEW_MU + slope * (tokens - _FEW_TOKENS))


def table(position: Tensor, factor: float) -> Tensor:
    """Level at ``position`` in [0, 1] of a sampler's table: the shifted values of 1, 0.999, ... 0.001, noise first.

    This is the training grid of Euler flow matching with 1000 steps; the result takes ``LEVELS`` distinct values.
    """
    index = (position * LEVELS).floor().clamp(0, LEVELS - 1)  # a position of 1 (rounding of a sigmoid) stays in the table
    return shift((LEVELS - index) / LEVELS, factor)


def between(level: Tensor, lowest: float, highest: float) -> Tensor:
    """[0, 1] -> [lowest, highest] linearly, keeping the shape of the density; equal bounds give a constant."""
    return lowest + (highest - lowest) * level

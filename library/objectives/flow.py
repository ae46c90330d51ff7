"""Rectified flow: straight paths from latents to noise, and what of them the model is trained on.

x_t = (1 - sigma) * latents + sigma * noise, and the model learns the velocity noise - latents (Liu et al. 2022, "Flow
Straight and Fast"; Lipman et al. 2022). Options and their names follow the dialect (peer census, 4.3).
Letters: B batch, C latent channels, h w latent height and width.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from library.config.loss_options import LossOptions
from library.objectives import density
from library.objectives.base import Noisy
from library.objectives.loss import huber_width, per_sample
from library.objectives.noise import Draws, perturbed

if TYPE_CHECKING:
    from library.config.flow_options import FlowOptions

_SMALLEST_WEIGHTED_LEVEL = 1e-3  # sigma_sqrt weights by 1 / sigma^2: a level of 0 would give an infinite weight


class Flow:
    """The objective of flow models, as set by ``FlowOptions``; keeps no state."""

    def __init__(self, options: FlowOptions, loss: LossOptions = LossOptions()):
        self.options, self.loss_options = options, loss

    def level(self, draws: Draws, tokens: int) -> Tensor:
        """Noise levels (B,) float32 in [min_timestep, max_timestep] / 1000; ``tokens``: image tokens of each latent.

        The density is squeezed linearly between the two bounds, after its shift: they bound the level that is trained.
        """
        lowest, highest = bounds(self.options)
        level = self._density(draws, tokens).clamp(0.0, 1.0)
        return density.between(level, lowest / density.LEVELS, highest / density.LEVELS)

    def _density(self, draws: Draws, tokens: int) -> Tensor:
        options = self.options
        sampling = options.timestep_sampling
        if sampling == "sigma":
            # the only mode in which weighting_scheme is also a density
            return density.table(scheme_position(options, draws), options.discrete_flow_shift)
        if sampling == "uniform":
            return draws.uniform
        if sampling == "nextdit_shift":
            return density.shift(draws.uniform, density.resolution_shift_factor(tokens))
        level = density.logit_normal(draws.normal, std=options.sigmoid_scale)
        if sampling == "sigmoid":
            return level
        if sampling == "shift":
            return density.shift(level, options.discrete_flow_shift)
        assert sampling == "flux_shift", sampling
        return density.shift(level, density.resolution_shift_factor(tokens))

    def noise(self, latents: Tensor, draws: Draws, level: Tensor) -> Noisy:
        """Mix ``latents`` (B, C, h, w) with the drawn noise, of which ``ip_noise_gamma`` puts a little more into the input than
        the target knows of."""
        given = perturbed(draws.noise, draws, self.options.ip_noise_gamma, self.options.ip_noise_gamma_random_strength)
        return mix(latents, draws, level, given)

    def prediction(self, output: Tensor, noisy: Noisy) -> Tensor:
        """What is compared with the target: a function of the model's ``output`` (B, C, h, w), by model_prediction_type.

        raw: the output is the velocity. additive: the output plus x_t. sigma_scaled: x_t - sigma * output, an estimate of
        the clean latents, compared with a velocity nevertheless; the dialect's default, kept to be able to repeat old runs.
        """
        kind = self.options.model_prediction_type
        if kind == "raw":
            return output
        if kind == "additive":
            return output + noisy.x_t
        assert kind == "sigma_scaled", kind
        return noisy.x_t - noisy.level.view(-1, 1, 1, 1) * output

    def losses(self, output: Tensor, noisy: Noisy, mask: Tensor | None = None) -> Tensor:
        """(B,) float32, unweighted: the output against the target, by ``--loss_type``; ``mask`` (B, 1, h, w) or None."""
        return compare(self.prediction(output, noisy), noisy.target, noisy.level, mask, self.loss_options)

    def weight(self, level: Tensor) -> Tensor:
        """Loss weights (B,) by weighting_scheme; as in the dialect they act on sigma_scaled predictions only.

        sigma_sqrt: sigma^-2. cosmap: 2 / (pi (1 - 2 sigma + 2 sigma^2)). Every other scheme weighs all levels alike.
        """
        if self.options.model_prediction_type == "sigma_scaled":
            if self.options.weighting_scheme == "sigma_sqrt":
                return level.clamp_min(_SMALLEST_WEIGHTED_LEVEL) ** -2
            if self.options.weighting_scheme == "cosmap":
                return cosmap(level)
        return torch.ones_like(level)


def bounds(options: Any) -> tuple[int, int]:
    """(``min_timestep``, ``max_timestep``), of 1000."""
    return (0 if options.min_timestep is None else options.min_timestep,
            density.LEVELS if options.max_timestep is None else options.max_timestep)


def scheme_position(options: Any, draws: Draws) -> Tensor:
    """A number in [0, 1] for each sample (B,), with the density of ``weighting_scheme``."""
    if options.weighting_scheme == "logit_normal":
        return density.logit_normal(draws.normal, options.logit_mean, options.logit_std)
    if options.weighting_scheme == "mode":
        return density.mode(draws.uniform, options.mode_scale)
    return draws.uniform


def mix(latents: Tensor, draws: Draws, level: Tensor, given: Tensor | None = None) -> Noisy:
    """Mix ``latents`` (B, C, h, w) with the drawn noise at ``level`` (B,), in float32 whatever the latents are stored in.

    ``given``: noise (B, C, h, w) of the input, where that is other than the target's.
    """
    clean = latents.float()
    sigma = level.view(-1, 1, 1, 1)
    return Noisy((1 - sigma) * clean + sigma * (draws.noise if given is None else given), level, draws.noise - clean)


def compare(prediction: Tensor, target: Tensor, level: Tensor, mask: Tensor | None, options: LossOptions) -> Tensor:
    """(B,) float32, by ``--loss_type``: ``prediction`` and ``target`` (B, C, h, w) at ``level`` (B,)."""
    width = None
    if options.rounded:
        width = huber_width(options.huber_schedule, options.huber_c, options.huber_scale, level, signal_share(level))
    return per_sample(prediction, target, mask, options.loss_type, width)


def signal_share(level: Tensor) -> Tensor:
    """(B,) -> (B,): of the variance of x_t, where latents and noise have variance 1: (1 - s)^2 / ((1 - s)^2 + s^2)."""
    clean = (1 - level).square()
    return clean / (clean + level.square())


def cosmap(level: Tensor) -> Tensor:
    """2 / (pi (1 - 2 sigma + 2 sigma^2)), (B,) -> (B,)."""
    return 2 / (math.pi * (1 - 2 * level + 2 * level**2))

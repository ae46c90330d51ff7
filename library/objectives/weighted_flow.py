"""Rectified flow with one scheme for both the density of levels and the weight of the loss, which compares clean latents.

The model learns the velocity as in ``flow.py``. The loss, though, is taken between the latents and the estimate
x_t - sigma * output of them: for squared errors that is the velocity's loss times sigma^2, before the scheme's weight (peer
census, 4.2; Esser et al. 2024, "Scaling Rectified Flow Transformers", section 3.1).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from library.config.loss_options import LossOptions
from library.objectives import density
from library.objectives.base import Noisy
from library.objectives.flow import bounds, compare, cosmap, mix, scheme_position
from library.objectives.noise import Draws

if TYPE_CHECKING:
    from library.config.weighted_flow_options import WeightedFlowOptions


class WeightedFlow:
    """As set by ``WeightedFlowOptions``; keeps no state."""

    def __init__(self, options: WeightedFlowOptions, loss: LossOptions = LossOptions()):
        self.options, self.loss_options = options, loss

    def level(self, draws: Draws, tokens: int) -> Tensor:
        """Noise levels (B,) float32, whole thousandths in [min_timestep, max_timestep] / 1000, whatever the number of ``tokens``.

        The density of ``weighting_scheme``, then ``training_shift``, then the bounds, between which the density is squeezed.
        """
        options = self.options
        lowest, highest = bounds(options)
        level = density.shift(scheme_position(options, draws), options.training_shift)
        return (level * (highest - lowest) + lowest).floor() / density.LEVELS

    def noise(self, latents: Tensor, draws: Draws, level: Tensor) -> Noisy:
        """Mix ``latents`` (B, C, h, w) with the drawn noise at ``level`` (B,), in float32; the target is the velocity."""
        return mix(latents, draws, level)

    def losses(self, output: Tensor, noisy: Noisy, mask: Tensor | None = None) -> Tensor:
        """(B,) float32, unweighted: two estimates of the clean latents, by the ``output`` and by the target, compared by
        ``--loss_type``; with ``sigma_sqrt`` the two velocities themselves. ``mask`` (B, 1, h, w) or None."""
        if self.options.weighting_scheme == "sigma_sqrt":
            return compare(output, noisy.target, noisy.level, mask, self.loss_options)
        sigma = noisy.level.view(-1, 1, 1, 1)
        return compare(noisy.x_t - sigma * output, noisy.x_t - sigma * noisy.target, noisy.level, mask, self.loss_options)

    def weight(self, level: Tensor) -> Tensor:
        """Loss weights (B,) of each sample's own level. ``sigma_sqrt`` is in ``losses`` already: its sigma^-2 undoes the sigma^2
        of the comparison. cosmap: 2 / (pi (1 - 2 sigma + 2 sigma^2))."""
        return cosmap(level) if self.options.weighting_scheme == "cosmap" else torch.ones_like(level)

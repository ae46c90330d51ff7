"""What the loop asks of an objective: what is added to the latents, what of it the model is trained on, and how that is weighed.

Letters: B batch, C latent channels, h w latent height and width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from library.objectives.noise import Draws


@dataclass(frozen=True)
class Noisy:
    """``x_t`` (B, C, h, w) at ``level`` (B,), and the ``target`` (B, C, h, w), float32. A level is sigma in [0, 1] of a flow, or
    the number of a level in a table, int64."""

    x_t: Tensor
    level: Tensor
    target: Tensor


class Objective(Protocol):
    """Keeps no state. ``options`` as they are in force, with what the checkpoint says of itself."""

    options: Any

    def level(self, draws: Draws, tokens: int) -> Tensor:
        """Noise levels (B,); ``tokens``: image tokens of each latent. The lower ``draws.uniform``, or ``draws.normal``, the lower
        the quantile of their density."""

    def noise(self, latents: Tensor, draws: Draws, level: Tensor) -> Noisy:
        """Mix ``latents`` (B, C, h, w) with noise at ``level`` (B,)."""

    def losses(self, output: Tensor, noisy: Noisy, mask: Tensor | None = None) -> Tensor:
        """(B,) float32, unweighted: the model's ``output`` (B, C, h, w) against the target; ``mask`` (B, 1, h, w) or None."""

    def weight(self, level: Tensor) -> Tensor:
        """Loss weights (B,) float32."""

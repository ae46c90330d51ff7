"""The only reductions of a loss in this program: float32, first per sample, then over the samples of a whole optimizer step.

Letters: B batch, C latent channels, h w latent height and width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def per_sample(prediction: Tensor, target: Tensor, mask: Tensor | None = None, kind: str = "l2",
               width: Tensor | None = None) -> Tensor:
    """Mean error of each sample: (B, C, h, w) twice -> (B,) float32.

    ``kind`` l2: squared error; l1: absolute error; huber and smooth_l1: nearly squared for errors below ``width`` (B,), nearly
    absolute above. ``mask`` (B, 1, h, w) in 0..1 multiplies the errors; the mean still runs over all cells, masked or not, so
    that a sample with a small mask counts less (as in the dialect: no renormalisation by the mask's area).
    """
    difference = prediction.float() - target.float()
    error = _error(difference, kind, width)
    if mask is not None:
        error = error * mask
    return error.mean(dim=(1, 2, 3))


def _error(difference: Tensor, kind: str, width: Tensor | None) -> Tensor:
    """(B, C, h, w) -> the same shape.

    huber is 2 c (sqrt(d^2 + c^2) - c), near d^2 for small errors; smooth_l1 is 2 (sqrt(d^2 + c^2) - c), near 2 |d| for large
    ones (the pseudo-Huber loss of Charbonnier et al. 1997, with the two scalings of the dialect).
    """
    if kind == "l2":
        return difference.square()
    if kind == "l1":
        return difference.abs()
    assert kind in ("huber", "smooth_l1") and width is not None, kind
    c = width.float().view(-1, 1, 1, 1)
    # d^2 / (sqrt(d^2 + c^2) + c) is the same as sqrt(d^2 + c^2) - c without subtracting nearly equal numbers
    rounded = 2 * difference.square() / (torch.hypot(difference, c) + c)
    return c * rounded if kind == "huber" else rounded


def huber_width(schedule: str, c: float, scale: float, level: Tensor, signal: Tensor | None = None) -> Tensor:
    """The width (B,) float32 of huber and smooth_l1 at noise levels ``level`` (B,) in 0..1.

    constant: c * scale. exponential: c^level * scale, from ``scale`` without noise to ``c * scale`` at pure noise. snr:
    (1 - c) / (1 + sigma)^2 + c with sigma = sqrt((1 - signal) / signal), where ``signal`` (B,) is the share of signal
    variance at that level (of a flow that is (1 - c) (1 - level)^2 + c); ``scale`` does not act.
    """
    if schedule == "constant":
        return torch.full_like(level, c * scale, dtype=torch.float32)
    if schedule == "exponential":
        return torch.exp(level.float() * math.log(c)) * scale
    assert schedule == "snr" and signal is not None, schedule
    sigma = ((1 - signal) / signal).sqrt()
    return (1 - c) / (1 + sigma).square() + c


def mean(losses: Tensor, samples: float) -> Tensor:
    """sum(losses) / samples: this batch's share of the mean over an optimizer step, a scalar to back-propagate.

    ``losses`` (B,) are weighted. ``samples`` counts the real samples of the whole step, over all of its micro-batches:
    then the gradients of the micro-batches add up to those of one large batch, also when their sizes differ. Where ranks
    average their gradients, it is that count over all ranks divided by the number of ranks.
    """
    return losses.sum() / samples

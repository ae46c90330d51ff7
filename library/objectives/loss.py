"""The only reductions of a loss in this program: float32, first per sample, then over the samples of a whole optimizer step.

Letters: B batch, C latent channels, h w latent height and width.
"""

from __future__ import annotations

from torch import Tensor


def per_sample(prediction: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean squared error of each sample: (B, C, h, w) twice -> (B,) float32.

    ``mask`` (B, 1, h, w) in 0..1 multiplies the squared errors; the mean still runs over all cells, masked or not, so that a
    sample with a small mask counts less (as in the dialect: no renormalisation by the mask's area).
    """
    error = (prediction.float() - target.float()).square()
    if mask is not None:
        error = error * mask
    return error.mean(dim=(1, 2, 3))


def mean(losses: Tensor, samples: float) -> Tensor:
    """sum(losses) / samples: this batch's share of the mean over an optimizer step, a scalar to back-propagate.

    ``losses`` (B,) are weighted. ``samples`` counts the real samples of the whole step, over all of its micro-batches:
    then the gradients of the micro-batches add up to those of one large batch, also when their sizes differ. Where ranks
    average their gradients, it is that count over all ranks divided by the number of ranks.
    """
    return losses.sum() / samples

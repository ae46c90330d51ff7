"""Denoising diffusion on a table of 1000 noise levels: what is added to the latents, and what of it the model is trained on.

x_t = sqrt(a_t) * latents + sqrt(1 - a_t) * noise, where a_t, the share of signal variance, falls from 1 to nearly 0 over the
levels (Ho et al. 2020). The model learns the noise, or the velocity sqrt(a_t) * noise - sqrt(1 - a_t) * latents (Salimans & Ho
2022). Here a noise level is its number in the table, an integer. Options and names follow the dialect (peer census, 4.1).
Letters: B batch, C latent channels, h w latent height and width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from library.config.ddpm_options import DdpmOptions
from library.config.loss_options import LossOptions
from library.objectives.base import Noisy
from library.objectives.loss import huber_width, per_sample
from library.objectives.noise import Draws, perturbed

LEVELS = 1000
_FIRST_BETA, _LAST_BETA = 0.00085, 0.012  # "scaled linear": the roots of the betas are evenly spaced (Rombach et al. 2022)
_LARGEST_SNR = 1000.0  # weights that divide by the signal-to-noise ratio stay finite at the cleanest levels


def signal_shares() -> Tensor:
    """a_t of the schedule, (1000,) float32, as diffusers computes it."""
    betas = torch.linspace(_FIRST_BETA**0.5, _LAST_BETA**0.5, LEVELS, dtype=torch.float32) ** 2
    return torch.cumprod(1 - betas, dim=0)


def without_terminal_signal(shares: Tensor) -> Tensor:
    """The schedule with sqrt(a_t) shifted and stretched: the last becomes 0, the first stays (Lin et al. 2023, algorithm 1)."""
    roots = shares.sqrt()
    first, last = roots[0].clone(), roots[-1].clone()
    return ((roots - last) * (first / (first - last))).square()


class Ddpm:
    """The objective of models that predict noise or velocity.

    Keeps nothing but its tables. Weights by signal-to-noise ratio use the schedule as it was before ``zero_terminal_snr``
    stretched it, as in the dialect: the stretched one has a ratio of 0 at its end, where such weights vanish or are infinite.
    """

    def __init__(self, options: DdpmOptions, loss: LossOptions = LossOptions()):
        self.options, self.loss_options = options, loss
        shares = signal_shares()
        self._ratios = shares / (1 - shares)
        self._shares = without_terminal_signal(shares) if options.zero_terminal_snr else shares

    def level(self, draws: Draws, tokens: int) -> Tensor:
        """Numbers of noise levels (B,) int64, evenly from min_timestep up to but not including max_timestep.

        Equal bounds give that level alone. ``tokens``, the size of the latent, changes nothing.
        """
        lowest = self.options.min_timestep or 0
        highest = LEVELS if self.options.max_timestep is None else self.options.max_timestep
        steps = (draws.uniform * (highest - lowest)).floor().long().clamp(0, max(highest - lowest - 1, 0))
        return lowest + steps

    def noise(self, latents: Tensor, draws: Draws, level: Tensor) -> Noisy:
        """Mix ``latents`` (B, C, h, w) with noise at ``level`` (B,), in float32 whatever the latents are stored in."""
        clean = latents.float()
        noise = self._shaped_noise(clean, draws)
        signal, rest = self._roots(level)
        target = signal * noise - rest * clean if self.options.v_parameterization else noise
        given = perturbed(noise, draws, self.options.ip_noise_gamma, self.options.ip_noise_gamma_random_strength)
        return Noisy(signal * clean + rest * given, level, target)

    def prediction(self, output: Tensor, noisy: Noisy) -> Tensor:
        """What is compared with the target: the model's ``output`` (B, C, h, w) itself."""
        return output

    def losses(self, output: Tensor, noisy: Noisy, mask: Tensor | None = None) -> Tensor:
        """(B,) float32, unweighted: the output against the target, by ``--loss_type``; ``mask`` (B, 1, h, w) or None."""
        options, width = self.loss_options, None
        if options.rounded:
            width = huber_width(options.huber_schedule, options.huber_c, options.huber_scale, noisy.level / LEVELS,
                                self._at(self._shares, noisy.level))
        return per_sample(self.prediction(output, noisy), noisy.target, mask, options.loss_type, width)

    def weight(self, level: Tensor) -> Tensor:
        """Loss weights (B,) float32 by the signal-to-noise ratio r of each level; several options multiply.

        min_snr_gamma g: min(r, g) / r for noise, min(r, g) / (r + 1) for velocity (Hang et al. 2023).
        scale_v_pred_loss_like_noise_pred: r / (r + 1). v_pred_like_loss s: 1 + s (r + 1) / r. debiased_estimation_loss:
        1 / sqrt(r) for noise, 1 / (r + 1) for velocity (Yu et al. 2024).
        """
        options, velocity = self.options, self.options.v_parameterization
        ratio = self._at(self._ratios, level)
        bounded = ratio.clamp_max(_LARGEST_SNR)
        weight = torch.ones_like(ratio)
        if options.min_snr_gamma:
            weight = weight * ratio.clamp_max(options.min_snr_gamma) / (ratio + 1 if velocity else ratio)
        if options.scale_v_pred_loss_like_noise_pred:
            weight = weight * bounded / (bounded + 1)
        if options.v_pred_like_loss:
            weight = weight * (1 + options.v_pred_like_loss * (bounded + 1) / bounded)
        if options.debiased_estimation_loss:
            weight = weight / (bounded + 1 if velocity else bounded.sqrt())
        return weight

    def _shaped_noise(self, clean: Tensor, draws: Draws) -> Tensor:
        """The noise that is added and asked for, (B, C, h, w): plain, with an offset per channel, of several resolutions."""
        options, noise = self.options, draws.noise
        if options.noise_offset:
            size: Tensor | float = options.noise_offset
            if options.noise_offset_random_strength:
                size = size * draws.uniforms("noise offset strength").view(-1, 1, 1, 1)
            if options.adaptive_noise_scale:
                size = (size + options.adaptive_noise_scale * clean.mean(dim=(2, 3), keepdim=True).abs()).clamp_min(0)
            noise = noise + size * draws.normals("noise offset", noise.shape[1], 1, 1)
        if options.multires_noise_iterations:
            noise = multires(noise, draws, options.multires_noise_iterations, options.multires_noise_discount)
        return noise

    def _roots(self, level: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(a_t) and sqrt(1 - a_t), both (B, 1, 1, 1)."""
        share = self._at(self._shares, level).view(-1, 1, 1, 1)
        return share.sqrt(), (1 - share).sqrt()

    @staticmethod
    def _at(table: Tensor, level: Tensor) -> Tensor:
        # 4 kB to the device: small beside a step, and no table is kept per device
        return table.to(level.device, non_blocking=True)[level]


def multires(noise: Tensor, draws: Draws, iterations: int, discount: float) -> Tensor:
    """Noise (B, C, h, w) plus noise of coarser and coarser grids, enlarged, scaled back to unit variance per sample.

    Grid ``i`` has sides divided by r^i, with r drawn anew from [2, 4) each time, and weight discount^i; the last is the one
    where a side is a single cell. The dialect's first grid is of full size and full weight, which is kept.
    """
    rows = [_one_multires(row, stream, iterations, discount)
            for row, stream in zip(noise, draws.streams("multires noise"), strict=True)]
    return torch.stack(rows)


def _one_multires(noise: Tensor, stream, iterations: int, discount: float) -> Tensor:
    """(C, h, w) of one sample; the stream gives the ratio and then the grid, for each resolution."""
    channels, height, width = noise.shape
    total = noise
    for index in range(iterations):
        ratio = (2 + 2 * stream.random()) ** index
        size = max(1, math.floor(height / ratio)), max(1, math.floor(width / ratio))
        grid = torch.from_numpy(stream.standard_normal((1, channels, *size), dtype="float32")).to(noise.device)
        total = total + F.interpolate(grid, size=(height, width), mode="bilinear")[0] * discount**index
        if 1 in size:
            break
    return total / total.std()

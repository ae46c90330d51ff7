"""One preview picture from the live parts: Euler steps of diffusers' flow scheduler, with the model called as in training."""

from __future__ import annotations

from collections.abc import Mapping

import numpy
import torch
from PIL import Image
from torch import nn

from library.architectures.base import LatentSpec
from library.architectures.lumina_call import predict
from library.architectures.lumina_parts import IMAGE_2, NEXT
from library.architectures.vae import decode_image, to_picture
from library.prompts import Prompt

SHIFTS = {IMAGE_2: 6.0, NEXT: 1.0}  # scheduler_config.json of the two releases
# Guidance acts on all channels, but in Lumina-Next on the first three only, as its own sampler has it (a habit of older models).
GUIDED = {IMAGE_2: 16, NEXT: 3}


@torch.no_grad()
def sample(denoiser: nn.Module, vae: nn.Module, prompt: Prompt, positive: Mapping[str, torch.Tensor],
           negative: Mapping[str, torch.Tensor], compute_dtype: torch.dtype, family: str, latent: LatentSpec) -> Image.Image:
    """Draw ``prompt`` (its seed must be set). ``positive`` and ``negative``: see ``lumina_text.encode_text``, batches of one.

    ``negative`` acts when ``prompt.cfg`` is above 1. Latents stay float32 between steps whatever the weights' dtype. Unlike
    diffusers' pipelines, nothing rescales the guided prediction, and Lumina-Next's positions and attention are not adapted to the
    size of the picture: what is seen is the model as it is trained.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler  # seconds to import, and not every run draws

    scheduler = FlowMatchEulerDiscreteScheduler(shift=SHIFTS[family])
    scheduler.set_timesteps(sigmas=numpy.linspace(1.0, 1 / prompt.steps, prompt.steps))
    device = next(denoiser.parameters()).device
    guided = prompt.cfg > 1.0
    text = {name: torch.cat([tensor, negative[name]]) if guided else tensor for name, tensor in positive.items()}
    text = {name: tensor.to(device) for name, tensor in text.items()}
    shape = (1, latent.channels, prompt.height // latent.factor, prompt.width // latent.factor)
    x_t = torch.randn(shape, generator=torch.Generator("cpu").manual_seed(prompt.seed)).to(device)
    with torch.autocast(device.type, dtype=compute_dtype, enabled=compute_dtype != torch.float32):
        for sigma, timestep in zip(scheduler.sigmas.tolist(), scheduler.timesteps, strict=False):  # the last sigma is the end, 0
            copies = 2 if guided else 1
            level = torch.full((copies,), sigma, device=device)
            velocity = predict(denoiser, x_t.expand(copies, -1, -1, -1), level, text)
            if guided:
                velocity = guide(*velocity.chunk(2), prompt.cfg, GUIDED[family])
            x_t = scheduler.step(velocity, timestep, x_t, return_dict=False)[0]
    return to_picture(decode_image(vae, x_t)[0])


def guide(positive: torch.Tensor, negative: torch.Tensor, scale: float, channels: int) -> torch.Tensor:
    """Classifier-free guidance (Ho and Salimans 2022) on the first ``channels`` of (B, C, h, w)."""
    guided = negative[:, :channels] + scale * (positive - negative)[:, :channels]
    return torch.cat([guided, positive[:, channels:]], dim=1)

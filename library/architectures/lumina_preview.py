"""Preview pictures from the live parts: Euler steps of diffusers' flow scheduler, with the model called as in training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy
import torch
from PIL import Image
from torch import nn

from library.architectures.base import LatentSpec
from library.architectures.drawing import generators, to_pictures
from library.architectures.lumina_call import predict
from library.architectures.lumina_parts import IMAGE_2, NEXT
from library.prompts import Prompt

SHIFTS = {IMAGE_2: 6.0, NEXT: 1.0}  # scheduler_config.json of the two releases
# Guidance acts on all channels, but in Lumina-Next on the first three only, as its own sampler has it (a habit of older models).
GUIDED = {IMAGE_2: 16, NEXT: 3}


@torch.no_grad()
def sample(denoiser: nn.Module, vae: nn.Module, prompts: Sequence[Prompt], positive: Mapping[str, torch.Tensor],
           negative: Mapping[str, torch.Tensor], compute_dtype: torch.dtype, family: str,
           latent: LatentSpec) -> list[Image.Image]:
    """Draw ``prompts`` together (see ``base.py``). ``positive`` and ``negative``: see ``lumina_text.encode_text``.

    ``negative`` acts when their ``cfg`` is above 1. Latents stay float32 between steps whatever the weights' dtype. Unlike
    diffusers' pipelines, nothing rescales the guided prediction, and Lumina-Next's positions and attention are not adapted to the
    size of the picture: what is seen is the model as it is trained.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler  # seconds to import, and not every run draws

    prompt = prompts[0]  # they agree in everything that is asked of it here
    scheduler = FlowMatchEulerDiscreteScheduler(shift=SHIFTS[family])
    scheduler.set_timesteps(sigmas=numpy.linspace(1.0, 1 / prompt.steps, prompt.steps))
    device = next(denoiser.parameters()).device
    guided = prompt.cfg > 1.0
    text = {name: torch.cat([tensor, negative[name]]) if guided else tensor for name, tensor in positive.items()}
    text = {name: tensor.to(device) for name, tensor in text.items()}
    shape = (1, latent.channels, prompt.height // latent.factor, prompt.width // latent.factor)
    noise = [torch.randn(shape, generator=generator) for generator in generators(prompts)]
    x_t = torch.cat(noise).to(device)  # (B, C, h, w)
    with torch.autocast(device.type, dtype=compute_dtype, enabled=compute_dtype != torch.float32):
        for sigma, timestep in zip(scheduler.sigmas.tolist(), scheduler.timesteps, strict=False):  # the last sigma is the end, 0
            seen = torch.cat([x_t, x_t]) if guided else x_t
            velocity = predict(denoiser, seen, torch.full((len(seen),), sigma, device=device), text)
            if guided:
                velocity = guide(*velocity.chunk(2), prompt.cfg, GUIDED[family])
            x_t = scheduler.step(velocity, timestep, x_t, return_dict=False)[0]
    return to_pictures(vae, x_t)


def guide(positive: torch.Tensor, negative: torch.Tensor, scale: float, channels: int) -> torch.Tensor:
    """Classifier-free guidance (Ho and Salimans 2022) on the first ``channels`` of (B, C, h, w)."""
    guided = negative[:, :channels] + scale * (positive - negative)[:, :channels]
    return torch.cat([guided, positive[:, channels:]], dim=1)

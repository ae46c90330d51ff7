"""What drawing previews shares between the models: each picture's own random numbers, and latents to pictures."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image
from torch import nn

from library.architectures.vae import decode_image, to_picture
from library.prompts import Prompt


def generators(prompts: Sequence[Prompt]) -> list[torch.Generator]:
    """One for each prompt, from its seed: its noise is the same in any company and on any device."""
    return [torch.Generator("cpu").manual_seed(prompt.seed) for prompt in prompts]


def to_pictures(vae: nn.Module, latents: torch.Tensor) -> list[Image.Image]:
    """(B, C, h, w) as ``vae.encode_image`` gives them -> their pictures, decoded one by one: that takes the memory of one."""
    return [to_picture(decode_image(vae, latents[index:index + 1])[0]) for index in range(len(latents))]

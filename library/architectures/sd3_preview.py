"""Preview pictures from the live parts, drawn by diffusers' StableDiffusion3Pipeline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from PIL import Image
from torch import nn

from library.architectures.drawing import generators, to_pictures
from library.architectures.sd3_text import context
from library.prompts import Prompt

SHIFT = 3.0  # scheduler_config.json of all releases


@torch.no_grad()
def sample(denoiser: nn.Module, vae: nn.Module, prompts: Sequence[Prompt], positive: Mapping[str, torch.Tensor],
           negative: Mapping[str, torch.Tensor], compute_dtype: torch.dtype, text_tokens: int) -> list[Image.Image]:
    """Draw ``prompts`` together (see ``base.py``). ``positive`` and ``negative``: see ``sd3_text.encode_text``.

    ``negative`` acts when their ``cfg`` is above 1. Latents stay float32 between steps whatever the weights' dtype.
    """
    # Pipelines take seconds to import, and not every run draws.
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    prompt = prompts[0]  # they agree in everything that is asked of it here
    pipeline = StableDiffusion3Pipeline(
        transformer=denoiser, scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT), vae=vae, text_encoder=None, tokenizer=None,
        text_encoder_2=None, tokenizer_2=None, text_encoder_3=None, tokenizer_3=None)
    pipeline.set_progress_bar_config(disable=True)
    config, weight = denoiser.config, denoiser.context_embedder.weight

    def ready(text: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        return context(text, len(prompts), config.joint_attention_dim, config.pooled_projection_dim, text_tokens, weight.device)

    guided = prompt.cfg > 1.0
    states, pooled = ready(positive)
    other_states, other_pooled = ready(negative) if guided else (None, None)
    dtype = weight.dtype if compute_dtype == torch.float32 else compute_dtype
    with torch.autocast(weight.device.type, dtype=dtype, enabled=dtype != torch.float32):
        latents = pipeline(
            prompt_embeds=states, pooled_prompt_embeds=pooled, negative_prompt_embeds=other_states,
            negative_pooled_prompt_embeds=other_pooled, guidance_scale=prompt.cfg, height=prompt.height, width=prompt.width,
            num_inference_steps=prompt.steps, generator=generators(prompts), output_type="latent",
        ).images  # (B, 16, h, w)
    return to_pictures(vae, latents)

"""Preview pictures from the live parts, drawn by diffusers' FluxPipeline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from PIL import Image
from torch import nn

from library.architectures.drawing import generators, to_pictures
from library.architectures.flux_call import unpack
from library.prompts import Prompt

# scheduler_config.json of the two releases: dev shifts its levels with the number of tokens, schnell does not.
DEV_SCHEDULE = {"shift": 3.0, "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15,
                "base_image_seq_len": 256, "max_image_seq_len": 4096}
SCHNELL_SCHEDULE = {"shift": 1.0, "use_dynamic_shifting": False}


@torch.no_grad()
def sample(denoiser: nn.Module, vae: nn.Module, prompts: Sequence[Prompt], positive: Mapping[str, torch.Tensor],
           negative: Mapping[str, torch.Tensor], compute_dtype: torch.dtype, schnell: bool,
           use_text_mask: bool) -> list[Image.Image]:
    """Draw ``prompts`` together (see ``base.py``). ``positive`` and ``negative``: ``t5`` (B, L, D) and ``clip_pooled`` (B, D).

    ``negative`` acts when their ``cfg`` is above 1. Latents stay float32 between steps whatever the weights' dtype.
    """
    # Pipelines take seconds to import, and not every run draws.
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

    prompt = prompts[0]  # they agree in everything that is asked of it here
    scheduler = FlowMatchEulerDiscreteScheduler(**(SCHNELL_SCHEDULE if schnell else DEV_SCHEDULE))
    pipeline = FluxPipeline(scheduler=scheduler, vae=vae, transformer=denoiser, text_encoder=None, tokenizer=None,
                            text_encoder_2=None, tokenizer_2=None)
    pipeline.set_progress_bar_config(disable=True)
    device = denoiser.x_embedder.weight.device

    def ready(text: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
        return text[name].to(device, torch.float32)

    arguments = {}
    if use_text_mask:
        # The pipeline passes one mask to both passes of true guidance: a text token counts where either prompt has one.
        words = positive["t5_mask"].bool() | negative["t5_mask"].bool() if prompt.cfg > 1.0 else positive["t5_mask"].bool()
        pictures = torch.ones(len(prompts), (prompt.height // 16) * (prompt.width // 16), dtype=torch.bool)
        arguments["attention_mask"] = torch.cat([words.cpu(), pictures], dim=1).to(device)  # (B, L + N)
    guided = prompt.cfg > 1.0
    with torch.autocast(device.type, dtype=compute_dtype, enabled=compute_dtype != torch.float32):
        tokens = pipeline(
            prompt_embeds=ready(positive, "t5"),
            pooled_prompt_embeds=ready(positive, "clip_pooled"),
            negative_prompt_embeds=ready(negative, "t5") if guided else None,
            negative_pooled_prompt_embeds=ready(negative, "clip_pooled") if guided else None,
            true_cfg_scale=prompt.cfg,
            guidance_scale=prompt.guidance,
            height=prompt.height,
            width=prompt.width,
            num_inference_steps=prompt.steps,
            generator=generators(prompts),
            joint_attention_kwargs=arguments or None,
            output_type="latent",
        ).images  # (B, N, 64)
    latents = unpack(tokens.float(), prompt.height // 8, prompt.width // 8)
    return to_pictures(vae, latents)

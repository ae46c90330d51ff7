"""Preview pictures from the live parts, drawn by diffusers' StableDiffusionXLPipeline with the samplers of the dialect."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import nn

from library.architectures.drawing import generators, to_pictures
from library.architectures.sdxl_text import side_by_side
from library.errors import UserError
from library.prompts import Prompt

# name -> (scheduler of diffusers, settings); a name may also be written with k_ in front
SAMPLERS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "ddim": ("DDIMScheduler", {"clip_sample": False, "steps_offset": 1}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True, "steps_offset": 1}),
    "lms": ("LMSDiscreteScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {"steps_offset": 1}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {"steps_offset": 1}),
    "heun": ("HeunDiscreteScheduler", {}),
    "dpm_2": ("KDPM2DiscreteScheduler", {}),
    "dpm_2_a": ("KDPM2AncestralDiscreteScheduler", {}),
    "dpmsolver": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}),
    "dpmsolver++": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "dpmsingle": ("DPMSolverSinglestepScheduler", {"final_sigmas_type": "sigma_min"}),
}
_SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}


def scheduler(name: str, velocity: bool, zero_terminal_snr: bool) -> Any:
    """The sampler called ``name``. A schedule that ends in pure noise is sampled from its very end, where the class can."""
    import diffusers

    class_name, settings = SAMPLERS[name.removeprefix("k_")]
    cls = getattr(diffusers, class_name)
    wanted = {**_SCHEDULE, **settings, "prediction_type": "v_prediction" if velocity else "epsilon"}
    if zero_terminal_snr:
        wanted |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    known = inspect.signature(cls.__init__).parameters
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # that the dialect's "dpmsolver" is an old one
            return cls(**{key: value for key, value in wanted.items() if key in known})
    except ImportError as error:
        raise UserError(f"the sampler {name} needs the package scipy, which is not installed",
                        remedy="pip install scipy, or choose another sampler") from error


@torch.no_grad()
def sample(denoiser: nn.Module, vae: nn.Module, prompts: Sequence[Prompt], positive: Mapping[str, torch.Tensor],
           negative: Mapping[str, torch.Tensor], compute_dtype: torch.dtype, velocity: bool,
           zero_terminal_snr: bool) -> list[Image.Image]:
    """Draw ``prompts`` together (see ``base.py``) with their sampler. ``positive``, ``negative``: see ``sdxl_text.encode_text``.

    ``negative`` acts when their ``cfg`` is above 1. Latents stay float32 between steps whatever the weights' dtype.
    """
    # Pipelines take seconds to import, and not every run draws.
    from diffusers import StableDiffusionXLPipeline

    prompt = prompts[0]  # they agree in everything that is asked of it here
    pipeline = StableDiffusionXLPipeline(
        vae=vae, text_encoder=None, text_encoder_2=None, tokenizer=None, tokenizer_2=None, unet=denoiser,
        scheduler=scheduler(prompt.sampler, velocity, zero_terminal_snr), force_zeros_for_empty_prompt=False,
        add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    device = denoiser.conv_in.weight.device

    def ready(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(device, torch.float32)

    guided = prompt.cfg > 1.0
    dtype = denoiser.conv_in.weight.dtype if compute_dtype == torch.float32 else compute_dtype
    with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
        latents = pipeline(
            prompt_embeds=ready(side_by_side(positive)),
            pooled_prompt_embeds=ready(positive["pooled"]),
            negative_prompt_embeds=ready(side_by_side(negative)) if guided else None,
            negative_pooled_prompt_embeds=ready(negative["pooled"]) if guided else None,
            guidance_scale=prompt.cfg,
            height=prompt.height,
            width=prompt.width,
            num_inference_steps=prompt.steps,
            generator=generators(prompts),
            output_type="latent",
        ).images  # (B, 4, h, w)
    return to_pictures(vae, latents)

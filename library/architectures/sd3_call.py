"""How SD3's transformer is called.

Conventions (Stability AI ``sd3.5``, ``SD3Transformer2DModel`` of diffusers): latents go in as a picture, the model cuts them into
2x2 patches itself; it takes 1000 sigma and predicts noise - latents; its text is that of all encoders (``sd3_text.context``).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from library.architectures.sd3_positions import Positions
from library.architectures.sd3_text import CORNERS, context

TIMESTEPS = 1000


def install_positions(denoiser: nn.Module, scaled: bool) -> None:
    """Make the transformer ask ``Positions`` for its rows. UserError when they are to be ``scaled`` and cannot be."""
    positions = Positions(denoiser.pos_embed, scaled)
    denoiser.pos_embed.cropped_pos_embed = positions.rows  # a method of this one object; names of weights stay as they are
    denoiser.pos_embed.positions = positions


def predict(denoiser: nn.Module, x_t: torch.Tensor, level: torch.Tensor, text: Mapping[str, torch.Tensor],
            text_tokens: int) -> torch.Tensor:
    """Velocity (B, 16, h, w) float32 for ``x_t`` (B, 16, h, w) at ``level`` (B,) = sigma in [0, 1].

    ``text``: see ``sd3_text``; ``text_tokens``: places of T5, where it is missing. The time is embedded from float32.
    """
    module = getattr(denoiser, "module", denoiser)  # the plain module under DistributedDataParallel
    dtype = module.context_embedder.weight.dtype
    states, pooled = context(text, len(x_t), module.config.joint_attention_dim, module.config.pooled_projection_dim, text_tokens,
                             x_t.device)
    positions = module.pos_embed.positions
    positions.corners = text.get(CORNERS)
    try:
        output = denoiser(hidden_states=x_t.to(dtype), encoder_hidden_states=states.to(dtype),
                          pooled_projections=pooled.to(dtype), timestep=level.float() * TIMESTEPS, return_dict=False)[0]
    finally:
        positions.corners = None
    return output.float()


def frozen_blocks(denoiser: nn.Module, count: int) -> list[nn.Module]:
    """The last ``count`` blocks, which do not train."""
    return list(denoiser.transformer_blocks)[len(denoiser.transformer_blocks) - count:]

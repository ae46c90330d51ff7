"""How a FLUX.1 transformer is called: packing, position ids, time and guidance.

Conventions (Black Forest Labs ``flux`` repository, ``FluxTransformer2DModel`` of diffusers): a token is a 2x2 patch of the
latent flattened as (channel, row, column); text ids are zero, image ids are (0, row, column); the model takes sigma and
predicts noise - latents.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn


def pack(latents: torch.Tensor) -> torch.Tensor:
    """(B, C, h, w) -> (B, h/2 * w/2, C * 4): 2x2 patches in row order, each as (channel, row, column)."""
    batch, channels, height, width = latents.shape
    patches = latents.view(batch, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(batch, (height // 2) * (width // 2), channels * 4)


def unpack(tokens: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """The inverse of ``pack`` for a latent of ``height`` x ``width`` cells."""
    batch, _, width_packed = tokens.shape
    patches = tokens.view(batch, height // 2, width // 2, width_packed // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return patches.reshape(batch, width_packed // 4, height, width)


def image_ids(height: int, width: int, device: torch.device) -> torch.Tensor:
    """(h/2 * w/2, 3): 0, row and column of each token of a latent of ``height`` x ``width`` cells."""
    ids = torch.zeros(height // 2, width // 2, 3, device=device)
    ids[..., 1] = torch.arange(height // 2, device=device)[:, None]
    ids[..., 2] = torch.arange(width // 2, device=device)[None, :]
    return ids.view(-1, 3)


def keep_time_exact(denoiser: nn.Module) -> None:
    """Give the time and guidance embedding float32 inputs whatever the precision of the rest.

    ``FluxTransformer2DModel.forward`` rounds ``timestep`` to the dtype of its activations before multiplying by 1000: in
    bfloat16 that leaves 129 distinct levels above 0.5. A pre-hook on the model notes the exact values, a pre-hook on
    ``time_text_embed`` puts them back. Hooks leave the parameter names as they are.
    """
    exact: list[torch.Tensor] = []

    def note(_module, _args, kwargs):
        exact[:] = [kwargs["timestep"].float() * 1000]
        if kwargs.get("guidance") is not None:
            exact.append(kwargs["guidance"].float() * 1000)

    denoiser.register_forward_pre_hook(note, with_kwargs=True)
    denoiser.time_text_embed.register_forward_pre_hook(lambda _module, args: (*exact, args[-1]))


def predict(denoiser: nn.Module, x_t: torch.Tensor, level: torch.Tensor, text: Mapping[str, torch.Tensor],
            guidance: float | None, use_text_mask: bool = False) -> torch.Tensor:
    """Velocity (B, 16, h, w) float32 for ``x_t`` (B, 16, h, w) at ``level`` (B,) = sigma in [0, 1].

    ``text`` holds ``t5`` (B, L, D), ``clip_pooled`` (B, D) and, for ``use_text_mask``, ``t5_mask`` (B, L) bool.
    ``guidance`` is embedded by models that have the embedding (dev) and ignored by the others (schnell).
    """
    module = getattr(denoiser, "module", denoiser)  # the plain module under DistributedDataParallel
    dtype = module.x_embedder.weight.dtype
    batch, _, height, width = x_t.shape
    tokens = pack(x_t.to(dtype))  # (B, N, 64)
    arguments = {}
    if use_text_mask:
        pictures = torch.ones(batch, tokens.shape[1], dtype=torch.bool, device=x_t.device)
        arguments["attention_mask"] = torch.cat([text["t5_mask"].bool(), pictures], dim=1)  # (B, L + N)
    output = denoiser(
        hidden_states=tokens,
        encoder_hidden_states=text["t5"].to(dtype),
        pooled_projections=text["clip_pooled"].to(dtype),
        timestep=level,
        img_ids=image_ids(height, width, x_t.device),
        txt_ids=torch.zeros(text["t5"].shape[1], 3, device=x_t.device),
        guidance=torch.full_like(level, guidance) if module.config.guidance_embeds else None,
        joint_attention_kwargs=arguments or None,
        return_dict=False,
    )[0]
    return unpack(output.float(), height, width)

"""How the transformers of Lumina-Image 2.0 and Lumina-Next are called: the direction of time, signs, positions, masks.

Conventions (Alpha-VLLM's ``Lumina-Image-2.0`` and ``Lumina-T2X``, diffusers' pipelines): both count time from noise (0) to
picture (1), so they take 1 - sigma, and they predict the velocity along that time, latents - noise. Here sigma runs the other way
and the velocity is noise - latents, so the output is negated. Lumina-Next also predicts a variance, which its flow has no use
for: the second half of its channels is dropped.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn


def predict(denoiser: nn.Module, x_t: torch.Tensor, level: torch.Tensor, text: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Velocity (B, C, h, w) float32 for ``x_t`` (B, C, h, w) at ``level`` (B,) = sigma in [0, 1].

    ``text`` holds ``gemma`` (B, L, D) and ``gemma_mask`` (B, L) bool, true for a token; real tokens come first.
    """
    module = getattr(denoiser, "module", denoiser)  # the plain module under DistributedDataParallel
    states, mask = without_common_padding(text["gemma"], text["gemma_mask"])
    time = 1 - level
    if hasattr(module, "context_refiner"):
        dtype = module.x_embedder.weight.dtype
        output = denoiser(hidden_states=x_t.to(dtype), timestep=time, encoder_hidden_states=states.to(dtype),
                          encoder_attention_mask=mask, return_dict=False)[0]
        return -output.float()
    dtype = module.patch_embedder.proj.weight.dtype
    rows, columns = (side // module.patch_size for side in x_t.shape[2:])
    output = denoiser(hidden_states=x_t.to(dtype), timestep=time, encoder_hidden_states=states.to(dtype), encoder_mask=mask,
                      image_rotary_emb=positions(module.head_dim, rows, columns, x_t.device), cross_attention_kwargs={},
                      return_dict=False)[0]
    return -output[:, :x_t.shape[1]].float()


def without_common_padding(states: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, L, D) and (B, L) cut behind the last token of the longest text. (Reads one number back from the device; the module of
    2.0 reads the lengths anyway.)"""
    mask = mask.bool()
    longest = max(int(mask.sum(dim=1).max()), 1)
    return states[:, :longest], mask[:, :longest]


def positions(head_dim: int, rows: int, columns: int, device: torch.device) -> torch.Tensor:
    """Lumina-Next's rotary factors (rows, columns, head_dim / 2) complex64, for the sizes it is trained at: neither stretched nor
    squeezed, as its sampler does for other sizes. A quarter of a millisecond for 1024 x 1024 pixels."""
    from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina

    return get_2d_rotary_pos_embed_lumina(head_dim, rows, columns).to(device)


def blocks(denoiser: nn.Module) -> list[nn.Module]:
    """The layers in the order they run: in 2.0 first those that refine the text, then those that refine the picture."""
    refiners = [*denoiser.context_refiner, *denoiser.noise_refiner] if hasattr(denoiser, "context_refiner") else []
    return [*refiners, *denoiser.layers]

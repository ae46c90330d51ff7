"""How SDXL's U-Net is called, and its blocks: in the order they run, and in the numbering people set learning rates by.

Conventions (Stability AI ``generative-models``, ``UNet2DConditionModel`` of diffusers): the model takes the number of the noise
level, an integer from 0 to 999, the encoded text, and a vector made of the pooled text and six sizes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import zip_longest

import torch
from torch import nn

from library.architectures.sdxl_text import side_by_side
from library.checkpoint.keymap import module_shapes
from library.checkpoint.sdxl_keys import UNET

BLOCK_GROUPS = 23  # as many learning rates does --block_lr take
_INPUT, _MIDDLE, _OUTPUT, _LAST = 1, 10, 13, 22  # the first group of each part


def predict(denoiser: nn.Module, x_t: torch.Tensor, level: torch.Tensor, text: Mapping[str, torch.Tensor],
            geometry: torch.Tensor) -> torch.Tensor:
    """(B, 4, h, w) float32, noise or velocity as the model was trained, for ``x_t`` (B, 4, h, w) at ``level`` (B,) int64, 0..999.

    ``text``: see ``sdxl_text.encode_text``. ``geometry`` (B, 6) in pixels: original height and width, top and
    left of the crop, target height and width; its sinusoids are computed in float32.
    """
    module = getattr(denoiser, "module", denoiser)  # the plain module under DistributedDataParallel
    dtype = module.conv_in.weight.dtype
    conditions = {"text_embeds": text["pooled"].to(dtype), "time_ids": geometry.to(x_t.device, torch.float32)}
    output = denoiser(sample=x_t.to(dtype), timestep=level, encoder_hidden_states=side_by_side(text).to(dtype),
                      added_cond_kwargs=conditions, return_dict=False)[0]
    return output.float()


def blocks(denoiser: nn.Module) -> list[nn.Module]:
    """Residual and transformer blocks in the order they run: down, middle, up. (The module lists the middle last.)

    Norms and projections around the transformers, and the resamplers, are left out: they keep little.
    """
    found: list[nn.Module] = []
    for stage in (*denoiser.down_blocks, denoiser.mid_block, *denoiser.up_blocks):
        for residual, attention in zip_longest(stage.resnets, getattr(stage, "attentions", ())):
            found += [residual, *(attention.transformer_blocks if attention is not None else ())]
    return found


def block_groups(denoiser: nn.Module) -> list[list[tuple[str, nn.Parameter]]]:
    """The parameters with their names, in 23 groups as the dialect numbers them.

    0: embeddings of time and sizes. 1-9: the way down, 10-12: the middle, 13-21: the way up, each by the numbers of the
    original file (a residual block with the attention behind it, or a downsampler); an upsampler belongs to the block before
    it. 22: the output.
    """
    bound = UNET.bind(module_shapes(denoiser))
    group_of = {segment.module_key: _group(original) for original, binding in bound.bindings.items()
                for segment in binding.segments}
    groups: list[list[tuple[str, nn.Parameter]]] = [[] for _ in range(BLOCK_GROUPS)]
    for name, parameter in denoiser.named_parameters():
        groups[group_of[name]].append((name, parameter))
    return groups


def _group(original: str) -> int:
    """Of a name in the original file."""
    match = re.match(r"(input_blocks|middle_block|output_blocks)\.(\d+)\.", original)
    if match:
        return {"input_blocks": _INPUT, "middle_block": _MIDDLE, "output_blocks": _OUTPUT}[match[1]] + int(match[2])
    return _LAST if original.startswith("out.") else 0

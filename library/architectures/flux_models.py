"""FLUX.1's modules from their files: settings read off the tensors' shapes, built on meta, filled strictly.

CLIP-L is loaded by ``clip.load_clip`` and T5 by ``t5.load_t5`` as they are.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from library.architectures import vae
from library.architectures.flux_parts import FluxFile
from library.architectures.loading import config_json, count, load
from library.checkpoint import flux_keys
from library.checkpoint.source import Source
from library.errors import UserError

SCALING, SHIFT = 0.3611, 0.1159  # of the latents; BFL's autoencoder configuration


def load_transformer(file: FluxFile, dtype: torch.dtype | None, device: torch.device | str = "cpu",
                     axes_dims_rope: tuple[int, int, int] | None = None) -> nn.Module:
    """``FluxTransformer2DModel`` in eval mode, nothing trainable yet. ``dtype`` None keeps the file's.

    UserError: keys missing or left over, wrong shapes.
    """
    layouts = [flux_keys.TRANSFORMER] if file.layout == "bfl" else []
    return load(partial(build_transformer, file, axes_dims_rope), file.source, layouts, dtype, device, "transformer")


def build_transformer(file: FluxFile, axes_dims_rope: tuple[int, int, int] | None = None) -> nn.Module:
    """``FluxTransformer2DModel`` as the file's shapes ask for, with weights of its own."""
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(**transformer_config(file, axes_dims_rope))


def transformer_config(file: FluxFile, axes_dims_rope: tuple[int, int, int] | None = None) -> dict[str, Any]:
    """Arguments of ``FluxTransformer2DModel``; ``axes_dims_rope`` overrides the rule and ``config.json``."""
    names = file.source.tensors
    double, single = "transformer_blocks", "single_transformer_blocks"
    if file.layout == "bfl":
        double, single = "double_blocks", "single_blocks"
    saved = config_json(file.source.path, "FluxTransformer2DModel")
    if file.width % file.head_dim:
        raise UserError(f"{file.source.path}: width {file.width} is not a multiple of the head width {file.head_dim}",
                        remedy="this is no FLUX.1 transformer; give another checkpoint")
    return {
        "in_channels": 64, "patch_size": 1, "num_layers": count(names, rf"{double}\.(\d+)\."),
        "num_single_layers": count(names, rf"{single}\.(\d+)\."), "attention_head_dim": file.head_dim,
        "num_attention_heads": file.width // file.head_dim, "joint_attention_dim": file.text_width,
        "pooled_projection_dim": file.pooled_width, "guidance_embeds": file.variant == "dev",
        "axes_dims_rope": tuple(axes_dims_rope or saved.get("axes_dims_rope") or rope_axes(file.head_dim, str(file.source.path))),
    }


def rope_axes(head_dim: int, place: str = "") -> tuple[int, int, int]:
    """Rotary widths of (text id, row, column): an eighth and twice seven sixteenths of the head, as 16 + 56 + 56 = 128.

    UserError when that does not come out even (each axis turns pairs of numbers).
    """
    if head_dim % 32:
        raise UserError(f"heads of width {head_dim} cannot be divided into rotary axes as FLUX.1 divides 128 into 16, 56, 56",
                        place=place, remedy="use a checkpoint whose head width is a multiple of 32, or a folder with config.json")
    return head_dim // 8, head_dim * 7 // 16, head_dim * 7 // 16


def load_vae(source: Source, dtype: torch.dtype | None, device: torch.device | str = "cpu") -> nn.Module:
    """``AutoencoderKL`` in eval mode, frozen, from BFL or diffusers names."""
    return vae.load_vae(source, dtype, device, SCALING, SHIFT, "ae")

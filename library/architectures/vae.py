"""The autoencoder that latent diffusion models share: its module from a file, pictures to latents and back.

What differs between the models (the latents' scale and shift) is an argument and then stands in the module's ``config``.
Letters: B batch, C latent channels, H W picture height and width, h w those of the latent.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from PIL import Image
from torch import nn

from library.architectures.loading import config_json, count, load
from library.checkpoint.autoencoder_keys import AUTOENCODER, AUTOENCODER_OLD, AUTOENCODER_QUANT
from library.checkpoint.keymap import KeyMap
from library.checkpoint.source import Source

NORM_GROUPS = 32
_QUANT = "quant_conv.weight"


def load_vae(source: Source, dtype: torch.dtype | None, device: torch.device | str, scaling: float, shift: float | None,
             place: str) -> nn.Module:
    """``AutoencoderKL`` in eval mode, frozen, from original or diffusers names. Latents are (z - shift) * scaling."""
    return load(lambda: build_vae(source, scaling, shift), source, vae_layouts(source), dtype, device, place)


def build_vae(source: Source, scaling: float, shift: float | None) -> nn.Module:
    """``AutoencoderKL`` as the file's shapes ask for, with weights of its own."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(**vae_config(source, scaling, shift))


def vae_layouts(source: Source) -> list[KeyMap]:
    """The table that fits the names of a file; none for diffusers' own."""
    if "encoder.down.0.block.0.conv1.weight" in source:
        return [AUTOENCODER_QUANT if _QUANT in source else AUTOENCODER]
    return [AUTOENCODER_OLD] if "encoder.mid_block.attentions.0.query.weight" in source else []


def vae_config(source: Source, scaling: float, shift: float | None) -> dict[str, Any]:
    """Arguments of ``AutoencoderKL``. Norm groups: 32, or the largest divisor of 32 that divides every level's channels."""
    names = source.tensors
    original = "encoder.down.0.block.0.conv1.weight" in names
    block = "encoder.down.{}.block.{}.conv1.weight" if original else "encoder.down_blocks.{}.resnets.{}.conv1.weight"
    prefix = r"encoder\.down\.(\d+)\.block\." if original else r"encoder\.down_blocks\.(\d+)\.resnets\."
    channels = tuple(names[block.format(level, 0)].shape[0] for level in range(count(names, prefix)))
    layers = sum(block.format(0, layer) in names for layer in range(16))
    saved = config_json(source.path, "AutoencoderKL")
    return {
        "in_channels": names["encoder.conv_in.weight"].shape[1], "out_channels": names["decoder.conv_out.weight"].shape[0],
        "down_block_types": ("DownEncoderBlock2D",) * len(channels), "up_block_types": ("UpDecoderBlock2D",) * len(channels),
        "block_out_channels": channels, "layers_per_block": layers, "latent_channels": names["decoder.conv_in.weight"].shape[1],
        "norm_num_groups": saved.get("norm_num_groups", math.gcd(NORM_GROUPS, *channels)),
        "sample_size": 1024, "force_upcast": True,
        "use_quant_conv": _QUANT in names, "use_post_quant_conv": f"post_{_QUANT}" in names,
        "scaling_factor": saved.get("scaling_factor", scaling), "shift_factor": saved.get("shift_factor", shift),
    }


@torch.no_grad()
def encode_image(vae: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    """(B, 3, H, W) in [-1, 1] -> (B, C, H/8, W/8) float32: the posterior's mean, (mean - shift) * scaling.

    The mean and not a draw: latents are computed once and cached, and must not depend on a random state. Autocast is left
    out, so that the module runs in the dtype it was loaded in and in no other.
    """
    weight = vae.encoder.conv_in.weight
    with torch.autocast(weight.device.type, enabled=False):
        mean = vae.encode(pixels.to(weight.device, weight.dtype)).latent_dist.mode()
    return (mean.float() - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor


@torch.no_grad()
def decode_image(vae: nn.Module, latents: torch.Tensor) -> torch.Tensor:
    """(B, C, h, w) as ``encode_image`` gives them -> (B, 3, 8h, 8w) float32 in [-1, 1]."""
    weight = vae.decoder.conv_in.weight
    moments = latents.float() / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
    with torch.autocast(weight.device.type, enabled=False):
        return vae.decode(moments.to(weight.device, weight.dtype)).sample.float().clamp(-1, 1)


def to_picture(pixels: torch.Tensor) -> Image.Image:
    """(3, H, W) in [-1, 1] as a picture."""
    return Image.fromarray(((pixels + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy())

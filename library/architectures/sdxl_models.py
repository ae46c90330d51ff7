"""SDXL's modules from their files: settings read off the tensors' shapes, built on meta, filled strictly."""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from torch import nn

from library.architectures import clip, vae
from library.architectures.loading import config_json, count, load
from library.architectures.sdxl_options import SCALING
from library.architectures.sdxl_parts import LATENT_CHANNELS, SIZE_WIDTH, SdxlFile
from library.checkpoint.header import TensorInfo
from library.checkpoint.keymap import KeyMap
from library.checkpoint.sdxl_keys import unet
from library.checkpoint.source import Source
from library.errors import UserError

HEAD_WIDTH = 64


def load_unet(file: SdxlFile, dtype: torch.dtype | None, device: torch.device | str = "cpu") -> nn.Module:
    """``UNet2DConditionModel`` in eval mode, nothing trainable yet. ``dtype`` None keeps the file's.

    UserError: keys missing or left over, wrong shapes.
    """
    return load(lambda: build_unet(file), file.source, unet_layouts(file), dtype, device, "U-Net")


def build_unet(file: SdxlFile) -> nn.Module:
    """``UNet2DConditionModel`` as the file's shapes ask for, with weights of its own."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(**unet_config(file))


def unet_layouts(file: SdxlFile) -> list[KeyMap]:
    """The table of the file's names; none for diffusers' own."""
    return [unet_table(file)] if file.layout == "ldm" else []


def unet_table(file: SdxlFile) -> KeyMap:
    """The names of the single file for a U-Net with this number of levels and layers."""
    return unet(*_structure(file)[:2])


def unet_config(file: SdxlFile) -> dict[str, Any]:
    """Arguments of ``UNet2DConditionModel``. Heads are 64 wide; norm groups 32, or what divides every level's channels."""
    levels, layers, widths, depths, projection = _structure(file)
    saved = config_json(file.source.path, "UNet2DConditionModel")
    uneven = [width for width, depth in zip(widths, depths, strict=True) if depth and width % HEAD_WIDTH]
    if uneven and "attention_head_dim" not in saved:
        raise UserError(f"{file.source.path}: a level of width {uneven[0]} does not divide into heads of {HEAD_WIDTH}",
                        remedy="give a folder that also holds the U-Net's config.json")
    down = tuple("CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in depths)
    return {
        "in_channels": LATENT_CHANNELS, "out_channels": LATENT_CHANNELS, "sample_size": 128, "block_out_channels": widths,
        "layers_per_block": layers, "down_block_types": down,
        "up_block_types": tuple(kind.replace("Down", "Up") for kind in reversed(down)),
        "transformer_layers_per_block": tuple(max(depth, 1) for depth in depths),
        # diffusers' name for a number of heads
        "attention_head_dim": tuple(saved.get("attention_head_dim") or (max(width // HEAD_WIDTH, 1) for width in widths)),
        "cross_attention_dim": file.text_width, "use_linear_projection": projection == 2,
        "norm_num_groups": saved.get("norm_num_groups", math.gcd(vae.NORM_GROUPS, *widths)),
        "addition_embed_type": "text_time", "addition_time_embed_dim": SIZE_WIDTH // 6,
        "projection_class_embeddings_input_dim": file.pooled_width + SIZE_WIDTH,
    }


def _structure(file: SdxlFile) -> tuple[int, int, tuple[int, ...], tuple[int, ...], int]:
    """Levels, residual blocks per level, channels and transformer depth of each level, rank of the attention's projection.

    UserError when attention is not equally deep all over a level: then it is another model with SDXL's key names.
    """
    names = file.source.tensors
    if file.layout == "ldm":
        resampler = re.compile(r"input_blocks\.(\d+)\.0\.op\.weight")
        resamplers = sorted(int(match[1]) for name in names if (match := resampler.fullmatch(name)))
        levels = len(resamplers) + 1
        layers = (resamplers[0] if resamplers else count(names, r"input_blocks\.(\d+)\.")) - 1
        block = [[f"input_blocks.{1 + level * (layers + 1) + layer}.{{}}" for layer in range(layers)] for level in range(levels)]
        parts, first, middle = ("0", "1"), "in_layers.2", "middle_block.1"
        up = [[f"output_blocks.{level * (layers + 1) + layer}.1" for layer in range(layers + 1)] for level in range(levels)]
    else:
        levels, layers = count(names, r"down_blocks\.(\d+)\."), count(names, r"down_blocks\.0\.resnets\.(\d+)\.")
        block = [[f"down_blocks.{level}.{{}}.{layer}" for layer in range(layers)] for level in range(levels)]
        parts, first, middle = ("resnets", "attentions"), "conv1", "mid_block.attentions.0"
        up = [[f"up_blocks.{level}.attentions.{layer}" for layer in range(layers + 1)] for level in range(levels)]

    def depth(attention: str) -> int:
        return count(names, rf"{re.escape(attention)}\.transformer_blocks\.(\d+)\.")

    try:
        widths = tuple(_shape(names, f"{level[0].format(parts[0])}.{first}.weight")[0] for level in block)
        depths = tuple(depth(level[0].format(parts[1])) for level in block)
        attended = next(level[0].format(parts[1]) for level, deep in zip(block, depths, strict=True) if deep)
        projection = len(_shape(names, f"{attended}.proj_in.weight"))
    except (KeyError, IndexError, StopIteration) as error:
        raise _another_structure(file) from error
    found = [{depth(layer.format(parts[1])) for layer in level} for level in block]
    found += [{depth(middle)}] + [{depth(attention) for attention in level} for level in reversed(up)]
    if found != [{deep} for deep in (*depths, depths[-1], *depths)]:
        raise _another_structure(file)
    return levels, layers, widths, depths, projection


def _shape(names: dict[str, TensorInfo], key: str) -> tuple[int, ...]:
    return names[key].shape


def _another_structure(file: SdxlFile) -> UserError:
    return UserError(f"{file.whole.path} has the key names of SDXL but another structure: it may be a pruned or distilled "
                     "relative such as SSD-1B or Vega", remedy="give a checkpoint with the structure of SDXL base 1.0")


def load_clip_l(source: Source, dtype: torch.dtype | None, device: torch.device | str = "cpu") -> nn.Module:
    """The first text encoder, ``CLIPTextModel``."""
    return clip.load_clip(source, dtype, device, "text encoder CLIP-L")


def load_clip_g(source: Source, dtype: torch.dtype | None, device: torch.device | str = "cpu") -> nn.Module:
    """The second text encoder, ``CLIPTextModelWithProjection``; its projection is the file's, transposed where that is needed."""
    return clip.load_projected_clip(source, dtype, device, "text encoder CLIP-G")


def load_vae(source: Source, dtype: torch.dtype | None, device: torch.device | str = "cpu") -> nn.Module:
    """``AutoencoderKL``, never in float16: activations of this autoencoder exceed 65,504 there and every latent becomes NaN.

    float16 is replaced by float32. bfloat16 has the range (and 3 decimal digits less precision, which latents tolerate);
    ``--no_half_vae`` asks for float32 in place of that too.
    """
    return vae.load_vae(source, torch.float32 if dtype == torch.float16 else dtype, device, SCALING, None, "autoencoder")

"""SD3's modules from their files: settings read off the tensors' shapes, built on meta, filled strictly.

T5 is loaded by ``t5.load_t5`` as it is, CLIP-G by ``clip.load_projected_clip``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from library.architectures import clip, clip_states, t5, vae
from library.architectures.loading import load
from library.architectures.sd3_options import SCALING, SHIFT
from library.architectures.sd3_parts import Sd3File
from library.checkpoint.keymap import KeyMap
from library.checkpoint.sd3_keys import mmdit
from library.checkpoint.source import Source, stored_dtype

_TABLE = {"mmdit": "pos_embed", "diffusers": "pos_embed.pos_embed"}


def load_transformer(file: Sd3File, dtype: torch.dtype | None, device: torch.device | str = "cpu") -> nn.Module:
    """``SD3Transformer2DModel`` in eval mode, nothing trainable yet. ``dtype`` None keeps the file's; the table of positions,
    which never trains, always keeps the file's 16 or 32 bits, so that it is written back as it was.

    UserError: keys missing or left over, wrong shapes.
    """
    module = load(lambda: build_transformer(file), file.source, transformer_layouts(file), dtype, device, "transformer")
    stored = stored_dtype(file.source.tensors[_TABLE[file.layout]], None)
    if stored.itemsize > 1 and stored != module.pos_embed.pos_embed.dtype:
        module.pos_embed.pos_embed = file.source.read(_TABLE[file.layout], device=device)
    return module


def build_transformer(file: Sd3File) -> nn.Module:
    """``SD3Transformer2DModel`` as the file's shapes ask for, all on meta: every buffer it has stands in the file."""
    from diffusers import SD3Transformer2DModel

    with torch.device("meta"):
        return SD3Transformer2DModel(**transformer_config(file))


def transformer_config(file: Sd3File) -> dict[str, Any]:
    """Arguments of ``SD3Transformer2DModel``."""
    return {
        "sample_size": 128, "patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": file.depth,
        "attention_head_dim": file.head_width, "num_attention_heads": file.width // file.head_width,
        "joint_attention_dim": file.text_width, "caption_projection_dim": file.width, "pooled_projection_dim": file.pooled_width,
        "pos_embed_max_size": file.positions, "dual_attention_layers": file.dual,
        "qk_norm": "rms_norm" if file.qk_norm else None,
    }


def transformer_layouts(file: Sd3File) -> list[KeyMap]:
    """The table of the file's names; none for diffusers' own."""
    return [mmdit(file.depth)] if file.layout == "mmdit" else []


def load_vae(source: Source, dtype: torch.dtype | None, device: torch.device | str = "cpu") -> nn.Module:
    """``AutoencoderKL`` in eval mode, frozen, from original or diffusers names."""
    return vae.load_vae(source, dtype, device, SCALING, SHIFT, "autoencoder")


def load_encoder(name: str, source: Source, dtype: torch.dtype | None, device: torch.device | str = "cpu") -> nn.Module:
    """Text encoder ``name`` in eval mode, frozen. CLIP-L has a projection where its file has one; published files have none, and
    the pooled vector then is the state itself."""
    title = f"text encoder {name}"
    if name == "t5xxl":
        return t5.load_t5(source, dtype, device)
    if name == "clip_g":
        return clip.load_projected_clip(source, dtype, device, title)
    if is_projected(source):
        return clip.load_projected_clip(source, dtype, device, title, hidden_act="quick_gelu")
    return clip.load_clip(source, dtype, device, title)


def build_encoder(name: str, source: Source) -> nn.Module:
    """The module that ``load_encoder`` fills."""
    if name == "t5xxl":
        return t5.build_t5(source)
    if name == "clip_g":
        return clip.build_projected_clip(source)
    return clip.build_projected_clip(source, "quick_gelu") if is_projected(source) else clip.build_clip(source)


def encoder_layouts(name: str, source: Source) -> tuple[KeyMap, ...]:
    """Tables that the names of an encoder's file may follow."""
    if name == "t5xxl":
        return t5.LAYOUTS
    return clip.PROJECTED_LAYOUTS if name == "clip_g" or is_projected(source) else clip.CLIP_LAYOUTS


def is_projected(source: Source) -> bool:
    """Whether a CLIP file holds the matrix that its pooled vector is multiplied by."""
    return any(name in source for name in ("text_projection.weight", "text_projection"))


def text_blocks(name: str, encoder: nn.Module) -> list[nn.Module]:
    """The layers of an encoder in the order they run."""
    return t5.blocks(encoder) if name == "t5xxl" else clip_states.blocks(encoder)

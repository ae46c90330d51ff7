"""FLUX.1's modules from their files: settings read off the tensors' shapes, built on meta, filled strictly.

CLIP-L is loaded by ``clip.load_clip`` as it is.
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


def load_t5(source: Source, dtype: torch.dtype | None, device: torch.device | str = "cpu") -> nn.Module:
    """``T5EncoderModel`` in eval mode, frozen, embeddings tied.

    In float16 the second projection of every feed-forward stays float32: its sums overflow half precision (transformers'
    ``_keep_in_fp32_modules`` does the same).
    """
    from transformers import T5Config, T5EncoderModel

    config = T5Config(**t5_config(source))
    model = load(lambda: T5EncoderModel(config), source, [flux_keys.T5], dtype, device, "t5xxl")
    for name, module in model.named_modules():
        if name.endswith("DenseReluDense.wo") and module.weight.dtype == torch.float16:
            module.float()
    return model


def t5_config(source: Source) -> dict[str, Any]:
    """Arguments of ``T5Config`` for a gated (v1.1) encoder; the width of a key comes from the relative bias's heads."""
    names = source.tensors
    key = "shared.weight" if "shared.weight" in names else "encoder.embed_tokens.weight"
    vocabulary, width = names[key].shape
    attention = "encoder.block.0.layer.0.SelfAttention"
    buckets, heads = names[f"{attention}.relative_attention_bias.weight"].shape
    layers = count(names, r"encoder\.block\.(\d+)\.")
    return {
        "vocab_size": vocabulary, "d_model": width, "d_kv": names[f"{attention}.q.weight"].shape[0] // heads, "num_heads": heads,
        "d_ff": names["encoder.block.0.layer.1.DenseReluDense.wi_0.weight"].shape[0],
        "num_layers": layers, "num_decoder_layers": layers,
        "relative_attention_num_buckets": buckets, "relative_attention_max_distance": 128, "feed_forward_proj": "gated-gelu",
        "layer_norm_epsilon": 1e-6, "dropout_rate": 0.0, "is_encoder_decoder": False, "use_cache": False,
        "tie_word_embeddings": True, "pad_token_id": 0, "eos_token_id": 1,
    }

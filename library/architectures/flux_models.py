"""FLUX.1's four modules from their files: settings read off the tensors' shapes, built on meta, filled strictly.

Shapes decide every width and depth, so tiny models load like the published ones. What shapes cannot tell (head counts of
CLIP, group counts of the autoencoder) follows the published models' rule, or a ``config.json`` beside the weights.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from library.architectures.flux_parts import FluxFile
from library.checkpoint import flux_keys
from library.checkpoint.keymap import KeyMap, best_fit, identity, module_shapes
from library.checkpoint.reader import build_on_meta, load_module
from library.checkpoint.source import Source
from library.errors import UserError

SCALING, SHIFT = 0.3611, 0.1159  # of the latents; BFL's autoencoder configuration
CLIP_HEAD_WIDTH = 64
NORM_GROUPS = 32


def load_transformer(file: FluxFile, dtype: torch.dtype | None, device: torch.device | str = "cpu",
                     axes_dims_rope: tuple[int, int, int] | None = None) -> nn.Module:
    """``FluxTransformer2DModel`` in eval mode, nothing trainable yet. ``dtype`` None keeps the file's.

    UserError: keys missing or left over, wrong shapes.
    """
    from diffusers import FluxTransformer2DModel

    config = transformer_config(file, axes_dims_rope)
    layouts = [flux_keys.TRANSFORMER] if file.layout == "bfl" else []
    return _load(lambda: FluxTransformer2DModel(**config), file.source, layouts, dtype, device, "transformer")


def transformer_config(file: FluxFile, axes_dims_rope: tuple[int, int, int] | None = None) -> dict[str, Any]:
    """Arguments of ``FluxTransformer2DModel``; ``axes_dims_rope`` overrides the rule and ``config.json``."""
    names = file.source.tensors
    double, single = "transformer_blocks", "single_transformer_blocks"
    if file.layout == "bfl":
        double, single = "double_blocks", "single_blocks"
    saved = _config_json(file.source.path, "FluxTransformer2DModel")
    if file.width % file.head_dim:
        raise UserError(f"{file.source.path}: width {file.width} is not a multiple of the head width {file.head_dim}",
                        remedy="this is no FLUX.1 transformer; give another checkpoint")
    return {
        "in_channels": 64, "patch_size": 1, "num_layers": _count(names, rf"{double}\.(\d+)\."),
        "num_single_layers": _count(names, rf"{single}\.(\d+)\."), "attention_head_dim": file.head_dim,
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
    from diffusers import AutoencoderKL

    config = vae_config(source)
    layouts = [flux_keys.AUTOENCODER] if "encoder.down.0.block.0.conv1.weight" in source.tensors else []
    return _load(lambda: AutoencoderKL(**config), source, layouts, dtype, device, "ae")


def vae_config(source: Source) -> dict[str, Any]:
    """Arguments of ``AutoencoderKL``. Norm groups: 32, or the largest divisor of 32 that divides every level's channels."""
    names = source.tensors
    bfl = "encoder.down.0.block.0.conv1.weight" in names
    block = "encoder.down.{}.block.{}.conv1.weight" if bfl else "encoder.down_blocks.{}.resnets.{}.conv1.weight"
    prefix = r"encoder\.down\.(\d+)\.block\." if bfl else r"encoder\.down_blocks\.(\d+)\.resnets\."
    channels = tuple(names[block.format(level, 0)].shape[0] for level in range(_count(names, prefix)))
    layers = sum(block.format(0, layer) in names for layer in range(16))
    saved = _config_json(source.path, "AutoencoderKL")
    return {
        "in_channels": names["encoder.conv_in.weight"].shape[1], "out_channels": names["decoder.conv_out.weight"].shape[0],
        "down_block_types": ("DownEncoderBlock2D",) * len(channels), "up_block_types": ("UpDecoderBlock2D",) * len(channels),
        "block_out_channels": channels, "layers_per_block": layers, "latent_channels": names["decoder.conv_in.weight"].shape[1],
        "norm_num_groups": saved.get("norm_num_groups", math.gcd(NORM_GROUPS, *channels)),
        "sample_size": 1024, "force_upcast": True,
        "use_quant_conv": False, "use_post_quant_conv": False,
        "scaling_factor": saved.get("scaling_factor", SCALING), "shift_factor": saved.get("shift_factor", SHIFT),
    }


def load_clip(source: Source, dtype: torch.dtype | None, device: torch.device | str = "cpu") -> nn.Module:
    """``CLIPTextModel`` in eval mode, frozen, from files with or without ``text_model.``."""
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(**clip_config(source))
    return _load(lambda: CLIPTextModel(config), source, [flux_keys.CLIP_L, flux_keys.CLIP_L_FLAT], dtype, device, "clip_l")


def clip_config(source: Source) -> dict[str, Any]:
    """Arguments of ``CLIPTextConfig``: heads of 64, and the two last tokens as begin and end, as in the published vocabulary.

    The end token must not stay at the class's habit: transformers reads 2 as "an old config" and anything else as the token
    at whose first place the pooled output is taken.
    """
    names = source.tensors
    prefix = "text_model." if "text_model.embeddings.token_embedding.weight" in names else ""
    vocabulary, width = names[f"{prefix}embeddings.token_embedding.weight"].shape
    saved = _config_json(source.path, "CLIPTextModel")
    if "num_attention_heads" not in saved and width % CLIP_HEAD_WIDTH:
        raise UserError(f"{source.path}: a CLIP of width {width} does not divide into heads of {CLIP_HEAD_WIDTH}",
                        remedy="give a folder that also holds the encoder's config.json")
    return {
        "vocab_size": vocabulary, "hidden_size": width, "projection_dim": width,
        "intermediate_size": names[f"{prefix}encoder.layers.0.mlp.fc1.weight"].shape[0],
        "num_hidden_layers": _count(names, rf"{re.escape(prefix)}encoder\.layers\.(\d+)\."),
        "num_attention_heads": saved.get("num_attention_heads", width // CLIP_HEAD_WIDTH),
        "max_position_embeddings": names[f"{prefix}embeddings.position_embedding.weight"].shape[0],
        "hidden_act": saved.get("hidden_act", "quick_gelu"), "layer_norm_eps": saved.get("layer_norm_eps", 1e-5),
        "bos_token_id": vocabulary - 2, "eos_token_id": vocabulary - 1, "pad_token_id": vocabulary - 1,
    }


def load_t5(source: Source, dtype: torch.dtype | None, device: torch.device | str = "cpu") -> nn.Module:
    """``T5EncoderModel`` in eval mode, frozen, embeddings tied.

    In float16 the second projection of every feed-forward stays float32: its sums overflow half precision (transformers'
    ``_keep_in_fp32_modules`` does the same).
    """
    from transformers import T5Config, T5EncoderModel

    config = T5Config(**t5_config(source))
    model = _load(lambda: T5EncoderModel(config), source, [flux_keys.T5], dtype, device, "t5xxl")
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
    layers = _count(names, r"encoder\.block\.(\d+)\.")
    return {
        "vocab_size": vocabulary, "d_model": width, "d_kv": names[f"{attention}.q.weight"].shape[0] // heads, "num_heads": heads,
        "d_ff": names["encoder.block.0.layer.1.DenseReluDense.wi_0.weight"].shape[0],
        "num_layers": layers, "num_decoder_layers": layers,
        "relative_attention_num_buckets": buckets, "relative_attention_max_distance": 128, "feed_forward_proj": "gated-gelu",
        "layer_norm_epsilon": 1e-6, "dropout_rate": 0.0, "is_encoder_decoder": False, "use_cache": False,
        "tie_word_embeddings": True, "pad_token_id": 0, "eos_token_id": 1,
    }


@torch.no_grad()
def encode_image(vae: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    """(B, 3, H, W) in [-1, 1] -> (B, 16, H/8, W/8) float32: the posterior's mean, (mean - 0.1159) * 0.3611.

    The mean and not a draw: latents are computed once and cached, and must not depend on a random state.
    """
    weight = vae.encoder.conv_in.weight
    mean = vae.encode(pixels.to(weight.device, weight.dtype)).latent_dist.mode()
    return (mean.float() - vae.config.shift_factor) * vae.config.scaling_factor


@torch.no_grad()
def decode_image(vae: nn.Module, latents: torch.Tensor) -> torch.Tensor:
    """(B, 16, h, w) as ``encode_image`` gives them -> (B, 3, 8h, 8w) float32 in [-1, 1]."""
    weight = vae.decoder.conv_in.weight
    moments = latents.float() / vae.config.scaling_factor + vae.config.shift_factor
    return vae.decode(moments.to(weight.device, weight.dtype)).sample.float().clamp(-1, 1)


def _load(factory: Callable[[], nn.Module], source: Source, layouts: Iterable[KeyMap], dtype: torch.dtype | None,
          device: torch.device | str, place: str) -> nn.Module:
    module = build_on_meta(factory).eval().requires_grad_(False)
    shapes = module_shapes(module)
    bounds = [layout.bind(shapes) for layout in layouts] or [identity(shapes)]
    return load_module(module, source, best_fit(source.tensors, bounds), dtype=dtype, device=device, place=place)


def _count(names: Iterable[str], pattern: str) -> int:
    """1 + the largest index that ``pattern`` (its first group) finds at the start of a name."""
    return 1 + max((int(match.group(1)) for name in names if (match := re.match(pattern, name))), default=-1)


def _config_json(path: Path, class_name: str) -> Mapping[str, Any]:
    """``config.json`` of a diffusers folder when it describes ``class_name``; a text of another model is passed over."""
    file = (path if path.is_dir() else path.parent) / "config.json"
    if not file.is_file():
        return {}
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file} is not valid JSON: {error}",
                        remedy="download it again, or remove it: settings are read off the weights") from error
    names = {config.get("_class_name"), *(config.get("architectures") or ())} if isinstance(config, dict) else set()
    return config if class_name in names else {}

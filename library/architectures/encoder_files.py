"""Files of the text encoders and autoencoders that several models share: usual names, and how their headers tell them apart."""

from __future__ import annotations

import re
from collections.abc import Mapping

from library.checkpoint.header import TensorInfo

Tensors = Mapping[str, TensorInfo]
LATENT_LEVELS = 4  # an eighth of the resolution
ENCODERS_REPO = "comfyanonymous/flux_text_encoders"  # CLIP-L and T5-XXL, each alone in a file
T5_FILES = ("t5xxl_fp16.safetensors", "t5xxl.safetensors", "t5xxl_bf16.safetensors", "t5xxl_fp32.safetensors",
            "t5xxl_fp8_e4m3fn_scaled.safetensors", "t5xxl_fp8_e4m3fn.safetensors",
            "google_t5-v1_1-xxl_encoderonly-fp16.safetensors", "google_t5-v1_1-xxl_encoderonly-fp8_e4m3fn.safetensors")
T5_ON_HUB = ("t5xxl_fp16.safetensors", "t5xxl_fp8_e4m3fn_scaled.safetensors", "t5xxl_fp8_e4m3fn.safetensors")


def is_autoencoder(tensors: Tensors, channels: int, quant: bool) -> bool:
    """Of so many latent channels, with or without (``quant``) a convolution beside them, in original or diffusers names."""
    if "decoder.conv_in.weight" not in tensors or ("post_quant_conv.weight" in tensors) is not quant:
        return False
    level = re.compile(r"encoder\.(down|down_blocks)\.\d+\.(block|resnets)\.0\.conv1\.weight")
    levels = [name for name in tensors if level.fullmatch(name)]
    return tensors["decoder.conv_in.weight"].shape[1] == channels and len(levels) == LATENT_LEVELS


def is_t5(tensors: Tensors, width: int) -> bool:
    """A gated T5 encoder (v1.1) of this width with one relative bias for all blocks (a multilingual UMT5 has one each)."""
    key = "encoder.block.0.layer.1.DenseReluDense.wi_0.weight"
    own_bias = "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight"
    return key in tensors and tensors[key].shape[1] == width and own_bias not in tensors


def clip_width(tensors: Tensors) -> int:
    """Width of a CLIP text tower (the vision half may be there too); 0 when it is none."""
    keys = ("text_model.embeddings.token_embedding.weight", "embeddings.token_embedding.weight", "token_embedding.weight")
    return next((tensors[key].shape[1] for key in keys if key in tensors), 0)


def clip_projection_width(tensors: Tensors) -> int:
    """What a CLIP text tower projects its pooled state to; 0 when it does not. (open_clip keeps the matrix transposed.)"""
    if not clip_width(tensors):
        return 0
    if "text_projection" in tensors and len(tensors["text_projection"].shape) == 2:
        return tensors["text_projection"].shape[1]
    return tensors["text_projection.weight"].shape[0] if "text_projection.weight" in tensors else 0

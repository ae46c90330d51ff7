"""A complete FLUX.1 set in the layouts people download, small enough to write in a fraction of a second.

``make_flux_files(folder)`` writes a BFL transformer file, a BFL autoencoder, CLIP-L and T5 encoder files and both
tokenizers, with seeded random weights. Key names and shapes follow the published files; only the widths are tiny.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from zlib import crc32

import torch
from safetensors.torch import save_file

from tools.toy_tokenizers import write_clip_tokenizer, write_t5_tokenizer

Shapes = dict[str, tuple[int, ...]]

VAE_CHANNELS = (32, 32, 32, 32)
CLIP_WIDTH = 64
T5_WIDTH = 64

@dataclass(frozen=True)
class TinyFlux:
    """Where ``make_flux_files`` put things (all below ``folder``)."""

    folder: Path
    checkpoint: Path
    ae: Path
    clip_l: Path
    t5xxl: Path
    clip_l_tokenizer: Path
    t5xxl_tokenizer: Path


def make_flux_files(folder: Path, variant: str = "dev", prefix: str = "", head_dim: int = 32, heads: int = 2,
                    double_blocks: int = 2, single_blocks: int = 2, vae_channels: Sequence[int] = VAE_CHANNELS,
                    layers_per_block: int = 1, dtype: torch.dtype = torch.float32, encoder_dtype: torch.dtype | None = None,
                    metadata: Mapping[str, str] | None = None, seed: int = 0) -> TinyFlux:
    """Write the whole set under ``folder`` with the usual names, so that every part is found beside the checkpoint.

    ``variant`` "dev" has a guidance embedding, "schnell" has none. ``prefix`` goes before every transformer key.
    ``dtype`` is the transformer's, ``encoder_dtype`` that of the other three (default: the same).
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files = TinyFlux(folder, folder / f"flux1-{variant}.safetensors", folder / "ae.safetensors", folder / "clip_l.safetensors",
                     folder / "t5xxl_fp16.safetensors", folder / "clip_l_tokenizer", folder / "t5xxl_tokenizer")
    clip_tokens = write_clip_tokenizer(files.clip_l_tokenizer)
    t5_tokens = write_t5_tokenizer(files.t5xxl_tokenizer)
    encoder_dtype = encoder_dtype or dtype
    transformer = transformer_shapes(heads * head_dim, head_dim, double_blocks, single_blocks, variant == "dev")
    save(files.checkpoint, {prefix + name: shape for name, shape in transformer.items()}, dtype, metadata, seed)
    save(files.ae, autoencoder_shapes(vae_channels, layers_per_block), encoder_dtype, None, seed + 1)
    save(files.clip_l, clip_shapes(clip_tokens), encoder_dtype, None, seed + 2)
    save(files.t5xxl, t5_shapes(t5_tokens), encoder_dtype, None, seed + 3)
    return files


def make_all_in_one(path: Path, variant: str = "dev", dtype: torch.dtype = torch.float32, seed: int = 0) -> Path:
    """Transformer, autoencoder and both encoders in one file under the prefixes of ComfyUI; tokenizers stand beside it."""
    path = Path(path)
    clip_tokens = write_clip_tokenizer(path.parent / "clip_l_tokenizer")
    t5_tokens = write_t5_tokenizer(path.parent / "t5xxl_tokenizer")
    parts = {"model.diffusion_model.": transformer_shapes(64, 32, 2, 2, variant == "dev"),
             "vae.": autoencoder_shapes(VAE_CHANNELS, 1),
             "text_encoders.clip_l.transformer.": clip_shapes(clip_tokens) | {"text_projection.weight": (CLIP_WIDTH, CLIP_WIDTH)},
             "text_encoders.clip_l.": {"logit_scale": ()},
             "text_encoders.t5xxl.": {"logit_scale": ()},
             "text_encoders.t5xxl.transformer.": t5_shapes(t5_tokens, duplicate_embedding=False)}
    save(path, {prefix + name: shape for prefix, shapes in parts.items() for name, shape in shapes.items()}, dtype, None, seed)
    return path


def save(path: Path, shapes: Shapes, dtype: torch.dtype, metadata: Mapping[str, str] | None = None, seed: int = 0) -> None:
    """A safetensors file of seeded random weights."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: random_weight(name, shape, seed).to(dtype) for name, shape in shapes.items()}
    if "shared.weight" in tensors and "encoder.embed_tokens.weight" in tensors:
        tensors["encoder.embed_tokens.weight"] = tensors["shared.weight"].clone()
    save_file(tensors, str(path), dict(metadata) if metadata else None)


def random_weight(name: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Values that keep activations near 1: norms start at one, biases near zero, matrices at 1/sqrt(fan-in)."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + crc32(name.encode()))
    noise = torch.randn(shape, generator=generator)
    if name.endswith((".scale", "norm.weight", "norm1.weight", "norm2.weight", "norm_out.weight")):
        return 1 + 0.1 * noise
    if len(shape) < 2:
        return 0.02 * noise
    return noise / math.sqrt(math.prod(shape[1:]))


def transformer_shapes(hidden: int, head_dim: int, double_blocks: int, single_blocks: int, guidance: bool,
                       text_width: int = T5_WIDTH, pooled_width: int = CLIP_WIDTH, tokens_in: int = 64) -> Shapes:
    """Names and shapes of a BFL transformer file (compare ``flux1-dev.safetensors``)."""
    shapes: Shapes = {}

    def linear(name: str, out: int, width: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (out, width), (out,)

    linear("img_in", hidden, tokens_in)
    linear("txt_in", hidden, text_width)
    embedders = {"time_in": 256, "vector_in": pooled_width} | ({"guidance_in": 256} if guidance else {})
    for name, width in embedders.items():
        linear(f"{name}.in_layer", hidden, width)
        linear(f"{name}.out_layer", hidden, hidden)
    for index in range(double_blocks):
        for stream in ("img", "txt"):
            block = f"double_blocks.{index}.{stream}"
            linear(f"{block}_mod.lin", 6 * hidden, hidden)
            linear(f"{block}_attn.qkv", 3 * hidden, hidden)
            linear(f"{block}_attn.proj", hidden, hidden)
            shapes[f"{block}_attn.norm.query_norm.scale"] = shapes[f"{block}_attn.norm.key_norm.scale"] = (head_dim,)
            linear(f"{block}_mlp.0", 4 * hidden, hidden)
            linear(f"{block}_mlp.2", hidden, 4 * hidden)
    for index in range(single_blocks):
        block = f"single_blocks.{index}"
        linear(f"{block}.linear1", 7 * hidden, hidden)
        linear(f"{block}.linear2", hidden, 5 * hidden)
        shapes[f"{block}.norm.query_norm.scale"] = shapes[f"{block}.norm.key_norm.scale"] = (head_dim,)
        linear(f"{block}.modulation.lin", 3 * hidden, hidden)
    linear("final_layer.adaLN_modulation.1", 2 * hidden, hidden)
    linear("final_layer.linear", 64, hidden)
    return shapes


def autoencoder_shapes(channels: Sequence[int], layers: int, latent: int = 16) -> Shapes:
    """Names and shapes of a BFL autoencoder file (compare ``ae.safetensors``)."""
    shapes: Shapes = {}

    def conv(name: str, out: int, into: int, kernel: int = 3) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (out, into, kernel, kernel), (out,)

    def norm(name: str, width: int) -> None:
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (width,)

    def residual(name: str, out: int, into: int) -> None:
        norm(f"{name}.norm1", into)
        conv(f"{name}.conv1", out, into)
        norm(f"{name}.norm2", out)
        conv(f"{name}.conv2", out, out)
        if out != into:
            conv(f"{name}.nin_shortcut", out, into, 1)

    def ends(side: str, into: int, first: int, last: int, out: int) -> None:
        conv(f"{side}.conv_in", first, into)
        conv(f"{side}.conv_out", out, last)
        norm(f"{side}.norm_out", last)
        top = channels[-1]
        residual(f"{side}.mid.block_1", top, top)
        residual(f"{side}.mid.block_2", top, top)
        norm(f"{side}.mid.attn_1.norm", top)
        for part in ("q", "k", "v", "proj_out"):
            conv(f"{side}.mid.attn_1.{part}", top, top, 1)

    ends("encoder", 3, channels[0], channels[-1], 2 * latent)
    ends("decoder", latent, channels[-1], channels[0], 3)
    width = channels[0]
    for level, out in enumerate(channels):
        for layer in range(layers):
            residual(f"encoder.down.{level}.block.{layer}", out, width)
            width = out
        if level < len(channels) - 1:
            conv(f"encoder.down.{level}.downsample.conv", out, out)
    for level, out in reversed(list(enumerate(channels))):
        for layer in range(layers + 1):
            residual(f"decoder.up.{level}.block.{layer}", out, width)
            width = out
        if level > 0:
            conv(f"decoder.up.{level}.upsample.conv", out, out)
    return shapes


def clip_shapes(vocabulary: int, width: int = CLIP_WIDTH, layers: int = 2) -> Shapes:
    """Names and shapes of ``clip_l.safetensors``."""
    shapes: Shapes = {"text_model.embeddings.position_embedding.weight": (77, width),
                      "text_model.embeddings.token_embedding.weight": (vocabulary, width)}
    for index in range(layers):
        layer = f"text_model.encoder.layers.{index}"
        sizes = {f"self_attn.{part}": (width, width) for part in ("q_proj", "k_proj", "v_proj", "out_proj")}
        sizes |= {"mlp.fc1": (4 * width, width), "mlp.fc2": (width, 4 * width)}
        for part, (out, into) in sizes.items():
            shapes[f"{layer}.{part}.weight"], shapes[f"{layer}.{part}.bias"] = (out, into), (out,)
        for part in ("layer_norm1", "layer_norm2"):
            shapes[f"{layer}.{part}.weight"] = shapes[f"{layer}.{part}.bias"] = (width,)
    shapes["text_model.final_layer_norm.weight"] = shapes["text_model.final_layer_norm.bias"] = (width,)
    return shapes


def t5_shapes(vocabulary: int, width: int = T5_WIDTH, heads: int = 4, key_width: int = 16, inner: int = 128, layers: int = 2,
              duplicate_embedding: bool = True) -> Shapes:
    """Names and shapes of ``t5xxl_fp16.safetensors`` (which stores the embedding twice)."""
    shapes: Shapes = {"shared.weight": (vocabulary, width)}
    if duplicate_embedding:
        shapes["encoder.embed_tokens.weight"] = (vocabulary, width)
    for index in range(layers):
        block = f"encoder.block.{index}.layer"
        for part in ("q", "k", "v"):
            shapes[f"{block}.0.SelfAttention.{part}.weight"] = (heads * key_width, width)
        shapes[f"{block}.0.SelfAttention.o.weight"] = (width, heads * key_width)
        shapes[f"{block}.1.DenseReluDense.wi_0.weight"] = shapes[f"{block}.1.DenseReluDense.wi_1.weight"] = (inner, width)
        shapes[f"{block}.1.DenseReluDense.wo.weight"] = (width, inner)
        shapes[f"{block}.0.layer_norm.weight"] = shapes[f"{block}.1.layer_norm.weight"] = (width,)
    shapes["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"] = (32, heads)
    shapes["encoder.final_layer_norm.weight"] = (width,)
    return shapes

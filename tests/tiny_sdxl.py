"""A complete SDXL checkpoint in the layout people download, small enough to write in a fraction of a second.

``make_sdxl_files(folder)`` writes the single file (U-Net, CLIP-L, OpenCLIP-G with packed attention, autoencoder, the two tensors
that belong to no module) and both tokenizers beside it, with seeded random weights. Key names and shapes follow the published
file; only the widths are tiny.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.tiny import Shapes, autoencoder_shapes, clip_shapes, random_weight
from tools.toy_tokenizers import write_clip_tokenizer

UNET, CLIP_L, CLIP_G = "model.diffusion_model.", "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."
VAE = "first_stage_model."
CHANNELS, DEPTHS = (32, 64, 64), (0, 1, 2)  # SDXL has (320, 640, 1280) and (0, 2, 10)
WIDTH = 64  # of either text encoder
SIZES = 6 * 256


@dataclass(frozen=True)
class TinySdxl:
    """Where ``make_sdxl_files`` put things (all below ``folder``)."""

    folder: Path
    checkpoint: Path
    tokenizer: Path
    tokenizer_2: Path


def make_sdxl_files(folder: Path, markers: Sequence[str] = (), dtype: torch.dtype = torch.float32,
                    metadata: Mapping[str, str] | None = None, seed: int = 0, **unet) -> TinySdxl:
    """Write the checkpoint and its tokenizers. ``markers``: names of empty tensors (``v_pred``, ``ztsnr``) to put in as well."""
    folder = Path(folder)
    files = TinySdxl(folder, folder / "sd_xl_tiny.safetensors", folder / "tokenizer", folder / "tokenizer_2")
    vocabulary = write_clip_tokenizer(files.tokenizer)
    write_clip_tokenizer(files.tokenizer_2)
    tensors = checkpoint_tensors(vocabulary, dtype, seed, **unet) | {name: torch.tensor([]) for name in markers}
    save_file(tensors, str(files.checkpoint), dict(metadata) if metadata else None)
    return files


def checkpoint_tensors(vocabulary: int, dtype: torch.dtype = torch.float32, seed: int = 0, **unet) -> dict[str, torch.Tensor]:
    """Everything in the file, by name."""
    tensors = {name: weight(name, shape, seed).to(dtype) for name, shape in checkpoint_shapes(vocabulary, **unet).items()}
    return tensors | {f"{CLIP_L}text_model.embeddings.position_ids": torch.arange(77)[None]}


def weight(name: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Norm scales around one, the rest as ``tiny.random_weight`` has it."""
    noise = random_weight(name, shape, seed)
    scale = len(shape) == 1 and name.endswith((".0.weight", "ln_1.weight", "ln_2.weight", "ln_final.weight"))
    return 1 + noise if scale else noise


def checkpoint_shapes(vocabulary: int, **unet) -> Shapes:
    parts = {UNET: unet_shapes(**unet), CLIP_L: clip_shapes(vocabulary, WIDTH), CLIP_G: open_clip_shapes(vocabulary, WIDTH),
             VAE: vae_shapes()}
    return {prefix + name: shape for prefix, shapes in parts.items() for name, shape in shapes.items()}


def vae_shapes(channels: Sequence[int] = (32, 32, 32, 32), layers: int = 1) -> Shapes:
    """Names and shapes of ``sdxl_vae.safetensors``: 4 latent channels, a convolution on either side of them."""
    return autoencoder_shapes(channels, layers, latent=4) | {
        "quant_conv.weight": (8, 8, 1, 1), "quant_conv.bias": (8,),
        "post_quant_conv.weight": (4, 4, 1, 1), "post_quant_conv.bias": (4,)}


def open_clip_shapes(vocabulary: int, width: int, layers: int = 3, projection: int | None = None) -> Shapes:
    """Names and shapes of the second encoder, as open_clip writes it."""
    shapes: Shapes = {"token_embedding.weight": (vocabulary, width), "positional_embedding": (77, width),
                      "text_projection": (width, projection or width), "logit_scale": (),
                      "ln_final.weight": (width,), "ln_final.bias": (width,)}
    for index in range(layers):
        block = f"transformer.resblocks.{index}"
        shapes[f"{block}.attn.in_proj_weight"], shapes[f"{block}.attn.in_proj_bias"] = (3 * width, width), (3 * width,)
        for name, (out, into) in {"attn.out_proj": (width, width), "mlp.c_fc": (4 * width, width),
                                  "mlp.c_proj": (width, 4 * width)}.items():
            shapes[f"{block}.{name}.weight"], shapes[f"{block}.{name}.bias"] = (out, into), (out,)
        for name in ("ln_1", "ln_2"):
            shapes[f"{block}.{name}.weight"] = shapes[f"{block}.{name}.bias"] = (width,)
    return shapes


def unet_shapes(channels: Sequence[int] = CHANNELS, depths: Sequence[int] = DEPTHS, layers: int = 2, latent: int = 4,
                text: int = 2 * WIDTH, pooled: int = WIDTH) -> Shapes:
    """Names and shapes of the U-Net in the single file."""
    shapes: Shapes = {}
    time = 4 * channels[0]

    def affine(name: str, out: int, *into: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (out, *into), (out,)

    def residual(name: str, out: int, into: int) -> None:
        affine(f"{name}.in_layers.0", into)
        affine(f"{name}.in_layers.2", out, into, 3, 3)
        affine(f"{name}.emb_layers.1", out, time)
        affine(f"{name}.out_layers.0", out)
        affine(f"{name}.out_layers.3", out, out, 3, 3)
        if out != into:
            affine(f"{name}.skip_connection", out, into, 1, 1)

    def attention(name: str, width: int, depth: int) -> None:
        affine(f"{name}.norm", width)
        affine(f"{name}.proj_in", width, width)
        for index in range(depth):
            block = f"{name}.transformer_blocks.{index}"
            for part, source in (("attn1", width), ("attn2", text)):
                shapes[f"{block}.{part}.to_q.weight"] = (width, width)
                shapes[f"{block}.{part}.to_k.weight"] = shapes[f"{block}.{part}.to_v.weight"] = (width, source)
                affine(f"{block}.{part}.to_out.0", width, width)
            affine(f"{block}.ff.net.0.proj", 8 * width, width)
            affine(f"{block}.ff.net.2", width, 4 * width)
            for norm in ("norm1", "norm2", "norm3"):
                affine(f"{block}.{norm}", width)
        affine(f"{name}.proj_out", width, width)

    for name, width in (("time_embed", channels[0]), ("label_emb.0", pooled + SIZES)):
        affine(f"{name}.0", time, width)
        affine(f"{name}.2", time, time)
    affine("input_blocks.0.0", channels[0], latent, 3, 3)
    skipped, number, width = [channels[0]], 1, channels[0]
    for level, (out, depth) in enumerate(zip(channels, depths, strict=True)):
        for _ in range(layers):
            residual(f"input_blocks.{number}.0", out, width)
            if depth:
                attention(f"input_blocks.{number}.1", out, depth)
            width, number = out, number + 1
            skipped.append(out)
        if level < len(channels) - 1:
            affine(f"input_blocks.{number}.0.op", out, out, 3, 3)
            number += 1
            skipped.append(out)
    residual("middle_block.0", width, width)
    attention("middle_block.1", width, depths[-1])
    residual("middle_block.2", width, width)
    number = 0
    for level, (out, depth) in reversed(list(enumerate(zip(channels, depths, strict=True)))):
        for layer in range(layers + 1):
            residual(f"output_blocks.{number}.0", out, width + skipped.pop())
            if depth:
                attention(f"output_blocks.{number}.1", out, depth)
            if level > 0 and layer == layers:
                affine(f"output_blocks.{number}.2.conv", out, out, 3, 3)
            width, number = out, number + 1
    affine("out.0", channels[0])
    affine("out.2", 4, channels[0], 3, 3)
    return shapes

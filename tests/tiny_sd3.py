"""A complete SD3 set in the layouts people download, small enough to write in a fraction of a second.

``make_sd3_files(folder, variant)`` writes the single file (transformer and autoencoder; with ``embedded`` the named text encoders
too), files for the other encoders, and the tokenizers beside it, with seeded random weights. Key names and shapes follow the
published files; only the widths are tiny.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.tiny import Shapes, autoencoder_shapes, clip_shapes, random_weight, t5_shapes
from tools.toy_tokenizers import write_clip_tokenizer, write_t5_tokenizer

VARIANTS = ("sd3-medium", "sd3.5-medium", "sd3.5-large")
MMDIT, VAE = "model.diffusion_model.", "first_stage_model."
L_WIDTH, G_WIDTH, T5_WIDTH = 64, 128, 256  # SD3: 768, 1280, 4096; both CLIPs side by side are narrower than T5
POOLED = L_WIDTH + G_WIDTH
DEPTH, HEAD = 3, 64
POSITIONS, SPACING = 24, 1 / 3  # SD3-medium: 192 cells a side, a third apart
DUAL = (0, 1)
ENCODERS = ("clip_l", "clip_g", "t5xxl")


@dataclass(frozen=True)
class TinySd3:
    """Where ``make_sd3_files`` put things (all below ``folder``)."""

    folder: Path
    checkpoint: Path
    encoders: Mapping[str, Path]
    """Those that have a file of their own."""
    tokenizers: Mapping[str, Path]


def make_sd3_files(folder: Path, variant: str = "sd3-medium", embedded: Sequence[str] = (), prefix: str = MMDIT,
                   with_vae: bool = True, dtype: torch.dtype = torch.float32, encoder_dtype: torch.dtype | None = None,
                   metadata: Mapping[str, str] | None = None, seed: int = 0, **sizes) -> TinySd3:
    """``embedded``: encoders that stand in the checkpoint and not in files of their own."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizers = {name: folder / f"{name}_tokenizer" for name in ENCODERS}
    vocabulary = {name: (write_t5_tokenizer if name == "t5xxl" else write_clip_tokenizer)(path) for name, path in tokenizers.items()}
    tensors = {prefix + name: tensor.to(dtype) for name, tensor in mmdit_tensors(variant, seed, **sizes).items()}
    if with_vae:
        tensors |= {VAE + name: tensor.to(dtype) for name, tensor in _random(autoencoder_shapes((32,) * 4, 1), seed + 1).items()}
    paths = {}
    for number, name in enumerate(ENCODERS):
        part = {key: tensor.to(encoder_dtype or dtype)
                for key, tensor in _random(encoder_shapes(name, vocabulary[name]), seed + 2 + number).items()}
        if name in embedded:
            tensors |= {f"text_encoders.{name}.transformer.{key}": tensor for key, tensor in part.items()}
        else:
            paths[name] = folder / ("t5xxl_fp16.safetensors" if name == "t5xxl" else f"{name}.safetensors")
            save_file(part, str(paths[name]))
    checkpoint = folder / f"{variant.replace('-', '_')}.safetensors"
    save_file(tensors, str(checkpoint), dict(metadata) if metadata else None)
    return TinySd3(folder, checkpoint, paths, tokenizers)


def _random(shapes: Shapes, seed: int) -> dict[str, torch.Tensor]:
    tensors = {name: random_weight(name, shape, seed) for name, shape in shapes.items()}
    if "shared.weight" in tensors and "encoder.embed_tokens.weight" in tensors:
        tensors["encoder.embed_tokens.weight"] = tensors["shared.weight"].clone()
    return tensors


def encoder_shapes(name: str, vocabulary: int) -> Shapes:
    """Names and shapes of ``clip_l.safetensors``, ``clip_g.safetensors`` or ``t5xxl_fp16.safetensors``."""
    if name == "t5xxl":
        return t5_shapes(vocabulary, T5_WIDTH)
    if name == "clip_l":
        return clip_shapes(vocabulary, L_WIDTH)
    return clip_shapes(vocabulary, G_WIDTH, layers=3) | {"text_projection.weight": (G_WIDTH, G_WIDTH)}


def mmdit_tensors(variant: str, seed: int, **sizes) -> dict[str, torch.Tensor]:
    """The transformer of the single file. Its table of positions is a true one."""
    from library.architectures.sd3_positions import table

    tensors = {}
    for name, shape in mmdit_shapes(variant, **sizes).items():
        norm = name.endswith(("ln_q.weight", "ln_k.weight"))
        tensors[name] = random_weight(f"{name}.scale" if norm else name, shape, seed)
    size = round(tensors["pos_embed"].shape[1] ** 0.5)
    return tensors | {"pos_embed": table(size, SPACING, tensors["pos_embed"].shape[2])}


def mmdit_shapes(variant: str, depth: int = DEPTH, heads: int = 2, channels: int = 16, positions: int = POSITIONS) -> Shapes:
    """Names and shapes of the transformer in the single file."""
    width, qk_norm = heads * HEAD, variant != "sd3-medium"
    shapes: Shapes = {"pos_embed": (1, positions * positions, width)}

    def affine(name: str, out: int, *into: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (out, *into), (out,)

    def attention(name: str, proj: bool = True) -> None:
        affine(f"{name}.qkv", 3 * width, width)
        if proj:
            affine(f"{name}.proj", width, width)
        if qk_norm:
            shapes[f"{name}.ln_q.weight"] = shapes[f"{name}.ln_k.weight"] = (HEAD,)

    affine("x_embedder.proj", width, channels, 2, 2)
    affine("context_embedder", width, T5_WIDTH)
    for name, into in (("t_embedder", 256), ("y_embedder", POOLED)):
        affine(f"{name}.mlp.0", width, into)
        affine(f"{name}.mlp.2", width, width)
    for index in range(depth):
        block, last = f"joint_blocks.{index}", index == depth - 1
        second = variant == "sd3.5-medium" and index in DUAL
        affine(f"{block}.x_block.adaLN_modulation.1", (9 if second else 6) * width, width)
        affine(f"{block}.context_block.adaLN_modulation.1", (2 if last else 6) * width, width)
        attention(f"{block}.x_block.attn")
        if second:
            attention(f"{block}.x_block.attn2")
        attention(f"{block}.context_block.attn", proj=not last)
        for stream in ("x_block", *([] if last else ["context_block"])):
            affine(f"{block}.{stream}.mlp.fc1", 4 * width, width)
            affine(f"{block}.{stream}.mlp.fc2", width, 4 * width)
    affine("final_layer.adaLN_modulation.1", 2 * width, width)
    affine("final_layer.linear", 64, width)
    return shapes

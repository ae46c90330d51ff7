"""Complete sets of Lumina-Image 2.0 and of Lumina-Next in the layouts people download, small enough to write in no time.

``make_image_2_files`` and ``make_next_files`` write a transformer in its original layout, a Gemma encoder, an autoencoder and
a tokenizer, with seeded random weights; ``make_all_in_one`` puts those of 2.0 into one file as ComfyUI does. Names and shapes
follow the published files; only the widths are tiny.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.tiny import VAE_CHANNELS, Shapes, autoencoder_shapes, random_weight
from tests.tiny_sdxl import vae_shapes
from tools.toy_tokenizers import write_gemma_tokenizer

TEXT_WIDTH = 32
HEADS = 8  # of a Gemma, which no shape tells


@dataclass(frozen=True)
class TinyLumina:
    """Where things were put (all below ``folder``)."""

    folder: Path
    checkpoint: Path
    gemma: Path
    ae: Path
    tokenizer: Path


def make_image_2_files(folder: Path, prefix: str = "", dtype: torch.dtype = torch.float32, seed: int = 0,
                       text_width: int = TEXT_WIDTH) -> TinyLumina:
    """Lumina-Image 2.0 with the usual names, so that every part is found beside the checkpoint."""
    folder = Path(folder)
    files = TinyLumina(folder, folder / "lumina_2_model_bf16.safetensors", folder / "gemma_2_2b_fp16.safetensors",
                       folder / "ae.safetensors", folder / "tokenizer")
    vocabulary = write_gemma_tokenizer(files.tokenizer)
    save(files.checkpoint, {prefix + name: shape for name, shape in image_2_shapes(text_width=text_width).items()}, dtype, seed)
    save(files.gemma, gemma_shapes(vocabulary, second=True, width=text_width) | {"spiece_model": (11,)}, dtype, seed + 1)
    save(files.ae, autoencoder_shapes(VAE_CHANNELS, 1), dtype, seed + 2)
    return files


def make_next_files(folder: Path, dtype: torch.dtype = torch.float32, seed: int = 0, text_width: int = TEXT_WIDTH) -> TinyLumina:
    """The same for Lumina-Next."""
    folder = Path(folder)
    files = TinyLumina(folder, folder / "consolidated.00-of-01.safetensors", folder / "gemma_2b.safetensors",
                       folder / "sdxl_vae.safetensors", folder / "tokenizer")
    vocabulary = write_gemma_tokenizer(files.tokenizer)
    save(files.checkpoint, next_shapes(text_width=text_width), dtype, seed)
    save(files.gemma, gemma_shapes(vocabulary, second=False, width=text_width), dtype, seed + 1)
    save(files.ae, vae_shapes(), dtype, seed + 2)
    return files


def make_all_in_one(path: Path, dtype: torch.dtype = torch.float32, seed: int = 0) -> Path:
    """Lumina-Image 2.0 in one file under the prefixes of ComfyUI; the tokenizer stands beside it."""
    vocabulary = write_gemma_tokenizer(path.parent / "tokenizer")
    gemma = "text_encoders.gemma2_2b."
    parts = {"model.diffusion_model.": image_2_shapes(), "vae.": autoencoder_shapes(VAE_CHANNELS, 1),
             f"{gemma}transformer.": gemma_shapes(vocabulary, second=True), gemma: {"logit_scale": ()},
             "text_encoders.": {"spiece_model": (11,)}}
    save(path, {prefix + name: shape for prefix, shapes in parts.items() for name, shape in shapes.items()}, dtype, seed)
    return path


def save(path: Path, shapes: Shapes, dtype: torch.dtype, seed: int) -> None:
    """A safetensors file of seeded random weights."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: weight(name, shape, seed, dtype) for name, shape in shapes.items()}, str(path))


def weight(name: str, shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    if name.endswith("spiece_model"):
        return torch.arange(shape[0], dtype=torch.uint8)
    noise = random_weight(name, shape, seed)
    if name.endswith(("layernorm.weight", "model.norm.weight")):
        return (noise - 1).to(dtype)  # Gemma scales by one more than this
    if name.endswith("embed_tokens.weight"):
        return (noise * shape[1]**0.5).to(dtype)
    return (1 + noise if name.endswith(("cap_embedder.0.weight", "norm_final.weight")) else noise).to(dtype)


def image_2_shapes(width: int = 48, heads: int = 2, key_heads: int = 1, layers: int = 2, refiners: int = 2, inner: int = 64,
                   text_width: int = TEXT_WIDTH, channels: int = 16) -> Shapes:
    """Names and shapes of Lumina-Image 2.0's original file."""
    shapes: Shapes = {"norm_final.weight": (width,)}
    head_dim = width // heads
    for place, count in (("noise_refiner", refiners), ("context_refiner", refiners), ("layers", layers)):
        for index in range(count):
            block = f"{place}.{index}"
            shapes[f"{block}.attention.qkv.weight"] = (width + 2 * key_heads * head_dim, width)
            shapes[f"{block}.attention.out.weight"] = (width, width)
            shapes[f"{block}.attention.q_norm.weight"] = shapes[f"{block}.attention.k_norm.weight"] = (head_dim,)
            if place != "context_refiner":
                _linear(shapes, f"{block}.adaLN_modulation.1", 4 * width, width)
            _rest_of_layer(shapes, block, width, inner)
    _linear(shapes, "x_embedder", width, 4 * channels)
    _ends(shapes, width, 4 * channels)
    shapes["cap_embedder.0.weight"] = (text_width,)
    _linear(shapes, "cap_embedder.1", width, text_width)
    return shapes


def next_shapes(width: int = 48, heads: int = 4, key_heads: int = 2, layers: int = 2, inner: int = 64,
                text_width: int = TEXT_WIDTH, channels: int = 4) -> Shapes:
    """Names and shapes of Lumina-Next's original file."""
    shapes: Shapes = {"pad_token": (width,)}
    keys = key_heads * width // heads
    for index in range(layers):
        block = f"layers.{index}"
        shapes[f"{block}.attention.gate"] = (heads,)
        for name, (out, into) in {"wq": (width, width), "wk": (keys, width), "wv": (keys, width), "wk_y": (keys, text_width),
                                  "wv_y": (keys, text_width), "wo": (width, width)}.items():
            shapes[f"{block}.attention.{name}.weight"] = (out, into)
        for name, size in (("q_norm", width), ("k_norm", keys), ("ky_norm", keys)):
            shapes[f"{block}.attention.{name}.weight"] = shapes[f"{block}.attention.{name}.bias"] = (size,)
        shapes[f"{block}.attention_y_norm.weight"] = (text_width,)
        _linear(shapes, f"{block}.adaLN_modulation.1", 4 * width, width)
        _rest_of_layer(shapes, block, width, inner)
    _linear(shapes, "x_embedder", width, 4 * channels)
    _ends(shapes, width, 8 * channels)
    shapes["cap_embedder.0.weight"] = shapes["cap_embedder.0.bias"] = (text_width,)
    _linear(shapes, "cap_embedder.1", width, text_width)
    return shapes


def _linear(shapes: Shapes, name: str, out: int, into: int) -> None:
    shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (out, into), (out,)


def _rest_of_layer(shapes: Shapes, block: str, width: int, inner: int) -> None:
    for name, (out, into) in {"w1": (inner, width), "w2": (width, inner), "w3": (inner, width)}.items():
        shapes[f"{block}.feed_forward.{name}.weight"] = (out, into)
    for name in ("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2"):
        shapes[f"{block}.{name}.weight"] = (width,)


def _ends(shapes: Shapes, width: int, out: int) -> None:
    """The time embedding and the last layer, which both families have."""
    _linear(shapes, "t_embedder.mlp.0", width, 256)
    _linear(shapes, "t_embedder.mlp.2", width, width)
    _linear(shapes, "final_layer.adaLN_modulation.1", width, width)
    _linear(shapes, "final_layer.linear", out, width)


def gemma_shapes(vocabulary: int, second: bool, width: int = TEXT_WIDTH, head_dim: int = 8, key_heads: int = 4, layers: int = 3,
                 inner: int = 64, prefix: str = "model.") -> Shapes:
    """Names and shapes of a Gemma (2) encoder file."""
    shapes: Shapes = {f"{prefix}embed_tokens.weight": (vocabulary, width), f"{prefix}norm.weight": (width,)}
    norms = ("input_layernorm", "post_attention_layernorm")
    norms += ("pre_feedforward_layernorm", "post_feedforward_layernorm") if second else ()
    for index in range(layers):
        layer = f"{prefix}layers.{index}"
        sizes = {"self_attn.q_proj": (HEADS * head_dim, width), "self_attn.k_proj": (key_heads * head_dim, width),
                 "self_attn.v_proj": (key_heads * head_dim, width), "self_attn.o_proj": (width, HEADS * head_dim),
                 "mlp.gate_proj": (inner, width), "mlp.up_proj": (inner, width), "mlp.down_proj": (width, inner)}
        shapes |= {f"{layer}.{name}.weight": size for name, size in sizes.items()}
        shapes |= {f"{layer}.{name}.weight": (width,) for name in norms}
    return shapes

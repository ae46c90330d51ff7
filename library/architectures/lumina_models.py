"""The modules of Lumina-Image 2.0 and Lumina-Next from their files: settings read off shapes, built on meta, filled strictly."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from library.architectures import vae
from library.architectures.flux_models import SCALING as FLUX_SCALING
from library.architectures.flux_models import SHIFT as FLUX_SHIFT
from library.architectures.loading import config_json, count, load
from library.architectures.lumina_parts import CHANNELS, IMAGE_2, PATCH, LuminaFile
from library.architectures.sdxl_options import SCALING as SDXL_SCALING
from library.checkpoint import lumina_keys, lumina_next_keys
from library.checkpoint.keymap import KeyMap
from library.checkpoint.source import Source
from library.errors import UserError

TEXT_POSITIONS, SIDE_POSITIONS = 300, 512  # of 2.0's rotary tables; more captions tokens than that ask for a longer one
_MULTIPLE = 256  # what the published models round the width of their feed-forward up to


def load_transformer(file: LuminaFile, dtype: torch.dtype | None, device: torch.device | str = "cpu", text_tokens: int = 256,
                     axes_dims_rope: tuple[int, int, int] | None = None) -> nn.Module:
    """``Lumina2Transformer2DModel`` or ``LuminaNextDiT2DModel`` in eval mode, nothing trainable yet. ``dtype`` None keeps the
    file's; ``text_tokens``: the longest caption, in tokens; ``axes_dims_rope`` overrides the rule and ``config.json``.

    UserError: keys missing or left over, wrong shapes.
    """
    module = load(lambda: build_transformer(file, text_tokens, axes_dims_rope), file.source, layouts(file), dtype, device,
                  "transformer")
    if file.family != IMAGE_2 and file.layout == "diffusers":
        _refuse_untied(file.source)
    return prepare(module, file, device)


def prepare(module: nn.Module, file: LuminaFile, device: torch.device | str) -> nn.Module:
    """What the modules of diffusers need on top, to run on ``device``."""
    if file.family == IMAGE_2:
        # The tables are no buffers, so nothing has moved them. As published they are complex64; diffusers computes them in
        # double precision and keeps that, which makes every rotation a double-precision product.
        rope = module.rope_embedder
        rope.freqs_cis = [table.to(device, torch.complex64) for table in rope.freqs_cis]
    else:
        # It makes a mask of ones for the picture, as numbers, which each layer turns into one of its own; as truth values all
        # layers share it, and ``attention.py`` finds out once that it hides nothing.
        module.patch_embedder.register_forward_hook(_with_shared_mask)
    return module


def _with_shared_mask(_module: nn.Module, _inputs: Any, output: tuple) -> tuple:
    tokens, mask, sizes, positions = output
    return tokens, mask.bool(), sizes, positions


def layouts(file: LuminaFile) -> list[KeyMap]:
    """The tables of the file's names; none for equal ones."""
    if file.family == IMAGE_2:
        return [lumina_keys.TRANSFORMER] if file.layout == "original" else []
    return [lumina_next_keys.TRANSFORMER if file.layout == "original" else lumina_next_keys.DIFFUSERS]


def build_transformer(file: LuminaFile, text_tokens: int = 256, axes_dims_rope: tuple[int, int, int] | None = None) -> nn.Module:
    """The module as the file's shapes ask for, with weights of its own."""
    from diffusers import Lumina2Transformer2DModel, LuminaNextDiT2DModel

    if file.family == IMAGE_2:
        return Lumina2Transformer2DModel(**image_2_config(file, text_tokens, axes_dims_rope))
    return tie_queries(LuminaNextDiT2DModel(**next_config(file)))


def tie_queries(module: nn.Module) -> nn.Module:
    """Lumina-Next's attention to the text asks with the queries of its attention to the picture: one matrix and one norm, of
    which diffusers makes two that training would drive apart."""
    for layer in module.layers:
        layer.attn2.to_q, layer.attn2.norm_q = layer.attn1.to_q, layer.attn1.norm_q
    return module


def _common(file: LuminaFile) -> dict[str, Any]:
    return {"sample_size": 128, "patch_size": PATCH, "in_channels": CHANNELS[file.family], "hidden_size": file.width,
            "num_layers": count(file.source.tensors, r"layers\.(\d+)\."), "num_attention_heads": file.width // file.head_dim,
            "num_kv_heads": file.key_width // file.head_dim}


def image_2_config(file: LuminaFile, text_tokens: int = 256, axes: tuple[int, int, int] | None = None) -> dict[str, Any]:
    """Arguments of ``Lumina2Transformer2DModel``."""
    saved = config_json(file.source.path, "Lumina2Transformer2DModel")
    axes = axes or saved.get("axes_dim_rope") or rope_axes(file.head_dim, str(file.source.path))
    return _common(file) | feed_forward(file.inner, 4 * file.width) | {
        "num_refiner_layers": count(file.source.tensors, r"noise_refiner\.(\d+)\."), "cap_feat_dim": file.text_width,
        "axes_dim_rope": tuple(axes), "norm_eps": saved.get("norm_eps", 1e-5),
        # a picture stands at the position behind its caption
        "axes_lens": (max(TEXT_POSITIONS, text_tokens + 1), SIDE_POSITIONS, SIDE_POSITIONS)}


def next_config(file: LuminaFile) -> dict[str, Any]:
    """Arguments of ``LuminaNextDiT2DModel``."""
    names = file.source.tensors
    saved = config_json(file.source.path, "LuminaNextDiT2DModel")
    out = names["final_layer.linear.weight" if file.layout == "original" else "norm_out.linear_2.weight"].shape[0]
    norm = "layers.0.attention.q_norm.weight" if file.layout == "original" else "layers.0.attn1.norm_q.weight"
    return _common(file) | feed_forward(file.inner, int(4 * 2 * file.width / 3)) | {
        "learn_sigma": out == 2 * PATCH**2 * CHANNELS[file.family], "qk_norm": norm in names,
        "cross_attention_dim": file.text_width, "norm_eps": saved.get("norm_eps", 1e-5)}


def feed_forward(inner: int, usual: int) -> dict[str, Any]:
    """The arguments with which diffusers' modules get a feed-forward of width ``inner`` where ``usual`` is their own choice.

    They multiply it by ``ffn_dim_multiplier``, then round up to ``multiple_of``.
    """
    if -(-usual // _MULTIPLE) * _MULTIPLE == inner:
        return {"multiple_of": _MULTIPLE, "ffn_dim_multiplier": None}
    return {"multiple_of": inner, "ffn_dim_multiplier": None if usual <= inner else inner / usual}


def rope_axes(head_dim: int, place: str = "") -> tuple[int, int, int]:
    """Rotary widths of (position in the text, row, column): thirds, as 32 + 32 + 32 = 96. UserError when that is uneven."""
    if head_dim % 6:
        raise UserError(f"heads of width {head_dim} cannot be divided into rotary axes as {IMAGE_2} divides 96 into 32, 32, 32",
                        place=place, remedy="use a checkpoint whose head width is a multiple of 6, or a folder with config.json")
    return head_dim // 3, head_dim // 3, head_dim // 3


def _refuse_untied(source: Source) -> None:
    """Folders hold the shared queries twice; equal copies are read as one."""
    for index in range(count(source.tensors, r"layers\.(\d+)\.")):
        for part in ("to_q.weight", "norm_q.weight", "norm_q.bias"):
            one, two = (f"layers.{index}.{attention}.{part}" for attention in ("attn1", "attn2"))
            if one in source and two in source and not torch.equal(source.read(one), source.read(two)):
                raise UserError(f"{one} and {two} differ, but in Lumina-Next they are one: this model was trained by a program "
                                "that let them drift apart", place=str(source.path),
                                remedy="start from the published model, or from a file of the original layout")


def load_vae(file: LuminaFile, source: Source, dtype: torch.dtype | None, device: torch.device | str = "cpu") -> nn.Module:
    """``AutoencoderKL`` in eval mode, frozen: FLUX.1's for 2.0, SDXL's for Lumina-Next, which never runs in float16 (it
    overflows there)."""
    scaling, shift = latent_scale(file.family)
    if file.family != IMAGE_2 and dtype == torch.float16:
        dtype = torch.float32
    return vae.load_vae(source, dtype, device, scaling, shift, "autoencoder")


def latent_scale(family: str) -> tuple[float, float | None]:
    """(scaling, shift) of the latents: (z - shift) * scaling."""
    return (FLUX_SCALING, FLUX_SHIFT) if family == IMAGE_2 else (SDXL_SCALING, None)

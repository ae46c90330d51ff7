"""Saved files through the single-file converters of diffusers, and through our own reader: both give tensors by module name."""

from __future__ import annotations

import inspect
from pathlib import Path

import torch
from diffusers.loaders import single_file_utils
from safetensors import safe_open
from torch import Tensor

from library.checkpoint.reader import open_source

Tensors = dict[str, Tensor]


def _read(path: Path) -> Tensors:
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}


def flux(path: Path) -> tuple[Tensors, Tensors]:
    """The converter has the width of the full-size model written into it (3072): its source is run with the tiny one instead."""
    from library.architectures.flux_models import load_transformer
    from library.architectures.flux_parts import describe

    tensors = _read(path)
    source = inspect.getsource(single_file_utils.convert_flux_transformer_checkpoint_to_diffusers)
    assert source.count("3072") == 1
    namespace = dict(vars(single_file_utils))
    exec(source.replace("3072", str(tensors["img_in.weight"].shape[0])), namespace)
    theirs = namespace["convert_flux_transformer_checkpoint_to_diffusers"](dict(tensors))
    return theirs, load_transformer(describe(open_source(path)), torch.float32, "cpu").state_dict()


def sd3(path: Path) -> tuple[Tensors, Tensors]:
    from library.architectures.sd3_models import load_transformer
    from library.architectures.sd3_parts import describe

    theirs = single_file_utils.convert_sd3_transformer_checkpoint_to_diffusers(_read(path))
    return theirs, load_transformer(describe(open_source(path)), torch.float32, "cpu").state_dict()


def sdxl(path: Path) -> tuple[Tensors, Tensors]:
    from library.architectures.sdxl_models import load_unet
    from library.architectures.sdxl_parts import open_parts

    module = load_unet(open_parts(str(path), vae=None, tokenizer_cache_dir=None).unet, torch.float32, "cpu")
    theirs = single_file_utils.convert_ldm_unet_checkpoint(_read(path), dict(module.config))
    return theirs, module.state_dict()

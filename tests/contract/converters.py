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


def lumina_image_2(path: Path) -> tuple[Tensors, Tensors]:
    """Here, too, the full-size widths are written into the converter: of queries, and of keys and values."""
    from library.architectures.lumina_models import load_transformer
    from library.architectures.lumina_parts import describe

    file = describe(open_source(path))
    source = inspect.getsource(single_file_utils.convert_lumina2_to_diffusers)
    for full, tiny in (("2304", file.width), ("768", file.key_width)):
        assert source.count(full) == 1
        source = source.replace(full, str(tiny))
    namespace = dict(vars(single_file_utils))
    exec(source, namespace)
    theirs = namespace["convert_lumina2_to_diffusers"](_read(path))
    return theirs, load_transformer(file, torch.float32, "cpu").state_dict()


def lumina_next(path: Path) -> tuple[Tensors, Tensors]:
    """diffusers has no converter for this model: its own reader takes the folder that we make of the file."""
    from diffusers import LuminaNextDiT2DModel

    from library.architectures.lumina_export import write_folder
    from library.architectures.lumina_models import load_transformer
    from library.architectures.lumina_parts import open_parts

    parts = open_parts(path)
    module = load_transformer(parts.transformer, torch.float32, "cpu")
    folder = path.parent / "as_folder"
    write_folder(folder, parts, module, torch.float32)
    theirs, info = LuminaNextDiT2DModel.from_pretrained(folder / "transformer", local_files_only=True, output_loading_info=True)
    assert not any(info.values())
    return theirs.state_dict(), module.state_dict()

"""Lumina written back: one file under the names of the original release, or a diffusers folder of everything.

Parts that did not train come from their files, tensor by tensor while they are written.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from library.architectures import gemma, vae
from library.architectures.loading import fitting
from library.architectures.lumina_models import latent_scale
from library.architectures.lumina_parts import IMAGE_2, TOKENIZER, LuminaParts
from library.architectures.lumina_preview import SHIFTS
from library.architectures.pipeline_folder import pipeline_folder, write_config, write_json
from library.architectures.tokenizers import load_tokenizer
from library.checkpoint import lumina_keys, lumina_next_keys
from library.checkpoint.dtypes import DTYPE_NAMES
from library.checkpoint.export import Entry, Export, carry, convert, export_module
from library.checkpoint.keymap import identity, module_shapes
from library.checkpoint.metadata import HASH_KEY
from library.checkpoint.reader import build_on_meta
from library.checkpoint.writer import file_bytes, write_safetensors
from library.config.save_formats import PIPELINE_INDEX, SUFFIXES

_WEIGHTS = {"transformer": "diffusion_pytorch_model.safetensors", "vae": "diffusion_pytorch_model.safetensors",
            "text_encoder": "model.safetensors"}


def save(path: Path, parts: LuminaParts, denoiser: nn.Module, dtype: torch.dtype | None, metadata: Mapping[str, str],
         kind: str) -> None:
    """Write the model as ``--save_model_as`` has it: ``safetensors`` or ``diffusers_safetensors``. It appears whole or not at
    all.

    UserError: no room, or a folder in the way that holds something else.
    """
    if SUFFIXES[kind]:
        tensors = single_file(parts, denoiser, dtype)
        write_safetensors(path, tensors.entries, tensors.get, metadata, add_hash_key=HASH_KEY if metadata else None)
        return
    with pipeline_folder(path, saved_bytes(parts, denoiser, dtype, kind)) as folder:
        write_folder(folder, parts, denoiser, dtype, metadata)


def saved_bytes(parts: LuminaParts, denoiser: nn.Module, dtype: torch.dtype | None, kind: str) -> int:
    """About how much room ``save`` takes."""
    if SUFFIXES[kind]:
        return file_bytes(single_file(parts, denoiser, dtype).entries)
    return sum(file_bytes(export.entries) for export, _ in _components(parts, denoiser, dtype).values())


def single_file(parts: LuminaParts, denoiser: nn.Module, dtype: torch.dtype | None) -> Export:
    """The names of the original release, with the prefix and the order of the input; an all-in-one file keeps its other parts.

    2.0's files have one norm that no one uses: that of the input, or ones where the input is a diffusers folder, which lacks it.
    """
    file = parts.transformer
    original = file.layout == "original"
    table = lumina_keys.TRANSFORMER if file.family == IMAGE_2 else lumina_next_keys.TRANSFORMER
    bound = table.bind(module_shapes(denoiser))
    tensors = export_module(denoiser, bound, dtype=dtype, prefix=file.prefix if original else "")
    if not original:
        return tensors + _unused_norm(denoiser, dtype) if file.family == IMAGE_2 else tensors
    own = [name for name in file.source.layout_order if bound.is_dropped(name)]
    tensors += carry(file.source, own, prefix=file.prefix, dtype=dtype)
    known = {entry.name for entry in tensors.entries}
    others = [name for name in file.whole.layout_order if name not in known]
    return (tensors + carry(file.whole, others)).in_order(file.whole.layout_order)


def _unused_norm(denoiser: nn.Module, dtype: torch.dtype | None) -> Export:
    dtype = dtype or denoiser.x_embedder.weight.dtype
    ones = torch.ones(denoiser.config.hidden_size, dtype=dtype)
    return Export((Entry(lumina_keys.UNUSED_NORM, tuple(ones.shape), DTYPE_NAMES[dtype]),), lambda name: ones)


def write_folder(folder: Path, parts: LuminaParts, denoiser: nn.Module, dtype: torch.dtype | None,
                 metadata: Mapping[str, str] | None = None) -> None:
    """Fill ``folder`` with the whole model as a diffusers pipeline: weights, configurations, tokenizer and scheduler."""
    second = parts.transformer.family == IMAGE_2
    index: dict[str, object] = {"_class_name": "Lumina2Pipeline" if second else "LuminaPipeline"}
    for place, (export, module) in _components(parts, denoiser, dtype).items():
        (folder / place).mkdir(parents=True, exist_ok=True)
        write_safetensors(folder / place / _WEIGHTS[place], export.entries, export.get, {"format": "pt"} | dict(metadata or {}))
        write_config(module, folder / place)
        index[place] = (type(module).__module__.split(".")[0], type(module).__name__)
    load_tokenizer(TOKENIZER, parts.tokenizer).save_pretrained(folder / "tokenizer")
    index["tokenizer"] = ("transformers", "GemmaTokenizer")
    (folder / "scheduler").mkdir()
    scheduler = "FlowMatchEulerDiscreteScheduler"
    write_json(folder / "scheduler" / "scheduler_config.json",
               {"_class_name": scheduler, "num_train_timesteps": 1000, "shift": SHIFTS[parts.transformer.family],
                "use_dynamic_shifting": False})
    index["scheduler"] = ("diffusers", scheduler)
    write_json(folder / PIPELINE_INDEX, index)


def _components(parts: LuminaParts, denoiser: nn.Module, dtype: torch.dtype | None) -> dict[str, tuple[Export, nn.Module]]:
    """Folder -> what goes into it, and the module whose configuration stands beside it (on meta where it did not train)."""
    scaling, shift = latent_scale(parts.transformer.family)
    gemma_module = build_on_meta(lambda: gemma.build_gemma(parts.gemma))
    autoencoder = build_on_meta(lambda: vae.build_vae(parts.ae, scaling, shift))
    found = {}
    for place, module, source, layouts in (("text_encoder", gemma_module, parts.gemma, gemma.LAYOUTS),
                                           ("vae", autoencoder, parts.ae, vae.vae_layouts(parts.ae))):
        stored = fitting(module, source, layouts)
        found[place] = convert(source, stored, identity(module_shapes(module)), dtype=dtype), module
    shapes = module_shapes(denoiser)
    if parts.transformer.family == IMAGE_2:
        transformer = export_module(denoiser, identity(shapes), dtype=dtype)
    else:  # diffusers' module has the shared queries twice
        bound = lumina_next_keys.DIFFUSERS.bind(shapes)
        transformer = export_module(denoiser, bound, dtype=dtype, also=bound.optional_shapes())
    return {"transformer": (transformer, denoiser)} | found

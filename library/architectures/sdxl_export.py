"""SDXL written back: one file with everything in it, or a diffusers folder. Parts that did not train come from their files.

Nothing is held in memory beside what trained: other parts are read tensor by tensor while they are written.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from library.architectures import clip, vae
from library.architectures.clip_chunks import CONTEXT
from library.architectures.loading import fitting
from library.architectures.pipeline_folder import pipeline_folder, write_config, write_json, write_tokenizer
from library.architectures.sdxl_models import build_unet, unet_layouts, unet_table
from library.architectures.sdxl_options import SCALING
from library.architectures.sdxl_parts import TOKENIZER, TOKENIZER_2, SdxlParts
from library.architectures.sdxl_text import SECOND_PAD
from library.architectures.tokenizers import load_tokenizer
from library.checkpoint.autoencoder_keys import AUTOENCODER_QUANT
from library.checkpoint.clip_keys import CLIP, CLIP_PROJECTED, OPEN_CLIP
from library.checkpoint.export import Entry, Export, carry, convert, export_module
from library.checkpoint.keymap import BoundMap, KeyMap, identity
from library.checkpoint.metadata import HASH_KEY
from library.checkpoint.pickle_writer import archive_bytes, write_pickle
from library.checkpoint.reader import build_on_meta
from library.checkpoint.sdxl_keys import (CLIP_G_PREFIX, CLIP_L_PREFIX, UNET_PREFIX, V_PREDICTION, VAE_PREFIX,
                                          ZERO_TERMINAL_SNR)
from library.checkpoint.source import Source
from library.checkpoint.writer import write_safetensors
from library.config.save_formats import PIPELINE_INDEX, SUFFIXES

_PREFIXES = {"unet": UNET_PREFIX, "clip_l": CLIP_L_PREFIX, "clip_g": CLIP_G_PREFIX, "vae": VAE_PREFIX}  # of the single file
_TABLES = {"clip_l": CLIP, "clip_g": OPEN_CLIP, "vae": AUTOENCODER_QUANT}
# part -> folder, file, table (none: the module's own names), class in model_index.json
_FOLDERS = {
    "unet": ("unet", "diffusion_pytorch_model.safetensors", None, ("diffusers", "UNet2DConditionModel")),
    "clip_l": ("text_encoder", "model.safetensors", CLIP, ("transformers", "CLIPTextModel")),
    "clip_g": ("text_encoder_2", "model.safetensors", CLIP_PROJECTED, ("transformers", "CLIPTextModelWithProjection")),
    "vae": ("vae", "diffusion_pytorch_model.safetensors", None, ("diffusers", "AutoencoderKL")),
}
_PICKLED = {"diffusion_pytorch_model.safetensors": "diffusion_pytorch_model.bin", "model.safetensors": "pytorch_model.bin"}
_SCHEDULER = {"_class_name": "EulerDiscreteScheduler", "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
              "num_train_timesteps": 1000, "timestep_spacing": "leading", "steps_offset": 1}


def save(path: Path, parts: SdxlParts, trained: Mapping[str, nn.Module], dtype: torch.dtype | None, metadata: Mapping[str, str],
         kind: str, *, predicts_velocity: bool, zero_terminal_snr: bool) -> None:
    """Write the whole model as ``--save_model_as`` has it; the file or folder appears whole or not at all.

    ``kind``: safetensors or ckpt (one file), diffusers (a folder of .bin files) or diffusers_safetensors. Pickled files hold no
    metadata. UserError: no room, or a folder in the way that holds something else.
    """
    facts = {"predicts_velocity": predicts_velocity, "zero_terminal_snr": zero_terminal_snr}
    if not SUFFIXES[kind]:
        with pipeline_folder(path, saved_bytes(parts, dtype)) as folder:
            write_folder(folder, parts, trained, dtype, **facts, metadata=metadata, pickled=kind == "diffusers")
        return
    tensors = single_file(parts, trained, dtype, **facts)
    if kind == "ckpt":
        write_pickle(path, tensors.entries, tensors.get)
    else:
        write_safetensors(path, tensors.entries, tensors.get, metadata, add_hash_key=HASH_KEY if metadata else None)


def saved_bytes(parts: SdxlParts, dtype: torch.dtype | None) -> int:
    """About how much room the whole model takes on disk."""
    return archive_bytes(single_file(parts, {}, dtype).entries)


def single_file(parts: SdxlParts, trained: Mapping[str, nn.Module], dtype: torch.dtype | None, *,
                predicts_velocity: bool = False, zero_terminal_snr: bool = False) -> Export:
    """The whole checkpoint under the names of Stability AI's file, in the order of the input where that is such a file.

    ``trained``: modules by name of part (unet, clip_l, clip_g). ``dtype`` None keeps each part's. Tensors of the input that
    belong to no module are kept. A model that predicts velocity gets the marker by which other programs know it.
    """
    whole = parts.unet.whole
    result = Export((), lambda name: torch.tensor([]))
    replaced: set[str] = set()  # names of the input that are written anew, or whose part comes from elsewhere
    for part in _PREFIXES:
        prefix, table = _PREFIXES[part], _TABLES.get(part) or unet_table(parts.unet)
        source, stored = _source(parts, part)
        in_place = parts.unet.layout == "ldm" and (
            any(name.startswith(prefix) for name in whole.tensors) and source.path == whole.path)
        if part not in trained and in_place:
            continue
        result += _export(parts, part, trained, table, dtype, prefix)
        if part == "unet":
            replaced |= {parts.unet.prefix + name for name in stored.original_shapes()}
        elif not in_place:
            replaced |= {name for name in whole.tensors if name.startswith(prefix)}
    marks = [name for name, holds in ((V_PREDICTION, predicts_velocity), (ZERO_TERMINAL_SNR, zero_terminal_snr)) if holds]
    result += Export(tuple(Entry(name, (0,), "F32") for name in marks), lambda name: torch.tensor([]))
    if parts.unet.layout != "ldm":
        return result
    known = {entry.name for entry in result.entries} | replaced
    rest = carry(whole, [name for name in whole.tensors if name not in known], dtype=dtype)
    return (result + rest).in_order(whole.layout_order)


def write_folder(folder: Path, parts: SdxlParts, trained: Mapping[str, nn.Module], dtype: torch.dtype | None, *,
                 predicts_velocity: bool = False, zero_terminal_snr: bool = False,
                 metadata: Mapping[str, str] | None = None, pickled: bool = False) -> None:
    """Fill ``folder`` with the whole model as a diffusers pipeline: weights, configurations, tokenizers and a scheduler.

    ``pickled``: weights in PyTorch's .bin files, which hold no metadata.
    """
    index: dict[str, object] = {"_class_name": "StableDiffusionXLPipeline", "force_zeros_for_empty_prompt": True}
    for part, (place, file, table, kind) in _FOLDERS.items():
        export = _export(parts, part, trained, table, dtype, "")
        (folder / place).mkdir(parents=True, exist_ok=True)
        if pickled:
            write_pickle(folder / place / _PICKLED[file], export.entries, export.get, key=None)
        else:
            write_safetensors(folder / place / file, export.entries, export.get, {"format": "pt"} | dict(metadata or {}))
        write_config(_module(parts, part, trained), folder / place)
        index[place] = kind
    for place, spec, found in (("tokenizer", TOKENIZER, parts.tokenizer), ("tokenizer_2", TOKENIZER_2, parts.tokenizer_2)):
        tokenizer = load_tokenizer(spec, found)
        write_tokenizer(tokenizer, found, folder / place, CONTEXT, SECOND_PAD if spec is TOKENIZER_2 else None)
        index[place] = ("transformers", "CLIPTokenizer")
    prediction = "v_prediction" if predicts_velocity else "epsilon"
    (folder / "scheduler").mkdir(exist_ok=True)
    write_json(folder / "scheduler" / "scheduler_config.json",
                {**_SCHEDULER, "prediction_type": prediction, "rescale_betas_zero_snr": zero_terminal_snr})
    index["scheduler"] = ("diffusers", _SCHEDULER["_class_name"])
    write_json(folder / PIPELINE_INDEX, index)


def _export(parts: SdxlParts, part: str, trained: Mapping[str, nn.Module], table: KeyMap | None, dtype: torch.dtype | None,
            prefix: str) -> Export:
    source, stored = _source(parts, part)
    shapes = stored.module_shapes()
    bound = identity(shapes) if table is None else table.bind(shapes)
    if part in trained:
        return export_module(trained[part], bound, dtype=dtype, prefix=prefix)
    return convert(source, stored, bound, dtype=dtype, prefix=prefix)


def _source(parts: SdxlParts, part: str) -> tuple[Source, BoundMap]:
    """A part's file, and the map between its names and the module."""
    module = _module(parts, part, {})
    if part == "unet":
        return parts.unet.source, fitting(module, parts.unet.source, unet_layouts(parts.unet))
    source = getattr(parts, part)
    layouts = {"clip_l": clip.CLIP_LAYOUTS, "clip_g": clip.PROJECTED_LAYOUTS, "vae": vae.vae_layouts(source)}[part]
    return source, fitting(module, source, layouts)


def _module(parts: SdxlParts, part: str, trained: Mapping[str, nn.Module]) -> nn.Module:
    """The module of a part, on meta where it is not at hand."""
    if part in trained:
        return trained[part]
    return build_on_meta({
        "unet": lambda: build_unet(parts.unet), "clip_l": lambda: clip.build_clip(parts.clip_l),
        "clip_g": lambda: clip.build_projected_clip(parts.clip_g), "vae": lambda: vae.build_vae(parts.vae, SCALING, None)}[part])

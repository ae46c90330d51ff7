"""SD3 written back: one file in the layout of the input, or a diffusers folder. Parts that did not train come from their files.

A text encoder goes where it came from: inside the single file, or into a file beside it, ``{name}_clip_l.safetensors``, when it
trained; ``--save_clip`` and ``--save_t5xxl`` put it inside whatever it came from. Nothing is held in memory beside what trained.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from torch import nn

from library.architectures import vae
from library.architectures.base import DENOISER
from library.architectures.clip_chunks import CONTEXT
from library.architectures.loading import fitting
from library.architectures.pipeline_folder import write_config, write_json, write_tokenizer
from library.architectures.sd3_models import build_encoder, build_transformer, encoder_layouts, is_projected, transformer_layouts
from library.architectures.sd3_options import SCALING, SHIFT
from library.architectures.sd3_parts import TOKENIZERS, Sd3Parts
from library.architectures.sd3_text import SECOND_PAD
from library.architectures.tokenizers import load_tokenizer
from library.atomic import atomic_folder
from library.checkpoint.autoencoder_keys import AUTOENCODER
from library.checkpoint.clip_keys import CLIP, CLIP_PROJECTED
from library.checkpoint.dtypes import DTYPE_NAMES
from library.checkpoint.export import Entry, Export, carry, convert, export_module
from library.checkpoint.keymap import BoundMap, KeyMap, identity
from library.checkpoint.metadata import HASH_KEY
from library.checkpoint.reader import build_on_meta
from library.checkpoint.sd3_keys import ENCODER_PREFIXES, MMDIT_PREFIX, VAE_PREFIX, mmdit
from library.checkpoint.source import Source, stored_dtype
from library.checkpoint.t5_keys import T5
from library.checkpoint.writer import file_bytes, require_room, write_safetensors
from library.config.save_formats import PIPELINE_INDEX, SUFFIXES, beside, is_pipeline
from library.errors import UserError

_COPY = "encoder.embed_tokens.weight"  # of T5's embedding: published files hold it twice, and some programs read the second one
T5_LENGTH = 512  # the longest text that the published tokenizer gives T5
# part -> folder, file, class in model_index.json
_FOLDERS = {
    DENOISER: ("transformer", "diffusion_pytorch_model.safetensors", ("diffusers", "SD3Transformer2DModel")),
    "vae": ("vae", "diffusion_pytorch_model.safetensors", ("diffusers", "AutoencoderKL")),
    "clip_l": ("text_encoder", "model.safetensors", ("transformers", "CLIPTextModelWithProjection")),
    "clip_g": ("text_encoder_2", "model.safetensors", ("transformers", "CLIPTextModelWithProjection")),
    "t5xxl": ("text_encoder_3", "model.safetensors", ("transformers", "T5EncoderModel")),
}
_TOKENIZERS = {"clip_l": ("tokenizer", "CLIPTokenizer"), "clip_g": ("tokenizer_2", "CLIPTokenizer"),
               "t5xxl": ("tokenizer_3", "T5TokenizerFast")}
_SCHEDULER = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}


def save(path: Path, parts: Sd3Parts, trained: Mapping[str, nn.Module], dtype: torch.dtype | None, metadata: Mapping[str, str],
         kind: str, inside: Collection[str] = ()) -> None:
    """Write the model as ``--save_model_as`` has it; each file or folder appears whole or not at all.

    ``trained``: modules by name of part. ``dtype`` None keeps each part's; what did not train is never widened. ``inside``:
    encoders that go into the single file in any case. UserError: no room, or a folder in the way that holds something else.
    """
    if not SUFFIXES[kind]:
        if path.exists() and not is_pipeline(path):
            raise UserError("is there already, and is no diffusers model that could be replaced", place=str(path),
                            remedy="choose another --output_name, or move it away")
        require_room(path, saved_bytes(parts, trained, dtype, kind, inside))
        with atomic_folder(path) as folder:
            write_folder(folder, parts, trained, dtype, metadata)
        return
    for name, tensors in own_files(parts, trained, dtype, inside).items():
        write_safetensors(beside(path, name), tensors.entries, tensors.get, {"format": "pt"})
    tensors = single_file(parts, trained, dtype, inside)
    write_safetensors(path, tensors.entries, tensors.get, metadata, add_hash_key=HASH_KEY if metadata else None)


def saved_bytes(parts: Sd3Parts, trained: Mapping[str, nn.Module], dtype: torch.dtype | None, kind: str,
                inside: Collection[str] = ()) -> int:
    """About how much room ``save`` of the same arguments takes."""
    if not SUFFIXES[kind]:
        return sum(file_bytes(_folder_export(parts, part, trained, dtype).entries) for part in _present(parts))
    files = [single_file(parts, trained, dtype, inside), *own_files(parts, trained, dtype, inside).values()]
    return sum(file_bytes(tensors.entries) for tensors in files)


def single_file(parts: Sd3Parts, trained: Mapping[str, nn.Module], dtype: torch.dtype | None,
                inside: Collection[str] = ()) -> Export:
    """The checkpoint under the names of Stability AI's file, in the order and with the prefix of the input where that is one."""
    file, whole = parts.transformer, parts.transformer.whole
    single = file.layout == "mmdit"
    replaced: set[str] = set()  # names of the input that are written anew
    others = Export((), lambda name: torch.tensor([]))
    for part in ("vae", *ENCODER_PREFIXES):
        prefix = _prefix(parts, part)
        slot = single and any(name.startswith(prefix) for name in whole.tensors)
        source = parts.vae if part == "vae" else parts.encoders.get(part)
        foreign = source is not None and (source.path != whole.path or not slot)
        wanted = slot or part in inside or (part == "vae" and not single)
        if source is None or not wanted or not (part in trained or foreign):
            continue
        export = _export(parts, part, trained, _table(parts, part), dtype, prefix)
        if part == "t5xxl" and (not slot or prefix + _COPY in whole):
            export = _with_copy(export, prefix)
        others += export
        replaced |= {name for name in whole.tensors if slot and name.startswith(prefix)}
    prefix = file.prefix or (MMDIT_PREFIX if others.entries or not single else "")  # names of several parts need one
    result = _export(parts, DENOISER, trained, mmdit(file.depth), dtype, prefix) + others
    if not single:
        return result
    replaced |= {file.prefix + name for name in file.source.tensors}
    rest = _carried(whole, [name for name in whole.tensors if name not in replaced], dtype)
    return (result + rest).in_order(whole.layout_order)


def own_files(parts: Sd3Parts, trained: Mapping[str, nn.Module], dtype: torch.dtype | None,
              inside: Collection[str] = ()) -> dict[str, Export]:
    """Encoder -> its file beside the single one, for those that trained and are not in it."""
    whole = parts.transformer.whole
    names = [name for name in parts.encoders if name in trained and name not in inside
             and not (parts.transformer.layout == "mmdit" and any(key.startswith(_prefix(parts, name)) for key in whole.tensors))]
    exports = {name: _export(parts, name, trained, _table(parts, name), dtype, "") for name in names}
    return {name: _with_copy(export, "") if name == "t5xxl" else export for name, export in exports.items()}


def write_folder(folder: Path, parts: Sd3Parts, trained: Mapping[str, nn.Module], dtype: torch.dtype | None,
                 metadata: Mapping[str, str] | None = None) -> None:
    """Fill ``folder`` with the whole model as a diffusers pipeline: weights, configurations, tokenizers and a scheduler."""
    index: dict[str, object] = {"_class_name": "StableDiffusion3Pipeline"}
    for part, (place, name, kind) in _FOLDERS.items():
        if part not in _present(parts):
            index[place], index[_TOKENIZERS[part][0]] = (None, None), (None, None)
            continue
        export = _folder_export(parts, part, trained, dtype)
        (folder / place).mkdir(parents=True, exist_ok=True)
        write_safetensors(folder / place / name, export.entries, export.get, {"format": "pt"} | dict(metadata or {}))
        write_config(_module(parts, part, trained), folder / place, kind[1])
        index[place] = kind
    for name, found in parts.tokenizers.items():
        place, kind = _TOKENIZERS[name]
        tokenizer = load_tokenizer(TOKENIZERS[name], found)
        length = T5_LENGTH if name == "t5xxl" else CONTEXT
        write_tokenizer(tokenizer, found, folder / place, length, SECOND_PAD if name == "clip_g" else None)
        index[place] = ("transformers", kind)
    (folder / "scheduler").mkdir(exist_ok=True)
    write_json(folder / "scheduler" / "scheduler_config.json", _SCHEDULER)
    index["scheduler"] = ("diffusers", _SCHEDULER["_class_name"])
    write_json(folder / PIPELINE_INDEX, index)


def _folder_export(parts: Sd3Parts, part: str, trained: Mapping[str, nn.Module], dtype: torch.dtype | None) -> Export:
    export = _export(parts, part, trained, _table(parts, part) if part in parts.encoders else None, dtype, "")
    if part != "clip_l" or is_projected(parts.encoders[part]):
        return export
    # The pipeline's class has a projection; the published single file has none, which is the same as one that changes nothing.
    width = _module(parts, part, trained).config.hidden_size
    entry = Entry("text_projection.weight", (width, width), DTYPE_NAMES[dtype or torch.float32])
    return export + Export((entry,), lambda name: torch.eye(width))


def _with_copy(export: Export, prefix: str) -> Export:
    """T5 with its embedding under both names."""
    first = next(entry for entry in export.entries if entry.name == f"{prefix}shared.weight")
    return export + Export((first._replace(name=prefix + _COPY),), lambda name: export.get(first.name))


def _present(parts: Sd3Parts) -> list[str]:
    return [DENOISER, "vae", *parts.encoders]


def _prefix(parts: Sd3Parts, part: str) -> str:
    """Where a part stands in the single file, by the input's habit."""
    if part != "vae":
        return ENCODER_PREFIXES[part]
    return "vae." if any(name.startswith("vae.") for name in parts.transformer.whole.tensors) else VAE_PREFIX


def _table(parts: Sd3Parts, part: str) -> KeyMap:
    if part == "clip_l" and not is_projected(parts.encoders[part]):
        return CLIP
    return {"vae": AUTOENCODER, "clip_l": CLIP_PROJECTED, "clip_g": CLIP_PROJECTED, "t5xxl": T5}[part]


def _export(parts: Sd3Parts, part: str, trained: Mapping[str, nn.Module], table: KeyMap | None, dtype: torch.dtype | None,
            prefix: str) -> Export:
    """One part in the names of ``table`` (None: the module's own), trained or as it stands in its file."""
    source, stored = _source(parts, part)
    shapes = stored.module_shapes()
    bound = identity(shapes) if table is None else table.bind(shapes)
    if part in trained:
        return export_module(trained[part], bound, dtype=dtype, prefix=prefix)
    return convert(source, stored, bound, dtype=_not_wider(source, list(source.tensors), dtype), prefix=prefix)


def _carried(source: Source, names: list[str], dtype: torch.dtype | None) -> Export:
    """Tensors of the input as they are, but none wider than ``dtype``."""
    def narrows(name: str) -> bool:
        return _not_wider(source, [name], dtype) is not None

    kept = carry(source, [name for name in names if not narrows(name)])
    return kept + carry(source, [name for name in names if narrows(name)], dtype=dtype)


def _not_wider(source: Source, names: list[str], dtype: torch.dtype | None) -> torch.dtype | None:
    """``dtype``, or None where it would make what did not train larger without making it any better."""
    stored = [stored_dtype(source.tensors[name], None) for name in names]
    widths = [one.itemsize for one in stored if one.is_floating_point]
    return dtype if dtype is not None and widths and dtype.itemsize <= max(widths) else None


def _source(parts: Sd3Parts, part: str) -> tuple[Source, BoundMap]:
    """A part's file, and the map between its names and the module."""
    module = _module(parts, part, {})
    if part == DENOISER:
        return parts.transformer.source, fitting(module, parts.transformer.source, transformer_layouts(parts.transformer))
    source = parts.vae if part == "vae" else parts.encoders[part]
    layouts = vae.vae_layouts(source) if part == "vae" else encoder_layouts(part, source)
    return source, fitting(module, source, layouts)


def _module(parts: Sd3Parts, part: str, trained: Mapping[str, nn.Module]) -> nn.Module:
    """The module of a part, on meta where it is not at hand."""
    if part in trained:
        return trained[part]
    if part == DENOISER:
        return build_transformer(parts.transformer)
    return build_on_meta(lambda: vae.build_vae(parts.vae, SCALING, SHIFT) if part == "vae" else
                         build_encoder(part, parts.encoders[part]))

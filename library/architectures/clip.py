"""CLIP's text tower from a file, in the names of transformers or of open_clip, with or without its projection."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn

from library.architectures.loading import config_json, count, load
from library.checkpoint.clip_keys import CLIP, CLIP_FLAT, CLIP_PROJECTED, OPEN_CLIP
from library.checkpoint.header import TensorInfo
from library.checkpoint.source import Source
from library.errors import UserError

HEAD_WIDTH = 64
CLIP_LAYOUTS, PROJECTED_LAYOUTS = (CLIP, CLIP_FLAT), (CLIP_PROJECTED, OPEN_CLIP)


def load_clip(source: Source, dtype: torch.dtype | None, device: torch.device | str = "cpu", place: str = "clip_l") -> nn.Module:
    """``CLIPTextModel`` in eval mode, frozen, from files with or without ``text_model.``. ``place``: its name in messages."""
    return load(lambda: build_clip(source), source, CLIP_LAYOUTS, dtype, device, place)


def load_projected_clip(source: Source, dtype: torch.dtype | None, device: torch.device | str = "cpu",
                        place: str = "clip_g", hidden_act: str = "gelu") -> nn.Module:
    """``CLIPTextModelWithProjection`` in eval mode, frozen, from the names of transformers or of open_clip."""
    return load(lambda: build_projected_clip(source, hidden_act), source, PROJECTED_LAYOUTS, dtype, device, place)


def build_clip(source: Source) -> nn.Module:
    """``CLIPTextModel`` as the file's shapes ask for, with weights of its own."""
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(CLIPTextConfig(**clip_config(source)))


def build_projected_clip(source: Source, hidden_act: str = "gelu") -> nn.Module:
    """The same for ``CLIPTextModelWithProjection``."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    return CLIPTextModelWithProjection(CLIPTextConfig(**clip_config(source, "CLIPTextModelWithProjection", hidden_act)))


def clip_config(source: Source, class_name: str = "CLIPTextModel", hidden_act: str = "quick_gelu") -> dict[str, Any]:
    """Arguments of ``CLIPTextConfig``: heads of 64, and the two last tokens as begin and end, as in the published vocabulary.

    ``hidden_act`` is that of the kind of model: shapes do not tell. The end token must not stay at the class's habit:
    transformers reads 2 as "an old config" and anything else as the token at whose first place the pooled output is taken.
    """
    tokens, positions, inner, layers, projection = _facts(source)
    vocabulary, width = tokens.shape
    saved = config_json(source.path, class_name)
    if "num_attention_heads" not in saved and width % HEAD_WIDTH:
        raise UserError(f"{source.path}: a CLIP of width {width} does not divide into heads of {HEAD_WIDTH}",
                        remedy="give a folder that also holds the encoder's config.json")
    return {
        "vocab_size": vocabulary, "hidden_size": width, "projection_dim": width if projection is None else projection,
        "intermediate_size": inner.shape[0], "num_hidden_layers": layers,
        "num_attention_heads": saved.get("num_attention_heads", width // HEAD_WIDTH),
        "max_position_embeddings": positions.shape[0],
        "hidden_act": saved.get("hidden_act", hidden_act), "layer_norm_eps": saved.get("layer_norm_eps", 1e-5),
        "bos_token_id": vocabulary - 2, "eos_token_id": vocabulary - 1, "pad_token_id": vocabulary - 1,
    }


def _facts(source: Source) -> tuple[TensorInfo, TensorInfo, TensorInfo, int, int | None]:
    """Token table, position table, first feed-forward matrix, number of layers, width of the projection (None without)."""
    names = source.tensors
    if "transformer.resblocks.0.mlp.c_fc.weight" in names:
        return (names["token_embedding.weight"], names["positional_embedding"], names["transformer.resblocks.0.mlp.c_fc.weight"],
                count(names, r"transformer\.resblocks\.(\d+)\."), names["text_projection"].shape[1])
    prefix = "text_model." if "text_model.embeddings.token_embedding.weight" in names else ""
    projection = names["text_projection.weight"].shape[0] if "text_projection.weight" in names else None
    return (names[f"{prefix}embeddings.token_embedding.weight"], names[f"{prefix}embeddings.position_embedding.weight"],
            names[f"{prefix}encoder.layers.0.mlp.fc1.weight"], count(names, rf"{re.escape(prefix)}encoder\.layers\.(\d+)\."),
            projection)

"""Gemma and Gemma 2 as text encoders, from a file: settings read off the tensors' shapes, and captions to token states.

Letters: B captions, L tokens, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from library.architectures.loading import config_json, count, load
from library.architectures.tokenizers import refuse_unknown_tokens
from library.checkpoint.gemma_keys import GEMMA, GEMMA_FLAT
from library.checkpoint.source import Source
from library.errors import UserError

HEADS = 8  # of both encoders that image models read, Gemma-2B and Gemma-2-2B
LAYOUTS = (GEMMA, GEMMA_FLAT)
_SECOND = "layers.0.pre_feedforward_layernorm.weight"  # Gemma 2 alone has it


def load_gemma(source: Source, dtype: torch.dtype | None, device: torch.device | str = "cpu", place: str = "gemma2") -> nn.Module:
    """``GemmaModel`` or ``Gemma2Model`` in eval mode, frozen, from files with or without ``model.``."""
    return load(lambda: build_gemma(source), source, LAYOUTS, dtype, device, place)


def build_gemma(source: Source) -> nn.Module:
    """The model as the file's shapes ask for, with weights of its own."""
    from transformers import Gemma2Config, Gemma2Model, GemmaConfig, GemmaModel

    arguments = gemma_config(source)
    if is_second(source):
        # Its attention scores are squeezed by a tanh, which of torch's kernels only the plain one can do.
        config = Gemma2Config(**arguments, query_pre_attn_scalar=arguments["head_dim"])
        config._attn_implementation = "eager"
        return Gemma2Model(config)
    return GemmaModel(GemmaConfig(**arguments, hidden_act="gelu_pytorch_tanh"))


def is_second(source: Source) -> bool:
    return _SECOND in source or f"model.{_SECOND}" in source


def gemma_config(source: Source) -> dict[str, Any]:
    """What both generations' configurations share. 8 heads, as shapes do not tell, or what ``config.json`` says."""
    prefix = "model." if "model.embed_tokens.weight" in source else ""
    names = source.tensors
    vocabulary, width = names[f"{prefix}embed_tokens.weight"].shape
    queries, keys = (names[f"{prefix}layers.0.self_attn.{part}.weight"].shape[0] for part in ("q_proj", "k_proj"))
    saved = config_json(source.path, "Gemma2Model") or config_json(source.path, "GemmaModel")
    saved = saved or config_json(source.path, "Gemma2ForCausalLM") or config_json(source.path, "GemmaForCausalLM")
    heads = saved.get("num_attention_heads", HEADS)
    head_dim = saved.get("head_dim") or queries // heads
    if queries != heads * head_dim or keys % head_dim:
        raise UserError(f"{source.path}: queries of width {queries} and keys of width {keys} do not divide into {heads} heads",
                        remedy="give a folder that also holds the encoder's config.json")
    return {
        "vocab_size": vocabulary, "hidden_size": width, "head_dim": head_dim, "num_attention_heads": heads,
        "num_key_value_heads": keys // head_dim, "num_hidden_layers": count(names, rf"{prefix}layers\.(\d+)\."),
        "intermediate_size": names[f"{prefix}layers.0.mlp.gate_proj.weight"].shape[0],
        "rms_norm_eps": saved.get("rms_norm_eps", 1e-6), "use_cache": False,
        "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2,
    }


@torch.no_grad()
def encode(encoder: nn.Module, tokenizer: Any, texts: Sequence[str], length: int, flag: str) -> tuple[torch.Tensor, torch.Tensor]:
    """States before the last layer (B, length, D) in the encoder's dtype, zero where padded, and the mask (B, length) bool.

    Attention goes backwards only, so no token ever sees the padding behind it: the encoder runs on as many tokens as the
    longest text has. Longer texts are cut. ``flag`` names the tokenizer in messages.
    """
    words = encoder.get_input_embeddings().weight  # (V, D)
    encoded = tokenizer(list(texts), padding="longest", max_length=length, truncation=True, return_attention_mask=True,
                        return_tensors="pt")
    ids, mask = encoded["input_ids"].to(words.device), encoded["attention_mask"].to(words.device)
    refuse_unknown_tokens(int(ids.max()), words.shape[0], "Gemma", flag)
    states = encoder(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states[-2]
    mask, missing = mask.bool(), length - ids.shape[1]
    states = states.masked_fill(~mask[..., None], 0)
    return F.pad(states, (0, 0, 0, missing)), F.pad(mask, (0, missing))

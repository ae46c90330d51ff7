"""Captions to what FLUX.1 reads: T5's token states and CLIP's pooled vector."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from library.architectures.tokenizers import refuse_unknown_tokens


@dataclass
class Tokenizers:
    """Both tokenizers."""

    clip: Any
    t5: Any


@torch.no_grad()
def encode_text(modules: Mapping[str, nn.Module], tokenizers: Tokenizers, captions: Sequence[str], t5_length: int,
                apply_mask: bool) -> dict[str, torch.Tensor]:
    """``t5`` (B, t5_length, D) with ``t5_mask`` (B, t5_length) bool (true: a token), and ``clip_pooled`` (B, D), in the encoders'
    dtypes, of those of the encoders ``t5`` and ``clip`` that there are.

    With ``apply_mask`` padding is hidden from T5; without, T5 attends to it as the published model does. The mask is
    returned in both cases. Captions too long for an encoder are cut, with their end token kept (``flux_tokens.py`` counts which).
    """
    text: dict[str, torch.Tensor] = {}
    if "t5" in modules:
        text |= _t5(modules["t5"], tokenizers, captions, t5_length, apply_mask)
    if "clip" in modules:
        text["clip_pooled"] = _clip(modules["clip"], tokenizers, captions)
    return text


def _t5(t5: nn.Module, tokenizers: Tokenizers, captions: Sequence[str], length: int, apply_mask: bool) -> dict[str, torch.Tensor]:
    words = t5.get_input_embeddings().weight  # (V, D)
    ids, mask = _tokenise(tokenizers, "T5", captions, length, words.shape[0])
    states = t5(input_ids=ids.to(words.device), attention_mask=mask.to(words.device) if apply_mask else None).last_hidden_state
    return {"t5": states, "t5_mask": mask.bool().to(states.device)}


def _clip(clip: nn.Module, tokenizers: Tokenizers, captions: Sequence[str]) -> torch.Tensor:
    """The pooled vector (B, D)."""
    words = clip.get_input_embeddings().weight
    length = clip.config.max_position_embeddings
    clip_ids, _ = _tokenise(tokenizers, "CLIP", captions, length, words.shape[0])
    output = clip(input_ids=clip_ids.to(words.device)).last_hidden_state  # (B, 77, D), final norm applied
    # The pooled vector is the state at the first end token (padding repeats it); taken here by the tokenizer's own number,
    # because configs in circulation name a wrong one.
    end = (clip_ids == tokenizers.clip.eos_token_id).int().argmax(dim=-1)
    return output[torch.arange(len(captions), device=output.device), end.to(output.device)]


def _tokenise(tokenizers: Tokenizers, kind: str, captions: Sequence[str], length: int,
              vocabulary: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token numbers and mask, both (B, length) int64 on the CPU. UserError when the encoder has no row for a token."""
    tokenizer = tokenizers.clip if kind == "CLIP" else tokenizers.t5
    encoded = tokenizer(list(captions), padding="max_length", max_length=length, truncation=True, return_attention_mask=True,
                        return_tensors="pt")
    ids = encoded["input_ids"]
    refuse_unknown_tokens(int(ids.max()), vocabulary, kind, "--clip_l_tokenizer" if kind == "CLIP" else "--t5xxl_tokenizer")
    return ids, encoded["attention_mask"]

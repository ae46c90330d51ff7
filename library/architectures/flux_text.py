"""Captions to what FLUX.1 reads: T5's token states and CLIP's pooled vector."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from library.architectures.t5 import encode_t5
from library.architectures.tokenizers import padded, refuse_unknown_tokens


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
        states, mask = encode_t5(modules["t5"], tokenizers.t5, captions, t5_length, apply_mask)
        text |= {"t5": states, "t5_mask": mask.to(states.device)}
    if "clip" in modules:
        text["clip_pooled"] = _clip(modules["clip"], tokenizers, captions)
    return text


def _clip(clip: nn.Module, tokenizers: Tokenizers, captions: Sequence[str]) -> torch.Tensor:
    """The pooled vector (B, D)."""
    words = clip.get_input_embeddings().weight
    length = clip.config.max_position_embeddings
    clip_ids, _ = padded(tokenizers.clip, captions, length)  # (B, 77)
    refuse_unknown_tokens(int(clip_ids.max()), words.shape[0], "CLIP", "--clip_l_tokenizer")
    output = clip(input_ids=clip_ids.to(words.device)).last_hidden_state  # (B, 77, D), final norm applied
    # The pooled vector is the state at the first end token (padding repeats it); taken here by the tokenizer's own number,
    # because configs in circulation name a wrong one.
    end = (clip_ids == tokenizers.clip.eos_token_id).int().argmax(dim=-1)
    return output[torch.arange(len(captions), device=output.device), end.to(output.device)]

"""Token counts of captions, before any weights are read: what ``encode_text`` will cut off, and where."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from library.architectures.flux_parts import TOKENIZERS
from library.architectures.tokenizers import load_tokenizer
from library.data.tokens import TokenCount, TokenMeter

CLIP_TOKENS = 77  # positions of CLIP-L


def read_token_meter(clip_folder: Path, t5_folder: Path, t5_length: int) -> TokenMeter:
    """Counts with the tokenizers in two folders; T5 is given at most ``t5_length`` tokens. UserError when one cannot be read."""
    clip = load_tokenizer(TOKENIZERS["clip_l_tokenizer"], clip_folder)
    t5 = load_tokenizer(TOKENIZERS["t5xxl_tokenizer"], t5_folder)

    def count(texts: Sequence[str]) -> list[list[TokenCount]]:
        rows = [_counts("T5", t5, texts, t5_length), _counts("CLIP", clip, texts, CLIP_TOKENS)]
        return [list(of_text) for of_text in zip(*rows, strict=True)]
    return count


def _counts(encoder: str, tokenizer: Any, texts: Sequence[str], limit: int) -> list[TokenCount]:
    if not texts:
        return []
    encoded = tokenizer(list(texts), verbose=False, return_offsets_mapping=True)
    counts = []
    for text, ids, spans in zip(texts, encoded["input_ids"], encoded["offset_mapping"], strict=True):
        # The encoder's text ends with an end token: of a text that is cut, one place less is left for words.
        lost = text[spans[limit - 2][1]:].strip() if len(ids) > limit >= 2 else text if len(ids) > limit else ""
        counts.append(TokenCount(encoder, len(ids), limit, lost))
    return counts

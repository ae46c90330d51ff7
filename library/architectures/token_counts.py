"""Token counts of captions by a tokenizer alone: how many tokens an encoder would be given, and which words it loses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from library.data.tokens import TokenCount, TokenMeter

CLIP_TOKENS = 77  # positions of every CLIP text tower


def meter(encoders: Sequence[tuple[str, Any, int]]) -> TokenMeter:
    """Counts for several encoders: (name, tokenizer, the most tokens it is given)."""
    def count(texts: Sequence[str]) -> list[list[TokenCount]]:
        rows = [_counts(name, tokenizer, texts, limit) for name, tokenizer, limit in encoders]
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

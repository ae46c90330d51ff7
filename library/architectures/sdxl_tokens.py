"""Token counts of captions, before any weights are read: what ``encode_text`` will cut off, and where."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from library.architectures.attention_weights import parse
from library.architectures.clip_chunks import ROOM
from library.data.tokens import TokenCount, TokenMeter

ENDS = 2  # the markers of beginning and end


def read_token_meter(tokenizer: Any, chunks: int, weighted: bool) -> TokenMeter:
    """Counts for both encoders at once: their tokenizers have the same vocabulary. Limits: 77, 152 or 227 tokens."""
    def count(texts: Sequence[str]) -> list[list[TokenCount]]:
        return [[_count(tokenizer, text, chunks * ROOM, weighted)] for text in texts]
    return count


def _count(tokenizer: Any, caption: str, room: int, weighted: bool) -> TokenCount:
    tokens, lost = 0, ""
    for text, _ in parse(caption) if weighted else [(caption, 1.0)]:
        encoded = tokenizer(text, add_special_tokens=False, verbose=False, return_offsets_mapping=True)
        spans = encoded["offset_mapping"]
        left = room - tokens
        if len(spans) > left:
            lost += text[spans[left - 1][1]:] if left > 0 else text
        tokens += len(spans)
    return TokenCount("CLIP", tokens + ENDS, room + ENDS, lost.strip())

"""Token counts of captions, before any weights are read: what ``encode_text`` will cut off, and where."""

from __future__ import annotations

from pathlib import Path

from library.architectures.flux_parts import TOKENIZERS
from library.architectures.token_counts import CLIP_TOKENS, meter
from library.architectures.tokenizers import load_tokenizer
from library.data.tokens import TokenMeter


def read_token_meter(clip_folder: Path, t5_folder: Path, t5_length: int) -> TokenMeter:
    """Counts with the tokenizers in two folders; T5 is given at most ``t5_length`` tokens. UserError when one cannot be read."""
    clip = load_tokenizer(TOKENIZERS["clip_l_tokenizer"], clip_folder)
    t5 = load_tokenizer(TOKENIZERS["t5xxl_tokenizer"], t5_folder)
    return meter([("T5", t5, t5_length), ("CLIP", clip, CLIP_TOKENS)])

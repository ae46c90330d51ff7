"""Token counts of captions, before any weights are read: what ``encode_text`` will cut off, and where."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from library.architectures.sd3_parts import TOKENIZERS
from library.architectures.token_counts import CLIP_TOKENS, meter
from library.architectures.tokenizers import load_tokenizer
from library.data.tokens import TokenMeter


def read_token_meter(folders: Mapping[str, Path], t5_length: int) -> TokenMeter:
    """Counts with the tokenizers in ``folders`` (by encoder). Both CLIPs have the same vocabulary and count as one; T5 is given
    at most ``t5_length`` tokens. UserError when a tokenizer cannot be read."""
    encoders = []
    if "t5xxl" in folders:
        encoders.append(("T5", load_tokenizer(TOKENIZERS["t5xxl"], folders["t5xxl"]), t5_length))
    clip = next((name for name in ("clip_l", "clip_g") if name in folders), None)
    if clip is not None:
        encoders.append(("CLIP", load_tokenizer(TOKENIZERS[clip], folders[clip]), CLIP_TOKENS))
    return meter(encoders)

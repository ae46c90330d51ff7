"""Captions to what Lumina reads, and their tokens counted before any weights are read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from library.architectures.gemma import encode
from library.architectures.lumina_parts import TOKENIZER
from library.data.tokens import TokenCount, TokenMeter
from library.errors import UserError

NAME = "gemma"
TRIM = {NAME: f"{NAME}_mask"}  # the transformers never read padding
MARKER = " <Prompt Start> "  # between the instruction and the caption (Lumina-Image-2.0, `sample.py`)


def instructed(captions: Sequence[str], system_prompt: str) -> list[str]:
    """The instruction before every caption; an empty one, which stands for no condition at all, stays empty."""
    return [f"{system_prompt}{MARKER}{caption}" if system_prompt and caption else caption for caption in captions]


def encode_text(encoder: nn.Module, tokenizer: Any, captions: Sequence[str], length: int,
                system_prompt: str) -> dict[str, torch.Tensor]:
    """``gemma`` (B, length, D): states before the last layer, zero where padded; ``gemma_mask`` (B, length) bool."""
    states, mask = encode(encoder, tokenizer, instructed(captions, system_prompt), length, TOKENIZER.flag)
    return {NAME: states, TRIM[NAME]: mask}


def token_meter(tokenizer: Any, length: int, system_prompt: str) -> TokenMeter:
    """Counts with the instruction, which takes its share of ``length`` tokens. Counting is a UserError when it takes all."""
    def count(texts: Sequence[str]) -> list[list[TokenCount]]:
        if not texts:
            return []
        said = f"{system_prompt}{MARKER}".rstrip()  # the last space goes into the caption's first token
        if system_prompt and (taken := len(tokenizer(said, verbose=False)["input_ids"])) >= length:
            raise UserError(f"the instruction takes {taken} tokens of the {length} that Gemma reads: no caption would be read",
                            place="--system_prompt", remedy=f"shorten it, or give --gemma2_max_token_length more than {taken}")
        whole = instructed(texts, system_prompt)
        encoded = tokenizer(whole, verbose=False, return_offsets_mapping=True)
        rows = zip(whole, encoded["input_ids"], encoded["offset_mapping"], strict=True)
        return [[TokenCount("Gemma", len(ids), length, text[spans[length - 1][1]:].strip() if len(ids) > length else "")]
                for text, ids, spans in rows]
    return count

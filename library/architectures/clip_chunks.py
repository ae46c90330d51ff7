"""Captions for CLIP encoders as chunks of 77 token numbers, so that a caption may be longer than one context."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from library.architectures import attention_weights

CONTEXT = 77  # begin, 75 tokens of the caption, end
ROOM = CONTEXT - 2


def length(chunks: int) -> int:
    """Tokens of ``chunks`` chunks that were joined."""
    return ROOM * chunks + 2


@dataclass(frozen=True)
class Chunks:
    """``ids`` (B, n, 77) int64 and ``weights`` (B, n, 77) float32 on the CPU."""

    ids: torch.Tensor
    weights: torch.Tensor


def chunk(tokenizer: Any, captions: Sequence[str], count: int, pad: int, weighted: bool) -> Chunks:
    """Each caption in ``count`` chunks: begin token, up to 75 tokens, end token, and ``pad`` to the end.

    What does not fit into all chunks is cut. ``weighted``: brackets are attention weights and no text; begin, end and padding
    weigh 1. Only ids of the text come from the tokenizer: how it pads by itself is of no matter.
    """
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    ids = torch.full((len(captions), count, CONTEXT), pad, dtype=torch.int64)
    weights = torch.ones(len(captions), count, CONTEXT)
    for row, caption in enumerate(captions):
        tokens, values = _tokens(tokenizer, caption, weighted)
        for index in range(count):
            part = slice(index * ROOM, (index + 1) * ROOM)
            inside = tokens[part]
            line = [begin, *inside, end]
            ids[row, index, :len(line)] = torch.tensor(line)
            weights[row, index, 1:1 + len(inside)] = torch.tensor(values[part])
    return Chunks(ids, weights)


def _tokens(tokenizer: Any, caption: str, weighted: bool) -> tuple[list[int], list[float]]:
    """Token numbers of a caption without begin and end, and the weight of each."""
    pieces = attention_weights.parse(caption) if weighted else [(caption, 1.0)]
    tokens: list[int] = []
    values: list[float] = []
    for text, weight in pieces:
        numbers = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        tokens += numbers
        values += [weight] * len(numbers)
    return tokens, values


def join(states: torch.Tensor) -> torch.Tensor:
    """(B, n, 77, D) -> (B, 75 n + 2, D): the first chunk's begin, the middles of all, and the last chunk's end."""
    batch, _, _, width = states.shape
    middle = states[:, :, 1:-1].reshape(batch, -1, width)
    return torch.cat([states[:, 0, :1], middle, states[:, -1, -1:]], dim=1)

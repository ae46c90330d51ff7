"""Calling a CLIP text tower on chunks of tokens: the states before its last layer, and its layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from library.architectures.clip_chunks import Chunks, join
from library.architectures.tokenizers import refuse_unknown_tokens
from library.errors import UserError


def run(encoder: nn.Module, chunks: Chunks, tokenizer: Any, title: str, flag: str,
        weighted: bool = False) -> tuple[torch.Tensor, Any]:
    """States (B, 75 n + 2, width) before the last layer, and all that the encoder returned for the (B n, 77) tokens.

    ``flag`` names another tokenizer, in messages. UserError when the tokenizer does not belong to the encoder.
    """
    module = getattr(encoder, "module", encoder)  # the plain module under DistributedDataParallel
    words = module.get_input_embeddings().weight  # (V, width)
    refuse_unknown_tokens(int(chunks.ids.max()), words.shape[0], title, flag)
    if module.config.eos_token_id != tokenizer.eos_token_id:
        raise UserError(f"the {title} tokenizer ends captions with token {tokenizer.eos_token_id}, but its encoder was made for "
                        f"{module.config.eos_token_id}", remedy=f"give the tokenizer that belongs to the encoder with {flag}")
    batch, count, length = chunks.ids.shape
    output = encoder(input_ids=chunks.ids.view(batch * count, length).to(words.device), output_hidden_states=True)
    states = output.hidden_states[-2].unflatten(0, (batch, count))  # (B, n, 77, width)
    if weighted:
        states = states * chunks.weights.to(states)[..., None]
    return join(states), output


def blocks(encoder: nn.Module) -> list[nn.Module]:
    """An encoder's layers in the order they run, to be recomputed."""
    return list(getattr(encoder, "text_model", encoder).encoder.layers)

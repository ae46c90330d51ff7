"""Captions to what SDXL reads: the states of both text encoders side by side, and the second one's pooled vector.

Conventions (Stability AI ``generative-models``, ``sd_xl_base.yaml``): from each encoder the states before its last layer, without
the final norm; the pooled vector is the last state at the end token, normed and projected by the second encoder's
``text_projection``. The first tokenizer pads with the end token, the second with token 0, which is ``!``.
Letters: B batch, n chunks of 77 tokens, L = 75 n + 2, D the sum of both encoders' widths, P the width of the pooled vector.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from library.architectures.clip_chunks import ROOM, Chunks, chunk, join
from library.architectures.tokenizers import refuse_unknown_tokens
from library.errors import UserError

SECOND_PAD = 0
NAMES = ("clip_l", "clip_g")


@dataclass
class Tokenizers:
    """Both tokenizers, and how many captions were cut short since the last ``truncation_note``."""

    clip_l: Any
    clip_g: Any
    truncated: int = 0

    def truncation_note(self, chunks: int) -> str:
        """One line about captions that did not fit, or an empty string; counting starts anew."""
        count, self.truncated = self.truncated, 0
        longer = " or 150 or 225 for longer ones" if chunks == 1 else ""
        return (f"{count} captions are longer than {chunks * ROOM} tokens and were cut there (--max_token_length{longer})"
                if count else "")


def encode_text(clip_l: nn.Module, clip_g: nn.Module, tokenizers: Tokenizers, captions: Sequence[str], chunks: int,
                weighted: bool) -> dict[str, torch.Tensor]:
    """``hidden`` (B, 75 chunks + 2, D) and ``pooled`` (B, P), in the encoders' dtypes, with gradients where they train.

    Longer captions are encoded in ``chunks`` pieces of 75 tokens, each with a begin and an end of its own; of these the first
    begin and the last end stay. The pooled vector is that of the first piece. ``weighted``: brackets in captions weigh tokens
    (``attention_weights``); their states are multiplied, the pooled vector is not. Captions that are too long are cut and
    counted in ``tokenizers.truncated``.
    """
    end = tokenizers.clip_l.eos_token_id
    first = chunk(tokenizers.clip_l, captions, chunks, end, weighted)
    second = chunk(tokenizers.clip_g, captions, chunks, SECOND_PAD, weighted)
    tokenizers.truncated += first.truncated
    hidden_l, _ = _run(clip_l, first, tokenizers.clip_l, "CLIP-L", weighted)
    hidden_g, output = _run(clip_g, second, tokenizers.clip_g, "CLIP-G", weighted)
    pooled = output.text_embeds.unflatten(0, (len(captions), chunks))[:, 0]  # taken by the module at the first end token
    return {"hidden": torch.cat([hidden_l, hidden_g], dim=-1), "pooled": pooled}


def _run(encoder: nn.Module, chunks: Chunks, tokenizer: Any, title: str, weighted: bool) -> tuple[torch.Tensor, Any]:
    """States (B, L, width) before the last layer, and all that the encoder returned for the (B n, 77) tokens."""
    module = getattr(encoder, "module", encoder)  # the plain module under DistributedDataParallel
    words = module.get_input_embeddings().weight  # (V, width)
    refuse_unknown_tokens(int(chunks.ids.max()), words.shape[0], title, "--tokenizer_cache_dir")
    if module.config.eos_token_id != tokenizer.eos_token_id:
        raise UserError(f"the {title} tokenizer ends captions with token {tokenizer.eos_token_id}, but its encoder was made for "
                        f"{module.config.eos_token_id}", remedy="give the tokenizer that belongs to the encoder with "
                                                                "--tokenizer_cache_dir")
    batch, count, length = chunks.ids.shape
    output = encoder(input_ids=chunks.ids.view(batch * count, length).to(words.device), output_hidden_states=True)
    states = output.hidden_states[-2].unflatten(0, (batch, count))  # (B, n, 77, width)
    if weighted:
        states = states * chunks.weights.to(states)[..., None]
    return join(states), output


def trained_parameters(name: str, encoder: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The parameters that the loss depends on: all, but of the first encoder not its last layer and its final norm."""
    parameters = list(encoder.named_parameters())
    if name != NAMES[0]:
        return parameters
    idle = (f"encoder.layers.{encoder.config.num_hidden_layers - 1}.", "final_layer_norm.")
    return [(key, parameter) for key, parameter in parameters if not key.removeprefix("text_model.").startswith(idle)]


def blocks(encoder: nn.Module) -> list[nn.Module]:
    """An encoder's layers in the order they run, to be recomputed."""
    return list(getattr(encoder, "text_model", encoder).encoder.layers)

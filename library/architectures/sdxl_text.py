"""Captions to what SDXL reads: the states of both text encoders side by side, and the second one's pooled vector.

Conventions (Stability AI ``generative-models``, ``sd_xl_base.yaml``): from each encoder the states before its last layer, without
the final norm; the pooled vector is the last state at the end token, normed and projected by the second encoder's
``text_projection``. The first tokenizer pads with the end token, the second with token 0, which is ``!``.
Letters: B batch, n chunks of 77 tokens, L = 75 n + 2, D the sum of both encoders' widths, P the width of the pooled vector.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from library.architectures.clip_chunks import chunk
from library.architectures.clip_states import run

SECOND_PAD = 0
_FLAG = "--tokenizer_cache_dir"
NAMES = ("clip_l", "clip_g")


@dataclass
class Tokenizers:
    """Both tokenizers."""

    clip_l: Any
    clip_g: Any


def encode_text(modules: Mapping[str, nn.Module], tokenizers: Tokenizers, captions: Sequence[str], chunks: int,
                weighted: bool) -> dict[str, torch.Tensor]:
    """Of ``clip_l`` its states (B, 75 chunks + 2, D); of ``clip_g`` the same, and ``pooled`` (B, P): of those in ``modules``, in
    the encoders' dtypes, with gradients where they train.

    Longer captions are encoded in ``chunks`` pieces of 75 tokens, each with a begin and an end of its own; of these the first
    begin and the last end stay. The pooled vector is that of the first piece. ``weighted``: brackets in captions weigh tokens
    (``attention_weights``); their states are multiplied, the pooled vector is not. Captions that are too long are cut.
    """
    text: dict[str, torch.Tensor] = {}
    if "clip_l" in modules:
        pieces = chunk(tokenizers.clip_l, captions, chunks, tokenizers.clip_l.eos_token_id, weighted)
        text["clip_l"], _ = run(modules["clip_l"], pieces, tokenizers.clip_l, "CLIP-L", _FLAG, weighted)
    if "clip_g" in modules:
        pieces = chunk(tokenizers.clip_g, captions, chunks, SECOND_PAD, weighted)
        text["clip_g"], output = run(modules["clip_g"], pieces, tokenizers.clip_g, "CLIP-G", _FLAG, weighted)
        # taken by the module at the first end token
        text["pooled"] = output.text_embeds.unflatten(0, (len(captions), chunks))[:, 0]
    return text


def side_by_side(text: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """What the U-Net attends to: the states of both encoders (B, L, D)."""
    return torch.cat([text["clip_l"], text["clip_g"]], dim=-1)


def trained_parameters(name: str, encoder: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The parameters that the loss depends on: all, but of the first encoder not its last layer and its final norm."""
    parameters = list(encoder.named_parameters())
    if name != NAMES[0]:
        return parameters
    idle = (f"encoder.layers.{encoder.config.num_hidden_layers - 1}.", "final_layer_norm.")
    return [(key, parameter) for key, parameter in parameters if not key.removeprefix("text_model.").startswith(idle)]

"""Captions to what SD3 reads, one set of tensors per encoder, and what they are put together to.

Conventions (Stability AI ``sd3.5``; ``StableDiffusion3Pipeline`` of diffusers): of both CLIPs the states before the last layer,
side by side and widened with zeros to the width of T5's states, which follow them as further tokens; and both pooled vectors side
by side. CLIP-L's tokenizer pads with the end token, CLIP-G's with token 0, which is ``!``. A missing encoder leaves zeros.

The transformer has no mask. With ``--apply_lg_attn_mask`` and ``--apply_t5_attn_mask`` the states of padding are zero, and T5
does not attend to padding (in CLIP no token sees what follows it). The same is cached, where zeros take no room.
Letters: B batch, L tokens, W width of an encoder, D width of the context, P of the pooled vector.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from library.architectures import t5
from library.architectures.clip_chunks import CONTEXT, chunk
from library.architectures.clip_states import run
from library.objectives.noise import Draws

NAMES = ("clip_l", "clip_g", "t5xxl")
CORNERS = "corners"  # (B, 2): where pictures lie on the table of positions, see sd3_positions
SECOND_PAD = 0
_TITLES = {"clip_l": "CLIP-L", "clip_g": "CLIP-G"}


@dataclass(frozen=True)
class Tokenizers:
    """Those of the encoders that there are."""

    clip_l: Any = None
    clip_g: Any = None
    t5xxl: Any = None


@dataclass(frozen=True)
class Masks:
    """Of which encoders padding is hidden."""

    clip: bool = False
    t5: bool = False

    @property
    def trim(self) -> dict[str, str]:
        """Name of a text tensor -> name of its mask."""
        names = [*(_TITLES if self.clip else ()), *(["t5xxl"] if self.t5 else ())]
        return {name: f"{name}_mask" for name in names}


def encode_text(modules: Mapping[str, nn.Module], tokenizers: Tokenizers, captions: Sequence[str], t5_length: int,
                masks: Masks = Masks()) -> dict[str, torch.Tensor]:
    """Of the encoders in ``modules``, in their dtypes, with gradients where they train: ``clip_l`` and ``clip_g`` (B, 77, W) with
    ``clip_l_pooled`` and ``clip_g_pooled`` (B, W); ``t5xxl`` (B, t5_length, W); ``{name}_mask`` (B, L) bool, true for a token,
    where padding is hidden. Captions that are too long are cut, with their end token kept.
    """
    text: dict[str, torch.Tensor] = {}
    for name, title in _TITLES.items():
        if name in modules:
            text |= _clip(name, title, modules[name], getattr(tokenizers, name), captions, masks.clip)
    if "t5xxl" in modules:
        states, mask = t5.encode_t5(modules["t5xxl"], tokenizers.t5xxl, captions, t5_length, masks.t5)
        text |= _hidden("t5xxl", states, mask, masks.t5)
    return text


def _clip(name: str, title: str, encoder: nn.Module, tokenizer: Any, captions: Sequence[str],
          hide: bool) -> dict[str, torch.Tensor]:
    end = tokenizer.eos_token_id
    pieces = chunk(tokenizer, captions, 1, end if name == "clip_l" else SECOND_PAD, weighted=False)
    states, output = run(encoder, pieces, tokenizer, title, f"--{name}_tokenizer")
    ends = (pieces.ids[:, 0] == end).int().argmax(dim=-1)  # (B,): where captions end
    mask = torch.arange(CONTEXT) <= ends[:, None]
    # A CLIP without a projection, as CLIP-L in the published files, hands out the state itself.
    pooled = output.text_embeds if "text_embeds" in output else output.pooler_output
    return _hidden(name, states, mask, hide) | {f"{name}_pooled": pooled}


def _hidden(name: str, states: torch.Tensor, mask: torch.Tensor, hide: bool) -> dict[str, torch.Tensor]:
    if not hide:
        return {name: states}
    mask = mask.to(states.device)
    return {name: states.masked_fill(~mask[..., None], 0), f"{name}_mask": mask}


def context(text: Mapping[str, torch.Tensor], batch: int, width: int, pooled_width: int, t5_length: int,
            device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """What the transformer reads, float32 on ``device``: tokens (B, 77 + L, width) and the pooled vector (B, pooled_width)."""
    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(batch, *shape, device=device)

    def given(name: str, missing: torch.Tensor) -> torch.Tensor:
        return text[name].to(device, torch.float32) if name in text else missing

    other = {"clip_l": "clip_g", "clip_g": "clip_l"}
    # A CLIP's states are as wide as its pooled vector, so a missing one leaves as much room as the other does not take.
    room = {name: pooled_width - (text[f"{other[name]}_pooled"].shape[1] if f"{other[name]}_pooled" in text else 0)
            for name in other}
    pooled = [given(f"{name}_pooled", zeros(room[name])) for name in other]
    clips = [given(name, zeros(CONTEXT, room[name])) for name in other]
    if not any(name in text for name in other):
        pooled, clips = [zeros(pooled_width)], [zeros(CONTEXT, 0)]
    beside = torch.cat(clips, dim=-1)
    beside = torch.nn.functional.pad(beside, (0, width - beside.shape[-1]))
    return torch.cat([beside, given("t5xxl", zeros(t5_length, width))], dim=1), torch.cat(pooled, dim=-1)


def vary(text: Mapping[str, torch.Tensor], draws: Draws, rates: Mapping[str, float], crop_rate: float) -> dict[str, torch.Tensor]:
    """Each sample loses each encoder with its own chance (``rates`` by name: its tensors become zero), and with the chance
    ``crop_rate`` its picture lies anywhere on the table of positions and not in the middle."""
    varied = dict(text)
    for name, rate in rates.items():
        if rate <= 0:
            continue
        lost = draws.uniforms(f"{name} dropout") < rate  # (B,)
        for key in (name, f"{name}_pooled"):
            if key in varied:
                value = varied[key]
                varied[key] = value.masked_fill(lost.to(value.device).view(-1, *[1] * (value.ndim - 1)), 0)
    if crop_rate > 0:
        elsewhere = draws.uniforms("position crop") < crop_rate
        corners = torch.stack([draws.uniforms("position row"), draws.uniforms("position column")], dim=1)
        varied[CORNERS] = torch.where(elsewhere[:, None], corners, -1.0)
    return varied

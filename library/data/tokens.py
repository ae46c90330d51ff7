"""How many tokens a caption has for each text encoder: what an architecture can count before any encoder is loaded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class TokenCount:
    """``tokens`` with the markers of beginning and end that the encoder adds, of which it reads at most ``limit``; ``lost`` is
    the end of the caption that it never sees, "" when all of it fits."""

    encoder: str
    tokens: int
    limit: int
    lost: str = ""


TokenMeter = Callable[[Sequence[str]], list[list[TokenCount]]]
"""Texts -> for each text a count for each encoder, in the same order for all texts."""

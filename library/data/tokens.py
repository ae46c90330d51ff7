"""How many tokens a caption has for each text encoder: what an architecture can count before any encoder is loaded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy

from library.data.caption import variant
from library.data.items import Items

LETTERS = 1000  # a caption: so many on average are counted, lest a folder of novels hold up a start
LOOKED_AT = 10  # captions for each that is counted: many may be the same


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


@dataclass(frozen=True)
class Counted:
    """Distinct texts, the longest first: where each stands (a sample id) and its counts. ``complete``: none was left out."""

    samples: Sequence[tuple[str, Sequence[TokenCount]]] = ()
    complete: bool = True


def count_longest(items: Items, seed: int, meter: TokenMeter, most: int) -> Counted:
    """Of the captions with the most bytes, at most ``most``: the ones that do not fit are among them. Captions that vary are
    counted in the first of their variants."""
    lengths = numpy.empty(len(items), dtype=numpy.int64)
    for index, listing in enumerate(items.listings):
        here = items.listing == index
        lengths[here] = numpy.diff(listing.captions.offsets)[items.row[here]]
    firsts: dict[str, str] = {}  # text -> the first sample that has it
    seen, letters = 0, 0
    for row in numpy.argsort(-lengths, kind="stable")[:LOOKED_AT * most].tolist():
        name = items.sample_id(row)
        text = variant(items.caption(row), items.subset(row).captions, seed, name, 0)
        if text not in firsts:
            if firsts and (len(firsts) == most or letters + len(text) > LETTERS * most):
                break
            letters += len(text)
            firsts[text] = name
        seen += 1
    return Counted(list(zip(firsts.values(), meter(list(firsts)), strict=True)), complete=seen == len(items))

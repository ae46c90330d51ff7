"""Attention weights written into a prompt: ``(a word:1.3)`` counts more, ``[a word]`` less. Pure text, no tokens.

The notation is that of AUTOMATIC1111's web interface, which the dialect follows: round brackets multiply by 1.1, or by the
number behind a colon; square brackets divide by 1.1; brackets nest; a backslash before a bracket makes it a letter; a bracket
that is never closed holds to the end of the text.
"""

from __future__ import annotations

import re

STEP = 1.1
_PIECE = re.compile(r"\\(?P<escaped>[()\[\]\\])|(?P<open>[(\[])|:\s*(?P<number>[+-]?(\d+\.?\d*|\.\d+))\s*\)|(?P<close>[)\]])"
                    r"|[^\\()\[\]:]+|.", re.DOTALL)


def parse(caption: str) -> list[tuple[str, float]]:
    """``a (red:1.5) cat`` -> [("a ", 1.0), ("red", 1.5), (" cat", 1.0)]: pieces in order, with no empty ones among them.

    A closing bracket without an opening one is an ordinary letter, as is a number in front of a bracket that nothing opened.
    """
    pieces: list[list] = []  # [text, weight]
    open_at: dict[str, list[int]] = {"(": [], "[": []}

    def multiply(start: int, factor: float) -> None:
        for piece in pieces[start:]:
            piece[1] *= factor

    for match in _PIECE.finditer(caption):
        opener = {")": "(", "]": "["}.get(match["close"])
        if match["open"]:
            open_at[match["open"]].append(len(pieces))
        elif match["number"] and open_at["("]:
            multiply(open_at["("].pop(), float(match["number"]))
        elif opener and open_at[opener]:
            multiply(open_at[opener].pop(), STEP if opener == "(" else 1 / STEP)
        else:
            pieces.append([match["escaped"] or match[0], 1.0])
    for start in open_at["("]:
        multiply(start, STEP)
    for start in open_at["["]:
        multiply(start, 1 / STEP)
    return _joined(pieces)


def _joined(pieces: list[list]) -> list[tuple[str, float]]:
    """Neighbours of the same weight as one, so that words are tokenised whole."""
    joined: list[tuple[str, float]] = []
    for text, weight in pieces:
        if joined and joined[-1][1] == weight:
            joined[-1] = (joined[-1][0] + text, weight)
        else:
            joined.append((text, weight))
    return joined

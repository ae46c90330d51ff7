"""Masks that teach nothing, found by a look into some of them: black all over, or made of a transparency that is not there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy

from library.data.decode import decoded
from library.data.header import open_picture
from library.data.items import Items
from library.errors import UserError


@dataclass(frozen=True)
class MasksSeen:
    """What was found in the masks of one subset. ``black``: rows of pictures of which no part counts; ``plain``: how many count
    as a whole; ``seen``: how many were looked at."""

    subset: int  # index into ``Items.subsets``
    black: tuple[int, ...]
    plain: int
    seen: int


def look_at_masks(items: Items, most: int) -> Iterator[MasksSeen]:
    """For each subset with masks, of up to ``most`` pictures spread over it. What cannot be read is somebody else's to tell."""
    for number, subset in enumerate(items.subsets):
        rows = numpy.flatnonzero(items.listing == number)
        if subset.mask == "none" or not len(rows):
            continue
        black, plain, seen = [], 0, 0
        for row in rows[numpy.linspace(0, len(rows) - 1, min(most, len(rows))).astype(int)].tolist():
            try:
                brightest, darkest = _extremes(items, row)
            except UserError:
                continue
            seen += 1
            plain += darkest == 255
            if brightest == 0:
                black.append(row)
        yield MasksSeen(number, tuple(black), plain, seen)


def _extremes(items: Items, row: int) -> tuple[int, int]:
    """(brightest, darkest) value of the mask, 0 to 255."""
    item = items[row]
    if item.mask is None:
        return 255, 255
    source = item.path if item.mask == "alpha" else item.mask
    if item.mask == "alpha":
        with open_picture(source, str(source)) as picture:
            if "A" not in picture.getbands() and "a" not in picture.getbands() and "transparency" not in picture.info:
                return 255, 255  # opaque by its format: no pixel has to be read
    with decoded(source, str(source)) as picture:
        if item.mask == "alpha":
            low, high = picture.alpha.getextrema() if picture.alpha is not None else (255, 255)
        else:
            low, high = picture.on("black").getchannel("R").getextrema()
    return int(high), int(low)

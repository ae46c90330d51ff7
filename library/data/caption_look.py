"""Captions that are there and not read, because they end otherwise than the settings say."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

import numpy

from library.data.caption_files import other_caption, stems
from library.data.items import Items


@dataclass(frozen=True)
class Unread:
    """``rows``: of the pictures of one subset that were looked at, those shown with class_tokens beside a caption of another
    ending; ``suffix`` is that of the first. ``seen``: how many pictures were looked at."""

    subset: int  # index into ``Items.subsets``
    rows: tuple[int, ...]
    suffix: str
    seen: int


def unread_captions(items: Items, most: int) -> Iterator[Unread]:
    """Of each subset whose class_tokens stand in for captions that are missing; up to ``most`` pictures spread over it are looked
    at. Where there are no class_tokens, a missing caption is an error that the scan has told already.

    ``.json`` beside pictures is mostly what a download tool wrote down, and no caption: it is not counted.
    """
    for number, subset in enumerate(items.subsets):
        if not subset.class_tokens or subset.metadata_file is not None or subset.source is not None:
            continue
        rows = numpy.flatnonzero(items.listing == number)
        looked = rows[numpy.linspace(0, len(rows) - 1, min(most, len(rows))).astype(int)].tolist()
        found: dict[int, str] = {}
        for row in looked:
            picture = str(items.path(row))
            if items.caption(row) != subset.class_tokens or _has_own(picture, subset.caption_suffixes):
                continue
            if ending := other_caption(picture, (*subset.caption_suffixes, ".json"))[1]:
                found[row] = ending
        if found:
            yield Unread(number, tuple(found), next(iter(found.values())), len(looked))


def _has_own(picture: str, suffixes: tuple[str, ...]) -> bool:
    return any(os.path.isfile(stem + suffix) for stem in stems(picture) for suffix in suffixes)

"""Found pictures + what is known of them -> columns: decides what has to be looked at again, and puts old and new together."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy

from library.data.index import Columns, equal, join
from library.data.keys import KEY_BYTES
from library.data.listing import Found
from library.data.look import CHUNK, UNKNOWN, Chunk, Looked, Rules, look_at
from library.data.problems import Tally
from library.data.spec import SubsetSpec
from library.data.strings import Strings

Check = Literal["full", "fast", "none"]

# A file that was written so shortly before a look may change again without another time: FAT counts in steps of two seconds.
# Times far in the future are dates that somebody set, not the clock of a file server.
UNSURE_BEFORE, UNSURE_AFTER = 2 * 10**9, 24 * 3600 * 10**9  # ns


def examine(found: Found, old: Columns | None, same_captions: bool, subset: SubsetSpec, check: Check, began: int,
            tally: Tally) -> tuple[Columns, bool]:
    """(all about the pictures of ``found``, whether that should be kept). What is wrong with them goes to ``tally``.

    ``old`` is what an earlier look saw, of these pictures or others in the same folder; its captions count only with
    ``same_captions``. With ``check`` "full" nothing of it counts, unless another process has made it since ``began``, the time_ns
    of this scan's start. Problems that ``tally`` has already are those of finding the pictures.
    """
    forgotten = check == "full" and old is not None and old.saved < began
    draft = _Draft(found, None if forgotten else old, same_captions, began, check)
    sound = not any(problem.severity == "error" for problem in tally.problems)
    draft.look(Rules.of(subset, found.root), tally)
    columns = draft.columns(sound)
    if old is None or not same_captions or draft.settled or not columns.same(old):
        return columns, True
    return replace(old, content=columns.content, mask_content=columns.mask_content) if draft.looked_again else old, False


class _Draft:
    """Columns in the making, beginning with the rows of ``old`` that have the same names."""

    def __init__(self, found: Found, old: Columns | None, same_captions: bool, began: int, check: Check):
        self.found, self.old, self.began, self.check = found, old, began, check
        self.count = len(found.names)
        self.origin = _rows_of(found.names, old)  # (N,) rows of ``old``, -1 for new pictures; None: all, in order
        self.stamps = self._of_old("stamps", (2,), numpy.int64, UNKNOWN)
        self.caption_stamps = self._of_old("caption_stamps", (2,), numpy.int64, UNKNOWN)
        self.sizes = self._of_old("sizes", (2,), numpy.int32)
        self.name_hash = self._of_old("name_hash", (), numpy.uint64)
        self.content = self._of_old("content", (KEY_BYTES,), numpy.uint8)
        self.mask_stamps, self.mask_content = self._masks_of_old()
        self.hashed = numpy.full(self.count, old is not None) if self.origin is None else self.origin >= 0
        self.parts, self.part, self.row = [Strings.of([]) if old is None else old.captions], None, None
        if found.sources is None:
            self.caption_stamps[:] = 0
        elif old is None or not same_captions:
            self.caption_stamps[:] = UNKNOWN
        else:
            self.caption_stamps[self._of_old("sources", (), numpy.int16) != found.sources] = UNKNOWN
        self.looked_again = False  # some hashes of contents are not believed any more
        self.settled = False  # files that were too new to be believed are old enough now
        if check != "none" and old is not None:
            for stamps in (self.stamps, self.caption_stamps, *([] if self.mask_stamps is None else [self.mask_stamps])):
                unsure = _unsure(stamps, old.started)
                self.settled = self.settled or bool((unsure & ~_unsure(stamps, began)).any())
                stamps[unsure] = UNKNOWN

    def look(self, rules: Rules, tally: Tally) -> None:
        """At all files, or with ``check`` "none" at those that nothing is known of."""
        rows = numpy.arange(self.count)
        if self.check == "none":
            unknown = (self.stamps[:, 0] == UNKNOWN) | (self.caption_stamps[:, 0] == UNKNOWN)
            rows = rows[unknown if self.mask_stamps is None else unknown | (self.mask_stamps[:, 0] == UNKNOWN)]
        chunks = [self._chunk(rules, rows[start:start + CHUNK]) for start in range(0, len(rows), CHUNK)]
        for looked in look_at(chunks):
            self._take(looked)
            tally.take(looked.problems)

    def columns(self, sound: bool) -> Columns:
        found, old = self.found, self.old
        same_names = old is not None and self.origin is None
        captions = found.texts
        if captions is None:
            captions = old.captions if same_names and self.part is None else join(self.parts, *self._caption_rows())
        elif old is not None and equal(captions, old.captions):
            captions = old.captions
        sources = found.sources if found.sources is not None else numpy.zeros(self.count, dtype=numpy.int16)
        return Columns(self.began, old.names if same_names else found.names, captions, found.masks, self.stamps,
                       self.caption_stamps, self.mask_stamps, self.name_hash, self.sizes, found.weights, sources, self.content,
                       self.mask_content, sound)

    def _of_old(self, name: str, shape: tuple[int, ...], dtype: type, missing: int = 0) -> numpy.ndarray:
        """A column's old values, in a new array."""
        if self.old is not None and self.origin is None:
            return getattr(self.old, name).copy()
        values = numpy.full((self.count, *shape), missing, dtype=dtype)
        if self.old is not None:
            known = self.origin >= 0
            values[known] = getattr(self.old, name)[self.origin[known]]
        return values

    def _masks_of_old(self) -> tuple[numpy.ndarray | None, numpy.ndarray | None]:
        """Stamps and hashes of masks, known where the picture has the same mask file as before; None without mask files."""
        masks, old = self.found.masks, self.old
        if masks is None:
            return None, None
        if old is not None and self.origin is None and equal(masks, old.masks):
            return old.mask_stamps.copy(), old.mask_content.copy()
        stamps = numpy.full((self.count, 2), UNKNOWN, dtype=numpy.int64)
        content = numpy.zeros((self.count, KEY_BYTES), dtype=numpy.uint8)
        if old is not None and old.masks is not None:
            origin = numpy.arange(self.count) if self.origin is None else self.origin
            same = numpy.array([at >= 0 and old.masks[at] == mask for mask, at in zip(masks, origin.tolist(), strict=True)],
                               dtype=bool)
            stamps[same], content[same] = old.mask_stamps[origin[same]], old.mask_content[origin[same]]
        return stamps, content

    def _chunk(self, rules: Rules, rows: numpy.ndarray) -> Chunk:
        found, first = self.found, numpy.zeros(len(rows))
        sources = None if found.sources is None else found.sources[rows]
        masks = (None, None) if found.masks is None else (join([found.masks], first, rows), self.mask_stamps[rows])
        return Chunk(rules, rows, join([found.names], first, rows), self.stamps[rows], sources, self.caption_stamps[rows],
                     self.hashed[rows], *masks)

    def _take(self, looked: Looked) -> None:
        self.stamps[looked.rows], self.sizes[looked.rows], self.content[looked.rows] = looked.stamps, looked.sizes, 0
        if self.mask_stamps is not None:
            self.mask_stamps[looked.mask_rows], self.mask_content[looked.mask_rows] = looked.mask_stamps, 0
        self.looked_again = self.looked_again or len(looked.rows) + len(looked.mask_rows) > 0
        self.name_hash[looked.name_rows] = looked.name_hash
        rows = looked.caption_rows
        if len(rows):
            self.caption_stamps[rows] = looked.caption_stamps
            if self.part is None:
                self.part, self.row = self._caption_rows()
            self.part[rows], self.row[rows] = len(self.parts), numpy.arange(len(rows))
            self.parts.append(looked.captions)

    def _caption_rows(self) -> tuple[numpy.ndarray, numpy.ndarray]:
        """For each picture which of ``parts`` its caption is in, and where. A new picture's has been put there by ``_take``."""
        if self.part is not None:
            return self.part, self.row
        rows = numpy.arange(self.count) if self.origin is None else self.origin.copy()
        return numpy.zeros(self.count, dtype=numpy.int64), rows


def _rows_of(names: Strings, old: Columns | None) -> numpy.ndarray | None:
    """For each name its row in ``old``, or -1; None when the names are the same."""
    if old is None:
        return numpy.full(len(names), -1, dtype=numpy.int64)
    if numpy.array_equal(names.offsets, old.names.offsets) and numpy.array_equal(names.blob, old.names.blob):
        return None
    rows = {name: row for row, name in enumerate(old.names)}
    return numpy.fromiter((rows.get(name, -1) for name in names), dtype=numpy.int64, count=len(names))


def _unsure(stamps: numpy.ndarray, started: int) -> numpy.ndarray:
    """Files (N,) that may have changed after the look that began at ``started`` without another time."""
    return (stamps[:, 1] >= started - UNSURE_BEFORE) & (stamps[:, 1] <= started + UNSURE_AFTER)

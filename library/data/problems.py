"""What is wrong with pictures, captions, masks and folders: gathered, not raised, so that all of it can be shown at once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from library.errors import UserError, raise_all

# Kinds of problems, in the words in which "and 12 more" is said.
UNREADABLE = "pictures that cannot be read"
NO_CAPTION = "pictures without a caption"
EMPTY_CAPTION = "empty captions"
BAD_CAPTION = "captions that cannot be read"
NO_MASK = "pictures without a mask"
BAD_FOLDER = "folders that cannot be read"
EMPTY_FOLDER = "folders without pictures"
BAD_METADATA = "metadata that cannot be used"
SPARE_MASK = "masks without a picture"
NOT_LISTED = "pictures without a metadata record"
FORMAT = "pictures in a format that this Pillow cannot read"
MORE_LINES = "captions of several lines of which only the first is used"
NO_INDEX = "indexes that cannot be kept"
WARNINGS = frozenset({SPARE_MASK, NOT_LISTED, FORMAT, MORE_LINES, NO_INDEX})  # all others keep a run from starting

SHOWN_PER_KIND = 5  # mistakes of one kind spelled out before the rest is counted
KEPT_PER_KIND = 200  # and kept as objects, of one subset, for the page that shows the data


@dataclass(frozen=True)
class Problem:
    """``path`` is the file it is about. ``count`` files have it; ``error`` is about the first of them."""

    kind: str
    path: Path | None
    error: UserError
    count: int = 1

    @property
    def severity(self) -> Literal["error", "warning"]:
        return "warning" if self.kind in WARNINGS else "error"


class Tally:
    """Problems of one subset. A million missing captions do not become a million objects: the last one kept of a kind stands
    for all that followed it."""

    def __init__(self) -> None:
        self._kinds: dict[str, list[Problem]] = {}

    def add(self, kind: str, path: Path | str | None, error: UserError, count: int = 1) -> None:
        self.take([Problem(kind, None if path is None else Path(path), error, count)])

    def take(self, problems: Iterable[Problem]) -> None:
        """Add what another tally gathered."""
        for problem in problems:
            kept = self._kinds.setdefault(problem.kind, [])
            if len(kept) < KEPT_PER_KIND:
                kept.append(problem)
            else:
                last = kept[-1]
                kept[-1] = Problem(last.kind, last.path, last.error, last.count + problem.count)

    @property
    def problems(self) -> list[Problem]:
        return [problem for kept in self._kinds.values() for problem in kept]


def raise_errors(problems: Sequence[Problem]) -> None:
    """Raise UserErrors with the first five errors of each kind and the number of the others; nothing for warnings alone."""
    kinds: dict[str, list[Problem]] = {}
    for problem in problems:
        if problem.severity == "error":
            kinds.setdefault(problem.kind, []).append(problem)
    shown = []
    for kind, of_kind in kinds.items():
        first = of_kind[:SHOWN_PER_KIND]
        shown += [problem.error for problem in first]
        rest = sum(problem.count for problem in of_kind) - len(first)
        if rest > 0:
            shown.append(UserError(f"{rest} more: {kind}"))
    raise_all(shown)

"""Mistakes a user can mend, told in one line each: what is wrong, where, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import get_close_matches


class UserError(ValueError):
    """One mistake. ``str()`` is a single line: ``place: message; remedy``.

    ``app.main`` prints it without a stack trace and exits with status 2. Raise it with the offending value in
    ``message``, the file, line or key in ``place`` and the setting to change (and to what) in ``remedy``.
    """

    of_one_process = False  # True: other processes of the run do not know of it, so this one has to tell

    def __init__(self, message: str, *, place: str = "", remedy: str = ""):
        self.message, self.place, self.remedy = message, place, remedy
        line = f"{place}: {message}" if place else message
        super().__init__(" ".join(f"{line}; {remedy}".split()) if remedy else " ".join(line.split()))

    @property
    def problems(self) -> tuple[str, ...]:
        """The lines to print: one here, several for ``UserErrors``."""
        return (str(self),)


class UserErrors(UserError):
    """Several mistakes found in one pass, so that they can be mended in one go."""

    def __init__(self, errors: Iterable[UserError]):
        self.errors = tuple(errors)
        ValueError.__init__(self, " | ".join(line for error in self.errors for line in error.problems))

    @property
    def problems(self) -> tuple[str, ...]:
        return tuple(line for error in self.errors for line in error.problems)


class NoRoom(UserError):
    """The disk has less room than the file needs; nothing was written."""


def raise_all(errors: Sequence[UserError]) -> None:
    """Raise nothing, the only error, or all of them together."""
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise UserErrors(errors)


def nearest(name: str, known: Iterable[str], count: int = 1) -> str:
    """``did you mean 'x'?`` for the closest known names, or an empty string."""
    matches = get_close_matches(name, list(known), n=count, cutoff=0.6)
    return f"did you mean {' or '.join(repr(match) for match in matches)}?" if matches else ""

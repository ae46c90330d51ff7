"""A command line cut into flags and their texts. All mistakes are gathered; none ends the reading."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from library.errors import UserError

_FLAG = re.compile(r"--(?P<name>[A-Za-z]\w*(?:-\w+)*)(?:=(?P<value>.*))?$", re.DOTALL)
_DASHES = "\u2013\u2014\u2212"  # what word processors and web pages make of "--"


@dataclass(frozen=True)
class Given:
    """One flag as written: ``value`` is True for a bare switch, a text, or a list of texts."""

    name: str
    value: bool | str | list[str]


def scan(argv: Sequence[str], takes: Callable[[str], str | None]) -> tuple[list[Given], list[UserError]]:
    """Cut ``argv`` into flags. ``takes(name)`` says ``switch``, ``value``, ``list``, or None for an unknown flag (which
    is returned with all texts that follow it). The last of several equal flags is the one that counts.
    """
    given: list[Given] = []
    errors: list[UserError] = []
    at = 0
    while at < len(argv):
        found = _FLAG.match(argv[at])
        at += 1
        if not found:
            errors.append(_stray(argv[at - 1], given[-1] if given else None, takes))
            if _flag_like(argv[at - 1]):  # its value would only be a second mistake
                at += at < len(argv) and not _FLAG.match(argv[at])
            continue
        name, inline, kind = found["name"], found["value"], takes(found["name"])
        if kind == "switch":
            given.append(Given(name, True if inline is None else inline))
            continue
        texts = [] if inline is None else [inline]
        limit = 1 if kind == "value" else len(argv)
        while inline is None and at < len(argv) and len(texts) < limit and not _FLAG.match(argv[at]):
            texts.append(argv[at])
            at += 1
        if kind is None:
            given.append(Given(name, texts))
        elif not texts:
            errors.append(UserError("needs a value", place=f"--{name}", remedy=f"write --{name} VALUE, or leave it out"))
        else:
            given.append(Given(name, texts[0] if kind == "value" else texts))
    return given, errors


def asks_for_help(argv: Sequence[str]) -> bool:
    return "--help" in argv or "-h" in argv


def _flag_like(text: str) -> bool:
    """Meant as a flag, with the wrong hyphens."""
    return re.match(rf"(?:[{_DASHES}]-?|-)[A-Za-z]\w", text) is not None


def _stray(text: str, before: Given | None, takes: Callable[[str], str | None]) -> UserError:
    """An argument that is neither a flag nor belongs to one."""
    if _flag_like(text):
        name = text.lstrip(f"{_DASHES}-")
        return UserError(f"unexpected argument {text!r}", place="command line", remedy=f"write --{name} with two plain hyphens")
    remedy = "names of flags begin with --"
    if before is not None and takes(before.name) == "switch":
        switch = text.lower() in ("true", "false")
        remedy = f"--{before.name} takes no value" + (f"; write --{before.name}={text.lower()}" if switch else "")
    elif before is not None:
        remedy = f"--{before.name} takes one value; put it in quotes if it holds spaces"
    return UserError(f"unexpected argument {text!r}", place="command line", remedy=remedy)


def last_of_each(given: Sequence[Given]) -> Iterator[Given]:
    """The flags in the order of their first mention, each with its last value."""
    yield from {flag.name: flag for flag in given}.values()

"""TOML files read together with the line of every key, so that a mistake can be told as ``file:line: key``."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from library.errors import UserError

Step = str | int  # a key, or an index into an array (of tables)


@dataclass(frozen=True)
class Locator:
    """Where each key of one TOML file stands. Lines count from 1."""

    path: Path
    lines: dict[tuple[Step, ...], int] = field(default_factory=dict)

    def line(self, *path: Step) -> int | None:
        """The line of a key, table or array element; of the closest enclosing one when it has no line itself."""
        while path and path not in self.lines:
            path = path[:-1]
        return self.lines.get(path)

    def place(self, *path: Step) -> str:
        """``file.toml:12: key`` (or less, where less is known): the ``place`` of a UserError."""
        line = self.line(*path)
        place = f"{self.path}:{line}" if line is not None else str(self.path)
        key = next((step for step in reversed(path) if isinstance(step, str)), None)
        return f"{place}: {key}" if key is not None else place


def load_toml(path: Path) -> tuple[dict, Locator]:
    """The parsed file and its locator.

    Raises UserError (one line, with the line number where there is one) when the file is missing, unreadable, not
    UTF-8 (a byte order mark is accepted) or not TOML.
    """
    path = Path(path)
    text = _read_text(path)
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise _syntax_error(path, text, error) from None
    except RecursionError:
        raise UserError("arrays or tables nested too deeply to read", place=str(path)) from None
    return values, Locator(path, dict(_Scanner(text.replace("\r\n", "\n")).statements()))


def _read_text(path: Path) -> str:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise UserError("no such file", place=str(path), remedy="check the spelling of the path") from None
    except IsADirectoryError:
        raise UserError("this is a folder, not a TOML file", place=str(path)) from None
    except OSError as error:
        if path.is_dir():  # Windows reports a folder as "permission denied"
            raise UserError("this is a folder, not a TOML file", place=str(path)) from None
        raise UserError(f"cannot be read: {error.strerror or error}", place=str(path)) from None
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        place = str(path) if data[:2] in (b"\xff\xfe", b"\xfe\xff") else f"{path}:{line}"
        raise UserError("not a UTF-8 text file", place=place, remedy="save it again with the encoding UTF-8") from None


# For what has no better advice: YAML and other formats, a colon for the equals sign, a bracket that is not closed
_OTHERWISE = "a line is key = value, [table] or [[table]]; close what is opened, and begin remarks with #"


def _syntax_error(path: Path, text: str, error: tomllib.TOMLDecodeError) -> UserError:
    reason, line = str(error), text.count("\n") + 1
    found = re.search(r"\s*\(at (?:line (\d+), column \d+|end of document)\)$", reason)
    if found:
        reason, line = reason[:found.start()], int(found[1] or line)
    remedy = _OTHERWISE
    if text.lstrip()[:1] == "{":
        remedy = "this looks like JSON: write it as TOML (a dataset file may stay JSON if its name ends in .json)"
    elif "escape" in reason or "hex value" in reason:
        remedy = "write Windows paths with / or between 'single quotes'"
    elif "overwrite" in reason:
        remedy = "this key stands twice; remove one of them"
    elif "Invalid value" in reason:
        remedy = "texts stand in \"quotes\", true and false in small letters, decimals after a digit (0.5)"
    return UserError(f"not valid TOML: {reason}", place=f"{path}:{line}", remedy=remedy)


class _Scanner:
    """Walks a text that tomllib has already accepted, so every check of the syntax can be left out."""

    def __init__(self, text: str):
        self.text, self.at = text, 0
        self.counts: dict[tuple[Step, ...], int] = {}  # arrays of tables: concrete path -> tables seen so far
        self.table: tuple[Step, ...] = ()

    def statements(self) -> Iterator[tuple[tuple[Step, ...], int]]:
        self._skip()
        while self.at < len(self.text):
            line = self._line()
            if self.text.startswith("[[", self.at):
                self.table = self._header(2)
                yield self.table, line
            elif self.text[self.at] == "[":
                self.table = self._header(1)
                yield self.table, line
            else:
                yield from self._pair(self.table)
            self._skip()

    def _header(self, brackets: int) -> tuple[Step, ...]:
        self.at += brackets
        keys = self._keys()
        self.at += brackets
        path: tuple[Step, ...] = ()
        for depth, key in enumerate(keys):
            path += (key,)
            if depth == len(keys) - 1 and brackets == 2:
                self.counts[path] = self.counts.get(path, 0) + 1
            if path in self.counts:  # [[a]] then [a.b]: b belongs to the latest a
                path += (self.counts[path] - 1,)
        return path

    def _pair(self, table: tuple[Step, ...]) -> Iterator[tuple[tuple[Step, ...], int]]:
        line = self._line()
        path = table + tuple(self._keys())
        yield path, line
        self.at += 1  # the "="
        yield from self._value(path)

    def _value(self, path: tuple[Step, ...]) -> Iterator[tuple[tuple[Step, ...], int]]:
        self._skip()
        opening = self.text[self.at]
        if opening in "[{":
            self.at += 1
            closing, index = "]}"["[{".index(opening)], 0
            self._skip()
            while self.text[self.at] != closing:
                if opening == "[":
                    yield path + (index,), self._line()
                    yield from self._value(path + (index,))
                else:
                    yield from self._pair(path)
                index += 1
                self._skip()
                if self.text[self.at] == ",":
                    self.at += 1
                    self._skip()
            self.at += 1
        elif opening in "\"'":
            self._string()
        else:  # a number, boolean or date
            self.at = _BARE_VALUE.match(self.text, self.at).end()

    def _keys(self) -> list[str]:
        """A key, dotted or not; stops at what follows it (``=`` or ``]``)."""
        keys = []
        while True:
            self._skip()
            if self.text[self.at] in "\"'":
                keys.append(self._string())
            else:
                found = _BARE_KEY.match(self.text, self.at)
                keys.append(found[0])
                self.at = found.end()
            self._skip()
            if self.text[self.at] != ".":
                return keys
            self.at += 1

    def _string(self) -> str:
        found = _STRING.match(self.text, self.at)
        self.at = found.end()
        return tomllib.loads(f"key = {found[0]}")["key"]

    def _skip(self) -> None:
        self.at = _BLANK.match(self.text, self.at).end()

    def _line(self) -> int:
        return self.text.count("\n", 0, self.at) + 1


_BLANK = re.compile(r"(?:[ \t\r\n]|#[^\n]*)*")
_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
_BARE_VALUE = re.compile(r"[^,\]}\n#]*")
# Multi-line strings may end with up to two extra quotes of their own kind.
_STRING = re.compile(r'"""(?:[^\\]|\\.)*?"{3,5}|\'\'\'.*?\'{3,5}|"(?:[^"\\]|\\.)*"|\'[^\']*\'', re.DOTALL)

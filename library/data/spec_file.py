"""Dataset files in TOML and JSON, read together with the line of every key."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

from library.errors import UserError
from library.toml_lines import Locator, Step, load_toml

_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[{}\[\],:]|[^\s{}\[\],:"]+')


def load_file(path: Path) -> tuple[dict, Locator]:
    """The tables of ``path`` and where each key stands. Raises UserError when it is missing, unreadable or malformed."""
    suffix = path.suffix.lower()
    if suffix == ".jsonl":
        raise UserError("this is a list of pictures, not a dataset file", place=str(path), remedy="give it to --in_json")
    return load_json(path) if suffix == ".json" else load_toml(path)


def load_json(path: Path) -> tuple[dict, Locator]:
    """The object in a JSON file. A key that stands twice in one object is an error, as in TOML."""
    text = _text(path)
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"not valid JSON: {error.msg}", place=f"{path}:{error.lineno}", remedy=_advice(text, error)) from None
    except (RecursionError, ValueError):  # ValueError: a number of thousands of digits
        raise UserError("arrays nested too deeply, or numbers too long, to read", place=str(path)) from None
    if not isinstance(values, dict):
        raise UserError("this is a list, not a dataset file", place=str(path),
                        remedy='it should begin with {"general": {...}, "datasets": [...]}')
    if "datasets" not in values and values and all(isinstance(value, dict) and {"caption", "tags"} & set(value)
                                                   for value in values.values()):
        raise UserError("this is a list of pictures and captions, not a dataset file", place=str(path),
                        remedy="give it to --in_json, or name it as metadata_file in a dataset file")
    return values, Locator(path, dict(_lines(path, text)))


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise UserError("no such file", place=str(path), remedy="check the spelling of the path") from None
    except OSError as error:
        reason = "this is a folder, not a JSON file" if path.is_dir() else f"cannot be read: {error.strerror or error}"
        raise UserError(reason, place=str(path)) from None
    except UnicodeDecodeError:
        raise UserError("not a UTF-8 text file", place=str(path), remedy="save it again with the encoding UTF-8") from None


def _advice(text: str, error: json.JSONDecodeError) -> str:
    """What people most often mean by a text that is not JSON."""
    before, after = text[:error.pos].rstrip(), text[error.pos:].lstrip()
    if "escape" in error.msg:
        return "write Windows paths with / or with two \\\\"
    if after.startswith(("//", "#", "/*")):
        return "JSON has no comments: remove it, or write the file as TOML"
    if (before.endswith(",") and after[:1] in ("}", "]")) or re.match(r",\s*[}\]]", after):
        return "remove the comma before the closing bracket"
    if after.startswith("'"):
        return 'write "double quotes"'
    if re.match(r"(True|False|None)\b", after):
        return "write true, false and null in small letters"
    return "a comma or a bracket is missing or misplaced here or just above"


def _lines(path: Path, text: str) -> Iterator[tuple[tuple[Step, ...], int]]:
    """The line of every key and element of a text that json has already accepted."""
    tokens = [(found[0], found.start()) for found in _TOKEN.finditer(text)]
    seen: set[tuple[Step, ...]] = set()
    at = line = counted = 0

    def here() -> int:
        nonlocal line, counted
        line, counted = line + text.count("\n", counted, tokens[at][1]), tokens[at][1]
        return line + 1

    def value(where: tuple[Step, ...]) -> Iterator[tuple[tuple[Step, ...], int]]:
        nonlocal at
        opening = tokens[at][0]
        at += 1
        index = 0
        while opening in ("{", "[") and tokens[at][0] not in ("}", "]"):
            step: Step = json.loads(tokens[at][0]) if opening == "{" else index
            if (*where, step) in seen:
                raise UserError("this key stands twice", place=f"{path}:{here()}: {step}", remedy="remove one of them")
            seen.add((*where, step))
            yield (*where, step), here()
            at += 2 if opening == "{" else 0  # the key and its colon
            yield from value((*where, step))
            at += tokens[at][0] == ","
            index += 1
        at += opening in ("{", "[")

    yield from value(())

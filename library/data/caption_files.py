"""The words beside a picture: text files, and JSON files with a caption and tags."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any

from library.data.augment import without_face
from library.data.header import READ_FLAGS
from library.errors import UserError

LARGEST = 1 << 20  # bytes; nobody writes a caption of this length, but folders hold other files with these suffixes
USUAL_SUFFIXES = (".txt", ".caption", ".json", ".cap", ".tags", ".text", ".TXT")  # to name where none is found


class EmptyCaption(UserError):
    """The file is there, the words are not."""


def stems(name: str) -> tuple[str, ...]:
    """What a caption file may be called, before its suffix: the picture's name without its suffix, then also without the four
    numbers at its end that say where a face is (``x_320_210_90_120.png`` has the caption ``x.txt``)."""
    stem = os.path.splitext(name)[0]
    folder, slash, last = stem.rpartition("/")
    plain = without_face(last)
    return (stem,) if plain == last else (stem, folder + slash + plain)


def other_caption(picture: str, suffixes: Sequence[str]) -> tuple[str, str]:
    """(file name, ending) of a caption beside ``picture`` that has a usual ending other than ``suffixes``, or empty texts. Some
    tools put the ending behind the picture's own: ``a.png.txt``."""
    own = os.path.splitext(picture)[1]
    usual = [suffix for suffix in (*USUAL_SUFFIXES, f"{own}.txt", f"{own}.caption") if suffix not in suffixes]
    return next(((os.path.basename(stem) + suffix, suffix) for stem in stems(picture) for suffix in usual
                 if os.path.isfile(stem + suffix)), ("", ""))


def read_caption(path: str, separator: str) -> tuple[str, os.stat_result]:
    """(all lines with text, joined by newlines; the state of the file when it was read). A path that ends in ``.json`` holds
    ``{"caption": ..., "tags": ...}``, joined by ``separator`` as in metadata files.

    Raises EmptyCaption, or UserError for what cannot be read or is not UTF-8 (a byte order mark is accepted).
    """
    try:
        handle = os.open(path, READ_FLAGS)
        try:
            state = os.fstat(handle)
            data = os.read(handle, min(state.st_size, LARGEST))
        finally:
            os.close(handle)
    except OSError as error:
        raise UserError(f"the caption cannot be read: {error.strerror or error}", place=path,
                        remedy="change its permissions") from None
    if state.st_size >= LARGEST:
        raise UserError(f"{state.st_size} bytes are no caption", place=path, remedy="remove or rename the file")
    text = decode(data, path)
    if path[-5:].lower() == ".json":
        text = _of_json(text, path, separator)
    if "\n" in text or "\r" in text:
        text = "\n".join(filter(None, map(str.strip, text.splitlines())))
    text = text.strip()
    if not text:
        raise EmptyCaption("the caption file is empty", place=path,
                           remedy="write a caption into it, or remove it and set class_tokens for the subset")
    return text, state


def joined(caption: Any, tags: Any, separator: str) -> str:
    """Caption, separator and tags as the dialect joins them. Of a caption of several lines each gets the tags, so that a line
    drawn by a wildcard does not lose them. ``tags`` is a text or a list of texts.

    Raises ValueError in words for anything else.
    """
    if isinstance(tags, (list, tuple)) and all(isinstance(tag, str) for tag in tags):
        tags = f"{separator} ".join(tag.strip() for tag in tags)
    for name, value in (("caption", caption), ("tags", tags)):
        if not (value is None or isinstance(value, str)):
            raise ValueError(f"its {name} is not a text: {str(value)[:40]}")
        if value and not is_text(value):
            raise ValueError(f"its {name} holds characters that are none: {value[:40]!r}")
    tags = " ".join((tags or "").split("\n")).strip()
    lines = [line.strip() for line in (caption or "").splitlines() if line.strip()]
    if tags and lines:
        return "\n".join(f"{line}{separator}{tags}" for line in lines)
    return "\n".join(lines) or tags


def is_text(value: str) -> bool:
    """Without NUL and without halves of surrogate pairs, which JSON can spell. (Bytes of a file name that are not UTF-8 pass.)"""
    try:
        value.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return False
    return "\0" not in value


def decode(data: bytes, path: str) -> str:
    """UTF-8, or a UserError that says what it is instead and how to convert it."""
    try:
        if data[:2] not in (b"\xff\xfe", b"\xfe\xff") and b"\0" not in data:
            return data.decode().removeprefix("\ufeff")
        what, coding, place = "UTF-16, not UTF-8", "UTF-16", path
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        what, coding, place = f"not UTF-8 (byte 0x{data[error.start]:02x})", "WINDOWS-1252", f"{path}:{line}"
    raise UserError(f"the caption is {what}", place=place, remedy="save it again as UTF-8, for instance: "
                    f"iconv -f {coding} -t UTF-8 '{os.path.basename(path)}' > new.txt")


def _of_json(text: str, path: str, separator: str) -> str:
    try:
        values = json.loads(text) if text.strip() else {}
    except (ValueError, RecursionError) as error:
        raise UserError(f"not JSON: {error}", place=path, remedy="mend or remove the file") from None
    if not isinstance(values, dict):
        raise UserError("not a JSON object", place=path, remedy='write {"caption": "...", "tags": "..."}')
    try:
        return joined(values.get("caption"), values.get("tags"), separator)
    except ValueError as error:
        raise UserError(str(error), place=path, remedy='write {"caption": "...", "tags": "..."}') from None

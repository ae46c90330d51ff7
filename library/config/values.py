"""What one setting accepts: the record behind a field of ``schema.py``, and the way from text or TOML to its value."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.errors import UserError, nearest


def flag(default: Any, help: str, *, choices: tuple | None = None, off: str = "", nargs: str | None = None,
         minimum: float | None = None, maximum: float | None = None, above: float | None = None, metavar: str | None = None,
         since: str = "0.1", read: Callable[[Any], Any] | None = None, required: bool = False, exists: bool = False,
         saved: bool = True, secret: bool = False, default_text: str = "", title: str = "") -> Any:
    """A dataclass field that is a command-line flag.

    ``off`` is how to switch it off (``"0"`` on an optional number makes 0 the same as not given). Limits: ``minimum`` and
    ``maximum`` are allowed values, ``above`` is not. ``read`` turns text or a TOML value into the field's value, or raises
    ValueError(what it should be, remedy). ``exists``: the path must be there before anything starts. ``saved=False``
    keeps it out of the saved configuration; ``secret`` also out of every repr. ``default_text`` says what None stands for;
    ``title`` is a heading for help and pages, where it is not the section's.
    """
    metadata = dict(help=help, choices=choices, off=off, nargs=nargs, minimum=minimum, maximum=maximum, above=above,
                    metavar=metavar, since=since, read=read, required=required, exists=exists, secret=secret,
                    saved=saved and not secret, default_text=default_text, title=title)
    return dataclasses.field(default=default, metadata=metadata, repr=not secret)


@dataclass(frozen=True)
class Setting:
    """One field of one section. ``kind`` is its plain type; ``optional`` fields may be None."""

    name: str
    section: str  # attribute of Config
    title: str  # heading in --help
    kind: type  # str, int, float, bool, Path or tuple
    optional: bool
    default: Any
    meta: Mapping[str, Any]

    @property
    def zero_is_off(self) -> bool:
        return self.optional and self.meta["off"] == "0"

    def shown(self, value: Any) -> str:
        """For messages: never a secret."""
        if self.meta["secret"]:
            return "this value"
        return repr(value) if isinstance(value, (str, float)) else str(value).lower() if isinstance(value, bool) else show(value)


def settings_of(section: str, cls: type, defaults: Mapping[str, Any] | None = None) -> list[Setting]:
    """The settings of a dataclass made with ``schema.flag``; ``defaults`` overrides some of its own."""
    hints, found = _type_hints(cls), []
    for field in dataclasses.fields(cls):
        kinds = [hints[field.name]]
        if typing.get_origin(kinds[0]) in (types.UnionType, typing.Union):
            kinds = list(typing.get_args(kinds[0]))
        plain = [typing.get_origin(kind) or kind for kind in kinds if kind is not type(None)]
        default = (defaults or {}).get(field.name, field.default)
        title = field.metadata["title"] or cls.title
        found.append(Setting(field.name, section, title, plain[-1], len(plain) < len(kinds), default, field.metadata))
    return found


_type_hints = functools.cache(typing.get_type_hints)  # of a class they never change, and every start asks for them many times


def from_text(setting: Setting, text: str | list[str], place: str) -> Any:
    """The value of a command-line argument (a list of them where the setting takes several). Raises UserError."""
    if setting.kind is tuple:
        value: Any = tuple(text)
    elif setting.meta["read"]:
        value = _read(setting, text, place)
    elif setting.kind is bool:
        value = {"true": True, "false": False}.get(text.lower())
        if value is None:
            raise _wrong(setting, text, "true or false", place, f"write --{setting.name} alone, or --{setting.name}=false")
    elif setting.kind in (int, float):
        value = _number(setting, text, place)
    else:
        value = text
    return _finish(setting, value, place)


def from_toml(setting: Setting, value: Any, place: str) -> Any:
    """The value of a key of ``--config_file``: types are held to strictly, a whole number also passes for a fraction."""
    kind = setting.kind
    if setting.meta["read"]:
        value = _read(setting, value, place)
    elif kind is bool and not isinstance(value, bool):
        plain = str(value).lower() in ("true", "false")
        raise _wrong(setting, value, "true or false", place, f"write {str(value).lower()} without quotes" if plain else "")
    elif kind in (int, float):
        fits = isinstance(value, (int, float) if kind is float else int) and not isinstance(value, bool)
        if not fits:
            raise _wrong(setting, value, _NUMBER[kind], place, _number_remedy(kind, value))
        value = kind(value) if abs(value) < 2**63 else math.inf
    elif kind is tuple:
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise _wrong(setting, value, "a list of texts", place, f'write {setting.name} = ["...", "..."]')
        value = tuple(value)
    elif kind in (str, Path) and not isinstance(value, str):
        scalar = isinstance(value, (int, float)) and not isinstance(value, bool)
        raise _wrong(setting, value, "text", place, f'write "{value}" in quotes' if scalar else "put it in quotes")
    return _finish(setting, value, place)


def read_size(value: Any) -> str:
    """``resolution`` from ``N``, ``"W,H"`` or ``[W, H]``, in the canonical form ``"N"`` or ``"W,H"``."""
    parts = value.split(",") if isinstance(value, str) else value if isinstance(value, list) else [value]
    sides = [int(part) if isinstance(part, str) and part.strip().isdecimal() else part for part in parts]
    if len(sides) not in (1, 2) or not all(type(side) is int and side > 0 for side in sides):
        raise ValueError("a size in pixels", "write N or W,H, for instance 1024 or 1024,768")
    return ",".join(str(side) for side in sides)


def read_warmup(value: Any) -> int | float:
    """Steps (int), or a share of the run (float below 1) from ``0.1`` or ``"10%"``."""
    amount: Any = value
    if isinstance(value, str):
        text = value.strip()
        try:
            amount = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
        except ValueError:
            amount = None
        if amount is not None and text.endswith("%") and amount >= 1:
            amount = None  # 100 % and more would otherwise read as a number of steps
    if isinstance(amount, bool) or not isinstance(amount, (int, float)) or not math.isfinite(amount) or amount < 0 \
            or (amount >= 1 and amount != int(amount)):
        raise ValueError("a number of steps or a share of the run", "write for instance 100, 0.05 or 5%")
    return int(amount) if amount == int(amount) else float(amount)


def read_range(value: Any) -> str:
    """``"LO,HI"`` or ``[LO, HI]`` with 0 < LO <= HI, in the canonical form ``"LO,HI"``."""
    parts = value.split(",") if isinstance(value, str) else value if isinstance(value, list) else [value]
    try:
        low, high = (float(part) for part in parts if not isinstance(part, bool))
    except (TypeError, ValueError):
        low = high = math.nan
    if not 0 < low <= high < math.inf:
        raise ValueError("two numbers above 0, the smaller one first", "write LO,HI, for instance 2.0,4.0")
    return f"{show(low)},{show(high)}"


_UNITS = {"MB": 10**6, "GB": 10**9, "TB": 10**12, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


def read_bytes(value: Any) -> str:
    """An amount of memory with its unit, as ``12GB`` (10^9 bytes) or ``11.5GiB`` (2^30), in a canonical form."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([a-zA-Z]+)\s*", value) if isinstance(value, str) else None
    unit = match and {name.lower(): name for name in _UNITS}.get(match[2].lower())
    if not unit or float(match[1]) == 0:
        raise ValueError("an amount of memory", "write a number and a unit, for instance 12GB or 11.5GiB")
    return f"{show(float(match[1]))}{unit}"


def to_bytes(text: str) -> int:
    """Of the canonical form."""
    unit = text.lstrip("0123456789.")
    return int(float(text.removesuffix(unit)) * _UNITS[unit])


def read_suffixes(value: Any) -> str:
    """``".txt"``, ``".txt,.caption"`` or a list of texts, in the canonical form with commas."""
    parts = value.split(",") if isinstance(value, str) else value if isinstance(value, list) else [value]
    suffixes = [part.strip() if isinstance(part, str) else "" for part in parts]
    for suffix in suffixes:
        if "." not in suffix[:-1] or set(suffix) & set('/\\:*?"<>|'):
            remedy = f"write .{suffix}" if suffix.isalnum() else "write for instance .txt or .txt,.caption"
            raise ValueError("an ending of file names", remedy)
    if len(set(suffixes)) < len(suffixes):
        raise ValueError("a list of different endings", "name each of them once")
    return ",".join(suffixes)


def read_class_name(value: Any) -> str:
    """``package.module.Class``."""
    if not isinstance(value, str) or value.count(".") < 1 or not all(part.isidentifier() for part in value.split(".")):
        raise ValueError("the full name of a class", "write package.module.Class")
    return value


def show(value: Any) -> str:
    """A value in words, for help, pages and messages."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, float):
        return f"{value:.12g}".replace("e-0", "e-").replace("e+0", "e")
    if isinstance(value, (tuple, list)):
        return " ".join(str(item) for item in value) or "none"
    return str(value) if value != "" else "empty"


def toml_text(value: Any) -> str:
    """A value as TOML writes it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(toml_text(item) for item in value)}]"
    # JSON's escapes are TOML's, except for the one character that JSON leaves alone and TOML forbids
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")


_NUMBER = {int: "a whole number", float: "a number"}


def _number(setting: Setting, text: str, place: str) -> int | float:
    try:
        return setting.kind(text)
    except ValueError:
        raise _wrong(setting, text, _NUMBER[setting.kind], place, _number_remedy(setting.kind, text)) from None


def _number_remedy(kind: type, value: Any) -> str:
    """How to write what was probably meant."""
    try:
        number = float(str(value).replace(",", "."))
    except ValueError:
        return ""
    if isinstance(value, bool) or not math.isfinite(number):
        return ""
    if kind is float or number != int(number):
        return f"write {show(number)}" if kind is float else "leave out the fraction"
    return f"write {int(number)}"


def _read(setting: Setting, value: Any, place: str) -> Any:
    try:
        return setting.meta["read"](value)
    except ValueError as error:
        raise _wrong(setting, value, *error.args[:1], place, *error.args[1:]) from None


def _wrong(setting: Setting, value: Any, expected: str, place: str, remedy: str = "") -> UserError:
    return UserError(f"{setting.shown(value)} is not {expected}", place=place, remedy=remedy or f"give {expected}")


def _finish(setting: Setting, value: Any, place: str) -> Any:
    """Limits, choices and things that no file system or saved configuration could hold."""
    meta, kind = setting.meta, setting.kind
    if kind in (int, float):
        value = _within_limits(setting, value, place)
    if meta["choices"] and value not in meta["choices"]:
        remedy = nearest(value, meta["choices"]) or "choose one of those"
        raise _wrong(setting, value, f"one of {', '.join(meta['choices'])}", place, remedy)
    for text in (value if isinstance(value, tuple) else (value,)):
        if isinstance(text, str) and ("\0" in text or any("\ud800" <= letter <= "\udfff" for letter in text)):
            raise UserError("holds a character that is not text (NUL, or bytes that are not UTF-8)", place=place,
                            remedy="rename the file or write the value again")
    if kind is Path:
        value = Path(value).expanduser() if value.startswith("~/") else Path(value)
    return value


def _within_limits(setting: Setting, value: int | float, place: str) -> int | float | None:
    meta = setting.meta
    if not (abs(value) < 2**63):  # also catches nan and infinity
        raise UserError(f"{show(value)} is out of all proportion", place=place, remedy="check its exponent")
    low, high, above = meta["minimum"], meta["maximum"], meta["above"]
    if low is not None and value < low:
        raise UserError(f"{show(value)} is less than {show(low)}", place=place, remedy=f"give {show(low)} or more")
    if above is not None and value <= above:
        raise UserError(f"{show(value)} is not above {show(above)}", place=place, remedy=f"give a number above {show(above)}")
    if high is not None and value > high:
        raise UserError(f"{show(value)} is more than {show(high)}", place=place, remedy=f"give {show(high)} or less")
    return None if value == 0 and setting.zero_is_off else value

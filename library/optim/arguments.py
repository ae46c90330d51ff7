"""``key=value`` texts of the command line against the signature of what they are for: optimizers and schedules."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from library.errors import UserError, nearest


def read(args: Sequence[str], factory: Callable, *, owner: str, place: str, reserved: Mapping[str, str],
         hidden: Sequence[str] = (), refused: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The arguments that ``factory`` (called ``owner`` in messages) is given, values as Python literals.

    ``reserved``: argument -> what to use instead of it; ``hidden`` ones are filled in by the caller and do not exist for the
    user; ``refused``: argument -> why it cannot be used (its off values, False, 0 and None, pass). Raises UserError, at
    ``place``, for all that, for an unknown name, and for a value of another type than the signature's default shows.
    """
    try:
        known, open_ended = parameters(factory)
    except (TypeError, ValueError):
        raise UserError(f"{owner} cannot be called with arguments by name", place=place, remedy="name another class") from None
    offered = [name for name in known if name not in hidden and name not in reserved]
    arguments: dict[str, Any] = {}
    for arg in args:
        key, equals, text = arg.partition("=")
        key = key.strip()
        if not equals or not key:
            raise UserError(f"{arg!r} is not of the form key=value", place=place, remedy="write for example weight_decay=0.01")
        if key in reserved:
            raise UserError(f"{arg!r}: {key} is not given here", place=place, remedy=reserved[key])
        if key not in offered and (not open_ended or key in hidden):
            raise UserError(f"{owner} has no argument {key!r}", place=place,
                            remedy=nearest(key, offered) or f"it has {', '.join(offered)}")
        if key in arguments:
            raise UserError(f"{key} is given twice", place=place, remedy="keep one of them")
        value = _literal(arg, key, text, known.get(key), place)
        if refused and key in refused and value:
            raise UserError(f"{arg!r} cannot be used: {refused[key]}", place=place, remedy=f"leave {key} out")
        arguments[key] = value
    return arguments


def parameters(factory: Callable) -> tuple[dict[str, inspect.Parameter], bool]:
    """The named parameters of ``factory``, and whether it takes any others as well."""
    found = inspect.signature(factory).parameters
    named = {name: one for name, one in found.items() if one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)}
    return named, any(one.kind == one.VAR_KEYWORD for one in found.values())


def _literal(arg: str, key: str, text: str, parameter: inspect.Parameter | None, place: str) -> Any:
    default = None if parameter is None or parameter.default is parameter.empty else parameter.default
    try:
        value = ast.literal_eval(text.strip())
    except (ValueError, SyntaxError):
        if isinstance(default, str) or (parameter is not None and parameter.annotation in (str, "str")):
            return text.strip()
        raise UserError(f"{text!r} is not a Python value (in {arg!r})", place=place,
                        remedy="write numbers, True, False, None, or tuples as in betas=0.9,0.99; put text in quotes, "
                               f"as in {key}='...'") from None
    wanted = _wanted(default, parameter, value)
    if wanted:
        raise UserError(f"{arg!r}: {key} is {wanted}", place=place, remedy=f"write for example {key}={_example(default)}")
    return tuple(value) if isinstance(default, tuple) and isinstance(value, list) else value


def _wanted(default: Any, parameter: inspect.Parameter | None, value: Any) -> str:
    """What the value should have been; empty when it may be that. None passes: it often means a default or off."""
    if value is None or default is None:
        return ""
    if isinstance(default, bool):
        return "" if isinstance(value, bool) else "True or False"
    if isinstance(default, (int, float)):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return "a number"
        whole = parameter is not None and parameter.annotation in (int, "int")
        return "a whole number" if whole and not isinstance(value, int) else ""
    if isinstance(default, (tuple, list)):
        fits = isinstance(value, (tuple, list)) and len(value) == len(default)
        return "" if fits and all(isinstance(one, (int, float)) for one in value) else f"{len(default)} numbers"
    if isinstance(default, str):
        return "" if isinstance(value, str) else "a text"
    return ""


def _example(default: Any) -> str:
    return ",".join(str(one) for one in default) if isinstance(default, (tuple, list)) else str(default)

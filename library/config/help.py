"""The text of ``--help``: settings grouped by concern, each with its default and its off value."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path

from library.config.values import Setting, show

_COLUMN = 34
_RULES = ("A value on the command line wins over the file, the file over the default. --flag=false turns off a switch that the "
          "file turned on; an empty value (--flag=) brings back the default.")
_MORE = "Flags known from other trainers that are accepted without effect, or are not built yet, stand in docs/options.md."


def help_text(program: str, settings: Iterable[Setting]) -> str:
    """Everything ``--help`` prints, as wide as the terminal (at most 120 columns)."""
    width = max(70, min(120, shutil.get_terminal_size((100, 24)).columns))
    lines = [f"usage: accelerate launch {program} --pretrained_model_name_or_path PATH "
             "--dataset_config FILE --output_dir DIR ...",
             f"       accelerate launch {program} --config_file FILE ...", "", *textwrap.wrap(_RULES, width)]
    for title, group in groupby(settings, key=lambda setting: setting.title):
        lines += ["", f"{title}:"]
        for setting in group:
            lines += _entry(setting, width)
    return "\n".join([*lines, "", *textwrap.wrap(_MORE, width)])


def _entry(setting: Setting, width: int) -> Iterator[str]:
    left = f"  --{setting.name} {metavar(setting)}".rstrip()
    text = textwrap.wrap(f"{description(setting)} ({facts(setting)})", width - _COLUMN)
    if len(left) > _COLUMN - 2:
        yield left
        left = ""
    for line in text:
        yield f"{left:<{_COLUMN}}{line}"
        left = ""


def metavar(setting: Setting) -> str:
    """What stands for the value: empty for switches."""
    named = setting.meta["metavar"] or ("NAME" if setting.meta["choices"] else
                                        {int: "N", float: "X", str: "TEXT", Path: "PATH", bool: ""}.get(setting.kind, "TEXT"))
    return f"{named} ..." if setting.kind is tuple else named


def description(setting: Setting) -> str:
    """The help sentence, with the choices where there are some."""
    choices = setting.meta["choices"]
    return f"{setting.meta['help']}; one of {', '.join(choices)}" if choices else setting.meta["help"]


def default(setting: Setting) -> str:
    """The default in words."""
    if setting.meta["required"]:
        return "required"
    return setting.meta["default_text"] or show(setting.default)


def facts(setting: Setting) -> str:
    """Default and off value, for brackets."""
    words = default(setting) if setting.meta["required"] else f"default: {default(setting)}"
    off = setting.meta["off"]
    return words if not off or off == show(setting.default) else f"{words}; off: {off}"

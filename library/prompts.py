"""Preview prompts: the text, TOML and JSON files that ``--sample_prompts`` names, read strictly.

The options of a prompt line and the keys of TOML and JSON are those of the dialect (peer census, section 8). Light
imports only, so that a mistake in the file is told before any heavy library is loaded.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from library.errors import UserError, nearest, raise_all
from library.toml_lines import load_toml


@dataclass(frozen=True)
class Prompt:
    """One preview picture to render: ``width`` and ``height`` in pixels, ``steps`` of the sampler.

    ``cfg`` is the scale of true classifier-free guidance (1 = off: the negative prompt is not used), ``guidance`` the
    number that guidance-distilled models take as an input; ``sampler`` is empty where the model has only one. ``place`` says
    where the prompt stands, for messages.
    """

    text: str
    negative: str = ""
    width: int = 512
    height: int = 512
    seed: int | None = None
    steps: int = 20
    cfg: float = 1.0
    guidance: float = 1.0
    sampler: str = ""
    place: str = ""


class ParsedPrompts(NamedTuple):
    """The prompts in file order, and what the user should be told once (rounded sizes, options without effect)."""

    prompts: tuple[Prompt, ...]
    notes: tuple[str, ...]


FIRST_SEED = 1000
MAX_SIDE = 8192
MAX_STEPS = 1000
MAX_SEED = 2**63 - 1


@dataclass(frozen=True)
class _Option:
    """One option: ``short`` stands in a prompt line (``--w 512``), ``key`` in TOML and JSON; ``field`` of ``Prompt``.

    Without a field it changes nothing (``reason`` says why), or is refused when ``refused``. One with both changes nothing
    where the architecture offers no choice.
    """

    short: str
    key: str
    field: str = ""
    kind: type = str
    least: float = 0
    most: float = math.inf
    reason: str = ""
    refused: bool = False


_OPTIONS = (
    _Option("n", "negative_prompt", "negative"),
    _Option("w", "width", "width", int, 1, MAX_SIDE),
    _Option("h", "height", "height", int, 1, MAX_SIDE),
    _Option("d", "seed", "seed", int, 0, MAX_SEED),
    _Option("s", "sample_steps", "steps", int, 1, MAX_STEPS),
    _Option("l", "scale", "cfg", float),
    _Option("g", "guidance_scale", "guidance", float),
    _Option("ss", "sample_sampler", "sampler", reason="previews always use the sampler of the architecture"),
    _Option("ctr", "cfg_trunc_ratio", reason="guidance is never cut off early here"),
    _Option("rcfg", "renorm_cfg", reason="guidance is not renormalised here"),
    _Option("fs", "flow_shift", reason="the sampler takes its shift from the architecture"),
    _Option("cn", "controlnet_image", refused=True, reason="ControlNet previews are not built"),
)


class _Given(NamedTuple):
    """An option as the user wrote it: under which name, with which value, on which line."""

    option: _Option
    name: str
    value: object
    line: int | None


_BY_SHORT = {option.short: option for option in _OPTIONS}
_BY_KEY = {option.key: option for option in _OPTIONS}
_LINE_OPTIONS = "known are " + ", ".join(f"--{option.short} ({option.key})" for option in _OPTIONS if option.field)
_KEYS = ("prompt", *(option.key for option in _OPTIONS if option.field))

# An option starts with two dashes after white space (or at the start of the line) and a letter right behind them, so
# that dashes used as punctuation ("a cat -- asleep") stay in the prompt.
_OPTION_START = re.compile(r"(?:^|(?<=\s))--(?=[A-Za-z])")


def parse_prompts(path: Path, pixel_step: int, defaults: Prompt = Prompt(""), samplers: Sequence[str] = ()) -> ParsedPrompts:
    """Read ``path`` (.txt, .toml or .json); what a prompt leaves out comes from ``defaults`` (the architecture's), and its
    sampler is one of ``samplers``, where there is a choice.

    Sides that are no multiple of ``pixel_step`` (pixels) are rounded to the nearest one and noted. Raises UserError,
    all mistakes together, each with file and line.
    """
    path = Path(path)
    readers = {".txt": _read_text, ".toml": _read_toml, ".json": _read_json}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise UserError(f"prompt files end in .txt, .toml or .json, not {path.suffix or 'without an ending'!r}", place=str(path),
                        remedy="one prompt per line in a .txt file is the simplest form")
    if not path.is_file():
        state = "is a folder" if path.is_dir() else "does not exist"
        raise UserError(f"the prompt file {path} {state}", remedy="correct --sample_prompts")
    builder = _Builder(path, pixel_step, defaults, samplers)
    reader(path, builder)
    raise_all(builder.errors)
    if not builder.prompts:
        raise UserError("there is no prompt in this file", place=str(path),
                        remedy="write at least one, or leave out --sample_prompts")
    return ParsedPrompts(tuple(builder.prompts), tuple(builder.notes))


def with_seeds(prompts: Sequence[Prompt]) -> tuple[Prompt, ...]:
    """The same prompts, each with a seed: 1000 + its position where none was given.

    A fixed seed means a fixed starting noise, so pictures of different training steps can be compared.
    """
    return tuple(prompt if prompt.seed is not None else replace(prompt, seed=FIRST_SEED + index)
                 for index, prompt in enumerate(prompts))


def batches(prompts: Sequence[Prompt], most: int) -> list[list[int]]:
    """Positions of prompts that can be drawn together, up to ``most`` in each batch, in the order of the first of each.

    They differ in nothing but their texts and seeds: equal size, steps, sampler, guidance, and so both passes of
    classifier-free guidance or one.
    """
    alike: dict[Prompt, list[int]] = {}
    for index, prompt in enumerate(prompts):
        alike.setdefault(replace(prompt, text="", negative="", seed=None, place=""), []).append(index)
    found = [group[start:start + most] for group in alike.values() for start in range(0, len(group), most)]
    return sorted(found)


class _Builder:
    """Turns options and their values into prompts; gathers mistakes and notes on the way."""

    def __init__(self, path: Path, pixel_step: int, defaults: Prompt, samplers: Sequence[str]):
        self.path, self.pixel_step, self.defaults, self.samplers = path, pixel_step, defaults, samplers
        self.prompts: list[Prompt] = []
        self.errors: list[UserError] = []
        self.notes: list[str] = []
        self._inert: set[str] = set()

    def place(self, line: int | None) -> str:
        return f"{self.path}:{line}" if line else str(self.path)

    def fail(self, line: int | None, message: str, remedy: str = "") -> None:
        self.errors.append(UserError(message, place=self.place(line), remedy=remedy))

    def add(self, line: int | None, text: str | None, given: Iterable[_Given]) -> None:
        """One prompt that starts on ``line``; a mistake among ``given``, or no text, leaves it out (and is reported)."""
        fields: dict[str, object] = {}
        errors_before = len(self.errors)
        for option, name, value, value_line in given:
            if option.refused:
                self.fail(value_line, f"{name}: {option.reason}", f"remove {name}")
            elif not option.field or (option.field == "sampler" and not self.samplers):
                self._note_inert(value_line, option, name)
            elif option.field == "sampler" and value not in self.samplers:
                guess = nearest(str(value), self.samplers)
                self.fail(value_line, f"{name}: there is no sampler {value!r}",
                          f"{guess} known are {', '.join(self.samplers)}".strip())
            else:
                try:
                    fields[option.field] = _convert(option, name, value)
                except ValueError as error:
                    self.fail(value_line, str(error))
        if text is None or len(self.errors) > errors_before:
            return
        prompt = replace(self.defaults, text=text.strip(), place=self.place(line), **fields)
        if prompt.cfg < 1:
            self.notes.append(f"{prompt.place}: a CFG scale of {prompt.cfg:g} means no guidance, like 1")
        if fields.get("negative") and prompt.cfg <= 1:
            self.notes.append(f"{prompt.place}: the negative prompt has no effect while the CFG scale is not above 1 "
                              "(--l, or scale in TOML and JSON)")
        self.prompts.append(replace(prompt, width=self._round(prompt, "width"), height=self._round(prompt, "height")))

    def _round(self, prompt: Prompt, side: str) -> int:
        value, step = getattr(prompt, side), self.pixel_step
        rounded = max(step, (value + step // 2) // step * step)
        if rounded != value:
            self.notes.append(f"{prompt.place}: {side} {value} is no multiple of {step}, {rounded} is used")
        return rounded

    def _note_inert(self, line: int | None, option: _Option, name: str) -> None:
        if option.short not in self._inert:  # once per file is enough
            self._inert.add(option.short)
            self.notes.append(f"{self.place(line)}: {name} has no effect: {option.reason}")


def _convert(option: _Option, name: str, value: object) -> object:
    """``value`` as the option's type; ValueError says what was expected."""
    if option.kind is str:
        if not isinstance(value, str):
            raise ValueError(f"{name} must be text, not {value!r}")
        return value
    noun = "a whole number" if option.kind is int else "a number"
    limits = f"{option.least} or more" if option.most == math.inf else f"from {option.least} to {option.most}"
    accepted = (int,) if option.kind is int else (int, float)
    if isinstance(value, bool) or not isinstance(value, accepted) or not option.least <= value <= option.most \
            or not math.isfinite(value):
        shown = value.written if isinstance(value, _Written) else repr(value)
        raise ValueError(f"{name} must be {noun}, {limits}, not {shown}")
    return option.kind(value)


class _Written(NamedTuple):
    """What stands in a prompt line where a number was expected, and is none."""

    written: str


def _number(option: _Option, written: str) -> object:
    """The value of an option in a prompt line, where everything is text; ``_Written`` when it is not the number it should be."""
    if option.kind is str or not option.field:
        return written
    try:
        return int(written) if re.fullmatch(r"[+-]?[0-9]+", written) else float(written.replace("_", " "))
    except ValueError:
        return _Written(repr(written))


def _read_text(path: Path, builder: _Builder) -> None:
    for number, line in enumerate(re.split(r"\r\n|\r|\n", _decode(path)), start=1):
        if line.strip() and not line.lstrip().startswith("#"):
            _add_line(line, number, builder)


def _add_line(line: str, number: int | None, builder: _Builder) -> None:
    """``text --w 512 --n blurry``: the text is what stands before the first option, whatever it looks like."""
    text, *fragments = _OPTION_START.split(line)
    given: dict[str, _Given] = {}
    if not text.strip():
        builder.fail(number, "there is no prompt before the first option", "write the prompt first, then its options")
    for fragment in fragments:
        word, written = re.fullmatch(r"(\S+)\s*(.*?)\s*", fragment, re.DOTALL).groups()
        name, option = f"--{word}", _BY_SHORT.get(word.lower())
        if option is None:
            builder.fail(number, f"unknown option {name}", _LINE_OPTIONS)
        elif option.short in given:
            builder.fail(number, f"{name} is given twice", "keep one of them")
        elif not written:
            builder.fail(number, f"{name} has no value", f"write it behind the option, or remove {name}")
        else:
            given[option.short] = _Given(option, name, _number(option, written), number)
    builder.add(number, text if text.strip() else None, given.values())


def _read_toml(path: Path, builder: _Builder) -> None:
    values, where = load_toml(path)
    shape = "defaults stand under [prompt], each prompt under its own [[prompt.subset]]"
    for name in values:
        if name != "prompt":
            builder.fail(where.line(name), f"unknown key {name!r}", shape)
    shared = values.get("prompt", {})
    subsets = shared.get("subset", [{}]) if isinstance(shared, dict) else None  # [prompt] alone is one prompt
    if not isinstance(subsets, list) or not all(isinstance(subset, dict) for subset in subsets):
        builder.fail(where.line("prompt", "subset"), "prompt and prompt.subset must be tables", shape)
        return
    if not shared:
        builder.fail(None, "there is no [prompt] table", shape)
        return
    shared = {key: value for key, value in shared.items() if key != "subset"}
    for index, subset in enumerate(subsets):
        lines = {key: where.line("prompt", key) for key in shared} | {
            key: where.line("prompt", "subset", index, key) for key in subset}
        _add_table(shared | subset, lines, where.line("prompt", "subset", index), builder)
    builder.errors = list({str(error): error for error in builder.errors}.values())  # a mistake in [prompt] is told once


def _read_json(path: Path, builder: _Builder) -> None:
    text = _decode(path)
    try:
        entries = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"not valid JSON: {error.msg}", place=f"{path}:{error.lineno}",
                        remedy='expected [{"prompt": "a cat", "width": 512}, ...] or ["a cat --w 512", ...]') from None
    if not isinstance(entries, list):
        raise UserError(f"the outermost value must be a list of prompts, not {type(entries).__name__}", place=f"{path}:1",
                        remedy="put square brackets around it")
    for entry, line in zip(entries, _element_lines(text), strict=True):
        if isinstance(entry, str) and entry.strip():
            _add_line(" ".join(entry.splitlines()), line, builder)
        elif isinstance(entry, dict):
            _add_table(entry, dict.fromkeys(entry, line), line, builder)
        else:
            builder.fail(line, f"a prompt must be text or an object, not {entry!r}")


def _element_lines(text: str) -> list[int]:
    """The line on which each element of the outermost JSON list starts (``text`` is known to be valid)."""
    decoder, gap, lines, position = json.JSONDecoder(), re.compile(r"[\s,]*"), [], text.index("[") + 1
    while True:
        position = gap.match(text, position).end()
        if text[position] == "]":
            return lines
        lines.append(text.count("\n", 0, position) + 1)
        position = decoder.raw_decode(text, position)[1]


def _add_table(table: Mapping[str, object], lines: Mapping[str, int | None], line: int | None, builder: _Builder) -> None:
    """One prompt from long key names; ``lines`` has the line of each key, ``line`` is that of the whole entry."""
    text, given = table.get("prompt"), []
    if not isinstance(text, str):
        message = "this entry has no prompt" if text is None else f"prompt must be text, not {text!r}"
        builder.fail(lines.get("prompt", line), message, 'write prompt = "..." (TOML) or "prompt": "..." (JSON)')
    for key, value in table.items():
        if key in _BY_KEY:
            given.append(_Given(_BY_KEY[key], key, value, lines[key]))
        elif key != "prompt":
            builder.fail(lines[key], f"unknown key {key!r}", f"{nearest(key, _KEYS)} known are {', '.join(_KEYS)}")
            text = None
    builder.add(line, text if isinstance(text, str) else None, given)


def _decode(path: Path) -> str:
    """The whole file as UTF-8 text (a byte order mark is dropped); UserError with the line of the first bad byte."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read this file: {error.strerror}", place=str(path)) from None
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        is_utf16 = data[:2] in (b"\xff\xfe", b"\xfe\xff")
        line = 1 if is_utf16 else data.count(b"\n", 0, error.start) + 1
        raise UserError(f"this file is not UTF-8 text{' but UTF-16' if is_utf16 else ''}", place=f"{path}:{line}",
                        remedy="save it as UTF-8 in your editor") from None

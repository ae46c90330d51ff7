"""Looking values up: subset, dataset, [general], command line. And the first check: sections, names, types."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Protocol

from library.config.data_options import DatasetOptions
from library.config.dialect import DIALECT
from library.data.spec_keys import ELSEWHERE, GENERAL, KEYS, LEFTOVERS, SECTIONS, SUBSET, problem
from library.errors import UserError, nearest

Steps = tuple[str | int, ...]  # ("datasets", 0, "subsets", 1)


class Places(Protocol):
    """Where the user wrote things. ``folder`` is a second folder that relative paths are looked up in."""

    folder: Path | None

    def key(self, *path: str | int) -> str:
        """The ``place`` of a UserError about a key."""

    def table(self, *path: str | int) -> str:
        """The ``place`` of a whole table; of the file for an empty path."""


@dataclass(frozen=True)
class Found:
    """``value`` is None when nobody gives the key, or when what is given is wrong (that has been reported). ``section``:
    ``subsets``, ``datasets``, ``general``, ``flag``, or empty."""

    value: Any
    place: str
    section: str

    @property
    def given(self) -> bool:
        return self.section != ""

    def or_else(self, default: Any) -> Any:
        return default if self.value is None else self.value


class Lookup:
    """One pass over the values that gathers mistakes instead of stopping at the first.

    ``options``: the command line's values; ``flag_place``: where a flag was given.
    """

    def __init__(self, values: dict, places: Places, options: DatasetOptions, flag_place: Callable[[str], str]):
        self.values, self.places, self.options, self.flag_place = values, places, options, flag_place
        self.errors: list[UserError] = []
        self.notes: list[str] = []
        self._defaults = {field.name: field.default for field in fields(options)}
        self._effects: dict[tuple[str, str], bool] = {}

    def error(self, message: str, place: str, remedy: str = "") -> None:
        self.errors.append(UserError(message, place=place, remedy=remedy))

    def note(self, place: str, message: str) -> None:
        self.notes.append(f"{place}: {message}")

    def acts(self, found: Found, acts: bool, why_not: str) -> None:
        """A given value has an effect here, or has none. One that has none anywhere is named by ``finish``."""
        if found.given and found.value not in (None, False, "", 0):
            key = (found.place, why_not)
            self._effects[key] = acts or self._effects.get(key, False)

    def finish(self) -> None:
        """Notes about what had no effect anywhere."""
        for (place, why_not), acts in self._effects.items():
            if not acts:
                self.note(place, f"has no effect: {why_not}")

    def flag(self, name: str) -> Any:
        """The value of a flag; None when it stands at its default."""
        value = getattr(self.options, name)
        return None if value == "" or value == self._defaults[name] else value

    def get(self, name: str, path: Steps = ()) -> Found:
        """A key for the table at ``path``; for the whole file without one."""
        for table_path in dict.fromkeys((path, path[:2], (GENERAL,))):
            section = next((step for step in reversed(table_path) if isinstance(step, str)), "")
            if section in KEYS[name].sections and name in (table := self._table(table_path)):
                place = self.places.key(*table_path, name)
                wrong = problem(KEYS[name], table[name])
                value = None if wrong else KEYS[name].read(table[name])
                self._note_overruled(KEYS[name].option, value, place)
                return Found(value, place, section)
        option = KEYS[name].option
        value = self.flag(option) if option else None
        if value is None:
            return Found(None, self.places.table(*path), "")
        place = self.flag_place(option)
        value = str(value) if isinstance(value, Path) else value
        wrong = problem(KEYS[name], value)
        if wrong:
            self.error(wrong[0], place, wrong[1])
        return Found(None if wrong else KEYS[name].read(value), place, "flag")

    def _table(self, path: Steps) -> dict:
        table: Any = self.values
        for step in path:
            table = table.get(step, {}) if isinstance(table, dict) else table[step]
        return table

    def _note_overruled(self, option: str | None, value: Any, place: str) -> None:
        """The file wins over the command line, as in the dialect; whoever gave a flag should hear that it did nothing."""
        given = self.flag(option) if option else None
        if given is None or value is None or self.places.folder is None:  # the last: a value made from another flag
            return
        key = next(key for key in KEYS.values() if key.option == option)
        given = str(given) if isinstance(given, Path) else given
        if problem(key, given) or key.read(given) != value:
            self.note(place, f"overrules --{option}, which has no effect here")

    def check_structure(self) -> bool:
        """Checks names, sections and types; True when the tables are in place and values can be looked up."""
        before, lacking = len(self.errors), "datasets" not in self.values
        for name, value in self.values.items():
            if name == GENERAL:
                if not isinstance(value, dict):
                    self.error("this should be a table", self.places.key(name), "write [general]")
            elif name == "datasets":
                self._check_tables(value, ("datasets",))
            else:
                remedy = nearest(name, (GENERAL, "datasets"))
                lacking = lacking and "datasets" not in remedy
                if nearest(name, (SUBSET,)):
                    remedy = "write [[datasets.subsets]], below [[datasets]]"
                if name in KEYS or name in LEFTOVERS or name in ELSEWHERE:
                    home = GENERAL if name not in KEYS else KEYS[name].sections[0]
                    remedy = f"move it below a line {SECTIONS[home]}"
                self.error("unknown key at the top of the file", self.places.key(name, 0),
                           remedy or "known here: general, datasets")
        if lacking:
            self.error("there is no [[datasets]]", self.places.table(),
                       "add [[datasets]] with resolution, and below it [[datasets.subsets]] with image_dir")
        sound = len(self.errors) == before
        for section, path, table in self._tables():  # of a file that is out of shape the keys are checked all the same
            for name, value in table.items():
                self._check_key(section, name, value, self.places.key(*path, name))
        return sound

    def _check_tables(self, value: Any, path: Steps) -> None:
        name = ".".join(step for step in path if isinstance(step, str))
        if not isinstance(value, list) or not value or not all(isinstance(table, dict) for table in value):
            self.error("this should be one or more tables", self.places.key(*path), f"write [[{name}]] with double brackets")
            return
        for index, table in enumerate(value):
            if name != "datasets":
                continue
            if SUBSET in table:
                self._check_tables(table[SUBSET], (*path, index, SUBSET))
            elif misspelt := next((key for key, inner in table.items() if key not in LEFTOVERS and _holds_tables(inner)), None):
                self.error(f"unknown table [[datasets.{misspelt}]]", self.places.key(*path, index, misspelt, 0),
                           "write [[datasets.subsets]]")
            else:
                self.error("this dataset has no [[datasets.subsets]]", self.places.table(*path, index),
                           "add [[datasets.subsets]] with image_dir below it")

    def _tables(self) -> Iterator[tuple[str, Steps, dict]]:
        """All tables that stand where they should, with the names of their sections; what is misspelt counts as subsets."""
        if isinstance(self.values.get(GENERAL), dict):
            yield GENERAL, (GENERAL,), self.values[GENERAL]
        for path, table in _listed(self.values, "datasets"):
            inner = [key for key, value in table.items() if key == SUBSET or SUBSET not in table and key not in LEFTOVERS
                     and _holds_tables(value)]
            yield "datasets", path, {key: value for key, value in table.items() if key not in inner}
            for key in inner:
                for place, subset in _listed(table, key):
                    yield SUBSET, (*path, *place), subset

    def _check_key(self, section: str, name: str, value: Any, place: str) -> None:
        if name in ELSEWHERE:
            neutral, remedy = ELSEWHERE[name]
            if value not in neutral or type(value) is not type(neutral[0]):
                self.error("this is a setting of the run, not of the data", place, remedy)
        elif name in LEFTOVERS and section in LEFTOVERS[name][0]:
            self.note(place, f"accepted without effect: {LEFTOVERS[name][1]}")
        elif name not in KEYS and name not in LEFTOVERS:
            self.error("unknown key", place, self._advice(section, name))
        elif section not in (homes := KEYS[name].sections if name in KEYS else LEFTOVERS[name][0]):
            self.error("this key does not belong here", place, f"move it to {' or '.join(SECTIONS[home] for home in homes)}")
        elif wrong := problem(KEYS[name], value):
            self.error(wrong[0], place, wrong[1])

    def _advice(self, section: str, name: str) -> str:
        """For a key that is not known: its name in this file, or where it belongs."""
        for key in KEYS.values():
            if key.option == name or (name, key.name) == ("caption_extention", "caption_extension"):
                return f"write {key.name}"
        if name in DIALECT or hasattr(self.options, name) or name.startswith(("cache_latents", "cache_text_encoder")):
            return "this is a flag: give it on the command line"
        here = [key.name for key in KEYS.values() if section in key.sections]
        return nearest(name, here) or nearest(name, KEYS) or f"known here: {', '.join(here)}"


def _holds_tables(value: Any) -> bool:
    return isinstance(value, dict) or isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def _listed(table: dict, name: str) -> Iterator[tuple[Steps, dict]]:
    """The tables in the list of that name, as far as it is one."""
    values = table.get(name)
    for index, value in enumerate(values if isinstance(values, list) else ()):
        if isinstance(value, dict):
            yield (name, index), value

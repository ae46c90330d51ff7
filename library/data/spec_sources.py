"""Where the datasets are described: a file, folders named by repeats and class, a metadata file, or a Python class.

The last three come from the command line; they are turned into the same tables that a dataset file holds, so that there
is one reader, with the same inheritance and the same checks.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from library.data.header import SUFFIXES
from library.data.spec_file import load_file
from library.data.spec_keys import MAX_REPEATS
from library.data.spec_lookup import Found, Lookup
from library.errors import UserError, nearest
from library.toml_lines import Locator

# "10_a cat": the number of repeats, and the caption of pictures without a caption file
_CLASS_FOLDER = re.compile(r"(?P<repeats>[0-9]+)_(?P<words>.*)", re.DOTALL)
_SHOWN = 8  # names spelled out in a note


@dataclass(frozen=True)
class FilePlaces:
    """``file:line: key``; relative paths of a file may also start beside it."""

    where: Locator

    @property
    def folder(self) -> Path:
        return self.where.path.parent

    def key(self, *path: str | int) -> str:
        return self.where.place(*path)

    def table(self, *path: str | int) -> str:
        line = self.where.line(*path)
        return f"{self.where.path}:{line}" if line else str(self.where.path)


@dataclass(frozen=True)
class FlagPlaces:
    """Tables that were made from flags. ``tables``: what to call the subsets; anything else is called ``name``."""

    name: str
    tables: dict[tuple[str | int, ...], str] = field(default_factory=dict)
    folder: Path | None = None

    def key(self, *path: str | int) -> str:
        return self.table(*path)

    def table(self, *path: str | int) -> str:
        return next((self.tables[path[:end]] for end in range(len(path), 0, -1) if path[:end] in self.tables), self.name)


@dataclass(frozen=True)
class Source:
    """Tables as they would stand in a dataset file. ``python``: the class of ``--dataset_class``. ``notes``: for the log."""

    values: dict[str, Any]
    places: FilePlaces | FlagPlaces
    python: str | None = None
    notes: tuple[str, ...] = ()


def choose(options: Any, flag_place: Callable[[str], str]) -> Source:
    """The source that the flags name; ``config.check`` has made sure that there is one. Raises UserError(s)."""
    if options.dataset_config is not None:
        values, where = load_file(Path(options.dataset_config))
        others = [name for name in ("train_data_dir", "reg_data_dir", "in_json") if getattr(options, name)]
        return Source(values, FilePlaces(where), notes=tuple(
            f"{flag_place(name)}: has no effect beside --dataset_config, as in the dialect" for name in others))
    if options.dataset_class is not None:
        place = flag_place("dataset_class")
        return Source({"datasets": [{"subsets": [{}]}]}, FlagPlaces(place), python=options.dataset_class)
    if options.in_json is not None:
        return _metadata(options, flag_place("in_json"))
    if options.train_data_dir is not None:
        return _trees(options, flag_place)
    raise UserError("is required", place=flag_place("dataset_config"),
                    remedy="add --dataset_config FILE, or --train_data_dir DIR")


def _metadata(options: Any, place: str) -> Source:
    path = Path(options.in_json)
    if path.suffix.lower() not in (".json", ".jsonl"):
        raise UserError(f"{path} is neither .json nor .jsonl", place=place, remedy="a dataset file goes to --dataset_config")
    subset = {"metadata_file": str(path)}
    if options.train_data_dir is not None:
        subset["image_dir"] = str(options.train_data_dir)
    return Source({"datasets": [{"subsets": [subset]}]}, FlagPlaces(place))


def _trees(options: Any, flag_place: Callable[[str], str]) -> Source:
    subsets: list[dict[str, Any]] = []
    names: dict[tuple[str | int, ...], str] = {}
    notes: list[str] = []
    for flag, is_reg in (("train_data_dir", False), ("reg_data_dir", True)):
        folder = getattr(options, flag)
        if folder is None:
            continue
        for found in class_folders(Path(folder), flag_place(flag), notes):
            names["datasets", 0, "subsets", len(subsets)] = f"{flag_place(flag)}: {found.folder}"
            subset: dict[str, Any] = {"image_dir": str(found.folder), "num_repeats": found.repeats, "is_reg": is_reg}
            if found.words:
                subset["class_tokens"] = found.words
            masks = _masks_of(options.conditioning_data_dir, found.folder)
            if masks is not None and not is_reg:
                subset["conditioning_data_dir"] = str(masks)
            subsets.append(subset)
    if options.dataset_repeats > 1:
        notes.append(f"{flag_place('dataset_repeats')}: has no effect here: the names of the folders say how often")
    return Source({"datasets": [{"subsets": subsets}]}, FlagPlaces(flag_place("train_data_dir"), names), notes=tuple(notes))


def _masks_of(masks: Path | None, folder: Path) -> Path | None:
    """The folder of the same name below the mask folder, where there is one; else the mask folder itself."""
    if masks is None:
        return None
    inner = Path(masks) / folder.name
    return inner if inner.is_dir() else Path(masks)


@dataclass(frozen=True)
class ClassFolder:
    folder: Path
    repeats: int
    words: str


def class_folders(folder: Path, place: str, notes: list[str]) -> list[ClassFolder]:
    """The folders ``<repeats>_<words>`` in ``folder``, by name. What else lies there is named in ``notes``.

    Raises UserError when there is none.
    """
    try:
        entries = sorted(folder.iterdir(), key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"cannot be read: {folder}: {error.strerror or error}", place=place,
                        remedy="name the folder that holds the folders of pictures") from None
    found, off, other = [], [], []
    for entry in entries:
        if entry.name.startswith(".") or not entry.is_dir():
            continue
        match = _CLASS_FOLDER.fullmatch(entry.name)
        if match is None:
            other.append(entry.name)
        elif int(match["repeats"][:9]) < 1:
            off.append(entry.name)
        elif len(match["repeats"]) > 9 or int(match["repeats"]) > MAX_REPEATS:
            raise UserError(f"{entry.name} asks for more than {MAX_REPEATS} repeats", place=place, remedy="rename that folder")
        else:
            found.append(ClassFolder(entry, int(match["repeats"]), match["words"].strip()))
    loose = sum(entry.suffix.lower() in SUFFIXES for entry in entries)
    if not found:
        raise UserError(f"no folder in {folder} is named <repeats>_<caption>" + _what_instead(loose, off, other), place=place,
                        remedy=_tree_remedy(folder, loose, off))
    for names, why in ((other, "does not begin with a number and _, so it is left out"), (off, "has no repeats and is left out")):
        if names:
            notes.append(f"{place}: {_listed(names)} in {folder} {why}")
    if loose:
        notes.append(f"{place}: pictures directly in {folder} are left out ({loose}); move them to a folder such as 1_words")
    return found


def _what_instead(loose: int, off: list[str], other: list[str]) -> str:
    parts = [f"pictures directly in it: {loose}"] * bool(loose) + [f"folders: {_listed([*off, *other])}"] * bool(off or other)
    return f" ({', '.join(parts)})" if parts else ", it is empty"


def _tree_remedy(folder: Path, loose: int, off: list[str]) -> str:
    own = _CLASS_FOLDER.fullmatch(folder.resolve().name)
    if loose and own and int(own["repeats"][:9]) > 0:
        return f"name the folder around it: {folder.resolve().parent}"
    if loose:
        return "move them to a folder such as 10_a cat in it, or list the folder in the file of --dataset_config"
    if off:
        return f"0 leaves a folder out: rename {off[0]} to 1_{off[0].partition('_')[2]}"
    return "rename the folders to such as 10_a cat, or list them in the file of --dataset_config"


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def find_path(lookup: Lookup, found: Found, kind: Literal["file", "folder"], what: str) -> Path | None:
    """The file or folder that a key names; None when there is none (not given, or reported as missing).

    As in the dialect a relative path starts at the current folder; where that does not exist, beside the dataset file.
    """
    if found.value is None:
        return None
    given = Path(found.value).expanduser()
    beside = lookup.places.folder if found.section != "flag" else None
    candidates = [given] if given.is_absolute() or beside is None else [given, beside / given]
    for candidate in candidates:
        if candidate.is_dir() if kind == "folder" else candidate.is_file():
            return candidate
    wrong = next((candidate for candidate in candidates if candidate.exists()), None)
    if wrong is not None:
        lookup.error(f"{found.value} is a {'folder' if kind == 'file' else 'file'}, not a {kind}", found.place,
                     f"give the {kind} {what}")
        return None
    looked = " and ".join(dict.fromkeys(str(candidate.absolute()) for candidate in candidates))
    lookup.error(f"no such {kind}: {found.value} (looked for {looked})", found.place,
                 _similar(candidates) or "check the spelling of the path")
    return None


def _similar(candidates: list[Path]) -> str:
    """The nearest name in the folder where something was looked for."""
    for candidate in candidates:
        try:
            guess = nearest(candidate.name, [entry.name for entry in candidate.parent.iterdir()])
        except OSError:
            continue
        if guess:
            return guess
    return ""

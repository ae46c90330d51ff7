"""The dataset file: ``[general]``, ``[[datasets]]``, ``[[datasets.subsets]]``, read strictly and completely checked.

A value is looked for in the subset, its dataset, ``[general]``, the command line, and last in the defaults below.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.data.bucket import Rule, bucket_sizes
from library.data.spec_keys import KEYS, UNBUILT, check_unbuilt
from library.errors import UserError, nearest, raise_all
from library.log import log
from library.toml_lines import Locator, load_toml

# The dialect's own default is ".caption"; nearly every folder of captions people have holds ".txt".
CAPTION_SUFFIXES = (".txt", ".caption")
MIN_BUCKET_SIDE = 256
BUCKET_STEP = 64


@dataclass(frozen=True)
class SubsetSpec:
    """One folder of pictures. ``place`` (``file:line``) is where the user wrote it down."""

    image_dir: Path
    num_repeats: int
    class_tokens: str | None
    caption_suffixes: tuple[str, ...]
    place: str


@dataclass(frozen=True)
class DatasetSpec:
    """Folders that share batches. ``resolution`` is (width, height) in pixels; bucket limits are sides in pixels."""

    resolution: tuple[int, int]
    batch_size: int
    enable_bucket: bool
    min_bucket_reso: int
    max_bucket_reso: int | None
    bucket_reso_steps: int
    bucket_no_upscale: bool
    subsets: tuple[SubsetSpec, ...]
    place: str

    @property
    def rule(self) -> Rule:
        """Turns the size of a picture into its place in a bucket."""
        return Rule(self.resolution, self.enable_bucket, self.min_bucket_reso, self.max_bucket_reso, self.bucket_reso_steps,
                    self.bucket_no_upscale)


def load(path: Path, defaults: object, pixel_step: int) -> tuple[DatasetSpec, ...]:
    """Read and check ``path``. ``defaults`` is the command line's dataset section (its attributes are named in
    ``KEYS``; None means not given); ``pixel_step`` is what the architecture needs every side to be a multiple of.

    Raises UserError, or UserErrors with everything that is wrong.
    """
    path = Path(path)
    if path.suffix.lower() in (".json", ".jsonl"):
        raise UserError("dataset files in JSON are not built yet", place=str(path), remedy="write the same keys as TOML")
    values, where = load_toml(path)
    reader = _Reader(values, where, defaults)
    specs = tuple(reader.datasets(pixel_step)) if reader.check_structure() else ()
    raise_all(list({str(error): error for error in reader.errors}.values()))  # a shared value may be looked up twice
    for note in dict.fromkeys(reader.notes):
        log.info(note)
    return specs


class _Reader:
    """One pass over the parsed file that gathers mistakes instead of stopping at the first."""

    def __init__(self, values: dict, where: Locator, defaults: object):
        self.values, self.where, self.defaults = values, where, defaults
        self.errors: list[UserError] = []
        self.notes: list[str] = []

    def error(self, message: str, place: str, remedy: str = "") -> None:
        self.errors.append(UserError(message, place=place, remedy=remedy))

    def check_structure(self) -> bool:
        """Checks names, sections and types; True when the tables are in place and values can be looked up."""
        before = len(self.errors)
        for name, value in self.values.items():
            if name == "general":
                if not isinstance(value, dict):
                    self.error("this should be a table", self.where.place(name), "write [general]")
            elif name == "datasets":
                self._check_tables(value, ("datasets",))
            else:
                remedy = nearest(name, ("general", "datasets"))
                if name in KEYS or name in UNBUILT:
                    remedy = "move it below a line [general]" if name != "image_dir" else "move it below [[datasets.subsets]]"
                self.error("unknown key at the top of the file", self.where.place(name), remedy)
        if "datasets" not in self.values:
            self.error("there is no [[datasets]]", str(self.where.path),
                       "add [[datasets]] with resolution, and below it [[datasets.subsets]] with image_dir")
        if len(self.errors) > before:
            return False
        for section, path, table in self._tables():
            self._check_table(section, path, table)
        return True

    def _check_tables(self, value: Any, path: tuple) -> None:
        name = ".".join(step for step in path if isinstance(step, str))
        if not isinstance(value, list) or not value or not all(isinstance(table, dict) for table in value):
            self.error("this should be one or more tables", self.where.place(*path), f"write [[{name}]] with double brackets")
            return
        for index, table in enumerate(value):
            if name != "datasets":
                continue
            if "subsets" in table:
                self._check_tables(table["subsets"], (*path, index, "subsets"))
            else:
                self.error("this dataset has no [[datasets.subsets]]", self._table_place((*path, index)),
                           "add [[datasets.subsets]] with image_dir below it")

    def _tables(self) -> Iterator[tuple[str, tuple, dict]]:
        if "general" in self.values:
            yield "general", ("general",), self.values["general"]
        for index, table in enumerate(self.values["datasets"]):
            path = ("datasets", index)
            yield "datasets", path, {key: value for key, value in table.items() if key != "subsets"}
            for sub, subset in enumerate(table["subsets"]):
                yield "subsets", (*path, "subsets", sub), subset

    def _check_table(self, section: str, path: tuple, table: dict) -> None:
        for name, value in table.items():
            place = self.where.place(*path, name)
            if name in UNBUILT:
                answer = check_unbuilt(name, value, place)
                if isinstance(answer, UserError):
                    self.errors.append(answer)
                elif answer:
                    self.notes.append(answer)
            elif name not in KEYS:
                known = [key.name for key in KEYS.values() if section in key.sections]
                self.error("unknown key", place, nearest(name, [*known, *UNBUILT]) or f"known here: {', '.join(known)}")
            elif section not in KEYS[name].sections:
                homes = " or ".join({"general": "[general]", "datasets": "[[datasets]]", "subsets": "[[datasets.subsets]]"}[home]
                                    for home in KEYS[name].sections)
                self.error("this key does not belong here", place, f"move it to {homes}")
            else:
                self._check_value(name, value, place)

    def _check_value(self, name: str, value: Any, place: str) -> None:
        expected = KEYS[name].check(value)
        if expected:
            shown = repr(value) if not isinstance(value, bool) else str(value).lower()
            self.error(f"{shown} is not {expected}", place, f"give {expected}")

    def lookup(self, name: str, path: tuple) -> tuple[Any, str]:
        """(value, place) of a key for the table at ``path``; (None, place of the table) when nobody gives it."""
        for table_path in (path, path[:2], ("general",)):
            table: Any = self.values
            for step in table_path:
                table = table.get(step, {}) if isinstance(table, dict) else table[step]
            if name in table:
                place = self.where.place(*table_path, name)
                self._note_overruled(KEYS[name].option, table[name], place)
                return (table[name] if KEYS[name].check(table[name]) is None else None), place
        option = KEYS[name].option
        value = getattr(self.defaults, option, None) if option else None
        if value is None or value == "":
            return None, self._table_place(path)
        if name == "resolution":
            value = _command_line_sides(value)
        place = f"--{option}"
        expected = KEYS[name].check(value)
        if expected:
            self.error(f"{value!r} is not {expected}", place, f"give {expected}")
            return None, place
        return value, place

    def _note_overruled(self, option: str | None, value: Any, place: str) -> None:
        """The file wins over the command line, as in the dialect; whoever gave a flag should hear that it did nothing."""
        given = getattr(self.defaults, option, None) if option else None
        known = getattr(type(self.defaults), "__dataclass_fields__", {})
        if option in known and given != known[option].default:
            given = _command_line_sides(given) if option == "resolution" else given
            if given != value:
                self.notes.append(f"{place}: overrules --{option}, which has no effect here")

    def datasets(self, pixel_step: int) -> Iterator[DatasetSpec]:
        for index in range(len(self.values["datasets"])):
            spec = self._dataset(("datasets", index), pixel_step)
            if spec is not None:
                yield spec

    def _dataset(self, path: tuple, pixel_step: int) -> DatasetSpec | None:
        before = len(self.errors)

        def value(name: str, default: Any) -> Any:
            found = self.lookup(name, path)[0]
            return default if found is None else found

        sides, place = self.lookup("resolution", path)
        step = value("bucket_reso_steps", max(BUCKET_STEP // pixel_step, 1) * pixel_step)
        if sides is None:
            if place == self._table_place(path):  # not given anywhere; a wrong one has been reported already
                self.error("this dataset has no resolution", place, "add for instance resolution = 1024")
        else:
            width, height = sides = tuple(sides) if isinstance(sides, (list, tuple)) else (sides, sides)
            self._check_multiples(sides, place, pixel_step)
        if step % pixel_step:
            self.error(f"{step} is not a multiple of {pixel_step}, which this model needs",
                       self.lookup("bucket_reso_steps", path)[1], f"use {max(round(step / pixel_step), 1) * pixel_step}")
        subsets = self._subsets(path)
        spec = None
        if sides is not None:
            short = min(width, height)
            smallest = value("min_bucket_reso", min(MIN_BUCKET_SIDE, max(short // 2, step), short))
            spec = DatasetSpec(
                sides, value("batch_size", 1), value("enable_bucket", False), smallest, value("max_bucket_reso", None), step,
                value("bucket_no_upscale", False), subsets, self._table_place(path))
            self._check_buckets(spec, path)
        return spec if len(self.errors) == before else None

    def _check_multiples(self, sides: tuple[int, int], place: str, pixel_step: int) -> None:
        if any(side % pixel_step for side in sides):
            near = [max(round(side / pixel_step), 1) * pixel_step for side in sides]
            self.error(f"{sides[0]} x {sides[1]} is not a multiple of {pixel_step} pixels, which this model needs", place,
                       f"use {near[0] if near[0] == near[1] else near}")

    def _check_buckets(self, spec: DatasetSpec, path: tuple) -> None:
        if not spec.enable_bucket:
            if spec.bucket_no_upscale:
                self.notes.append(f"{self.lookup('bucket_no_upscale', path)[1]}: without effect while enable_bucket is false")
            return
        step_place = self.lookup("bucket_reso_steps", path)[1]
        area_side = math.isqrt(spec.resolution[0] * spec.resolution[1])
        if spec.bucket_reso_steps > area_side:
            self.error(f"{spec.bucket_reso_steps} is larger than the resolution", step_place, "use a smaller step")
            return
        if spec.bucket_no_upscale:
            for name in ("min_bucket_reso", "max_bucket_reso"):
                found, place = self.lookup(name, path)
                if found is not None and not place.startswith("--"):
                    self.notes.append(f"{place}: without effect with bucket_no_upscale, which makes a bucket of any side")
            return
        short, long = sorted(spec.resolution)
        if spec.min_bucket_reso > short:
            self.error(f"{spec.min_bucket_reso} is larger than the resolution's shorter side {short}",
                       self.lookup("min_bucket_reso", path)[1], f"use at most {short}, or leave it out")
        elif spec.max_bucket_reso is not None and spec.max_bucket_reso < long:
            self.error(f"{spec.max_bucket_reso} is smaller than the resolution's longer side {long}",
                       self.lookup("max_bucket_reso", path)[1], f"use at least {long}, better {2 * long}, or leave it out")
        elif not bucket_sizes(spec.resolution, spec.min_bucket_reso, spec.max_bucket_reso, spec.bucket_reso_steps):
            self.error(f"no bucket has sides that are multiples of {spec.bucket_reso_steps}, keep to min_bucket_reso and "
                       "max_bucket_reso and fit into the resolution's area", step_place, "use a smaller step or wider limits")

    def _subsets(self, path: tuple) -> tuple[SubsetSpec, ...]:
        specs: list[SubsetSpec] = []
        seen: dict[Path, str] = {}
        for index in range(len(self.values["datasets"][path[1]]["subsets"])):
            here = (*path, "subsets", index)
            given, place = self.lookup("image_dir", here)
            if given is None:
                if "image_dir" not in self.values["datasets"][path[1]]["subsets"][index]:
                    self.error("this subset has no image_dir", self._table_place(here),
                               'add image_dir = "folder of pictures"')
                continue
            folder = self._folder(given, place)
            if folder is None:
                continue
            same = folder.resolve()
            if same in seen:
                self.error(f"this folder stands in the dataset twice, first at {seen[same]}", place,
                           "remove one of them and set num_repeats on the other")
                continue
            seen[same] = self._table_place(here)
            suffix = self.lookup("caption_extension", here)[0]
            tokens = self.lookup("class_tokens", here)[0]
            specs.append(SubsetSpec(folder, self.lookup("num_repeats", here)[0] or 1, tokens.strip() if tokens else None,
                                    (suffix,) if suffix else CAPTION_SUFFIXES, seen[same]))
        return tuple(specs)

    def _table_place(self, path: tuple) -> str:
        line = self.where.line(*path)
        return f"{self.where.path}:{line}" if line else str(self.where.path)

    def _folder(self, given: str, place: str) -> Path | None:
        """As in the dialect a relative path starts at the current folder; where that does not exist, beside the file."""
        folder = Path(given).expanduser()
        candidates = [folder] if folder.is_absolute() else [folder, self.where.path.parent / folder]
        for candidate in candidates:
            if candidate.is_dir():
                return candidate
        if any(candidate.exists() for candidate in candidates):
            self.error(f"{given} is a file, not a folder", place, "give the folder that holds the pictures")
        else:
            looked = " and ".join(dict.fromkeys(str(candidate.absolute()) for candidate in candidates))
            self.error(f"no such folder: {given} (looked for {looked})", place, "check the spelling of the path")
        return None


def _command_line_sides(value: Any) -> Any:
    """``--resolution "1024"`` or ``"1024,768"``; anything else comes back as it is, for the check to refuse."""
    try:
        sides = [int(part) for part in str(value).split(",")]
    except ValueError:
        return value
    return sides[0] if len(sides) == 1 else sides

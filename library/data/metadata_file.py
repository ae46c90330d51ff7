"""Pictures that are listed instead of searched: metadata files (.json, .jsonl) and Python sequences (--dataset_class)."""

from __future__ import annotations

import importlib
import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy

from library.data import problems
from library.data.caption_files import is_text, joined
from library.data.header import SUFFIXES
from library.data.listing import Found, all_files, pair_masks, pictures_among
from library.data.problems import Tally
from library.data.spec import SubsetSpec
from library.data.strings import Strings
from library.errors import UserError

IMAGE_KEYS = ("image_path", "file_name", "image")  # of a line of a .jsonl file: the dialect's, the Hub's and that of a sequence


@dataclass(frozen=True)
class Record:
    """One entry: ``image`` as it is written, ``place`` where. ``mask`` only from a sequence."""

    image: str
    caption: str
    weight: float
    place: str
    mask: str = ""


def find_listed(subset: SubsetSpec, tally: Tally) -> Found:
    """The pictures of ``metadata_file`` or of ``source``. What is amiss goes to ``tally``."""
    separator = subset.captions.separator
    if subset.source is not None:
        root, name = subset.image_dir or Path(), subset.source
        entries = _of_sequence(subset.source, subset.place, tally)
    else:
        assert subset.metadata_file is not None
        root, name = subset.image_dir or subset.metadata_file.parent, str(subset.metadata_file)
        entries = _of_file(subset.metadata_file, tally)
    lookup = _Lookup(root, subset, tally)
    found: dict[str, Record] = {}
    for place, values in entries:
        try:
            record = _record(values, place, separator)
            image = lookup.name(record)
            if image in found:
                raise UserError(f"{image} is listed twice, first at {found[image].place}", place=place,
                                remedy="remove one of them")
            found[image] = record
        except UserError as error:
            tally.add(problems.BAD_METADATA, place, error)
    if not found and not tally.problems:
        tally.add(problems.EMPTY_FOLDER, name, UserError(f"no pictures in {name}", place=subset.place, remedy="add some"))
    return _found(root, subset, found, lookup, tally)


def _found(root: Path, subset: SubsetSpec, found: dict[str, Record], lookup: _Lookup, tally: Tally) -> Found:
    names = sorted(found)
    records = [found[name] for name in names]
    texts = []
    for name, record in zip(names, records, strict=True):
        texts.append(record.caption or subset.class_tokens or "")
        if not texts[-1]:
            tally.add(problems.EMPTY_CAPTION, root / name, UserError(
                f"{name} has no caption", place=record.place, remedy="write one, or set class_tokens for the subset"))
    lookup.tell_unlisted(names)
    weights = numpy.array([record.weight for record in records], dtype=numpy.float32)
    masks = pair_masks(names, subset, tally)
    if any(record.mask for record in records):
        masks = Strings.of([str((root / record.mask).absolute()) if record.mask else "" for record in records])
    return Found(root, Strings.of(names), None, Strings.of(texts), weights if (weights != 1).any() else None, masks)


class _Lookup:
    """Files by what records call them: absolute, relative to the root or to where the program was started, or a name without its
    suffix."""

    def __init__(self, root: Path, subset: SubsetSpec, tally: Tally):
        self.root, self.subset, self.tally = root, subset, tally
        self.absolute = f"{root.absolute().as_posix().rstrip('/')}/"
        self._by_stem: dict[str, list[str]] | None = None
        self.beside = lru_cache(maxsize=None)(self._beside)  # asked once for each folder, and not for each of a million pictures

    def _beside(self, folder: str) -> bool:
        """Whether ``folder`` is one of the current folder and none of the root: tools write names as they were given them."""
        return not os.path.isabs(folder) and not (self.root / folder).is_dir() and os.path.isdir(folder)

    def name(self, record: Record) -> str:
        """Relative to the root, with ``/`` between folders; absolute for a file that lies elsewhere."""
        written = Path(record.image).as_posix()
        if "\\" in written and not (self.root / written).exists():  # written on Windows
            written = written.replace("\\", "/").removeprefix("./")
        if (folder := os.path.dirname(written)) and self.beside(folder):
            written = os.path.abspath(written)
        if Path(written).is_absolute():
            written = os.path.normpath(written).replace(os.sep, "/")
            written = written.removeprefix(self.absolute)
        if os.path.splitext(written)[1].lower() in SUFFIXES:
            return written
        matches = self.by_stem.get(written.removeprefix("./"), [])
        if len(matches) == 1:
            return matches[0]
        if matches:
            raise UserError(f"{record.image} may be {' or '.join(matches[:3])}", place=record.place,
                            remedy="write the name with its suffix")
        raise UserError(f"no picture named {record.image} in {self.root}", place=record.place,
                        remedy="correct image_dir, put the picture there or remove the record")

    @property
    def by_stem(self) -> dict[str, list[str]]:
        """Relative stems, and bare ones: of all folders inside, as names without a suffix are often given."""
        if self._by_stem is None:
            self._by_stem = {}
            files = all_files(self.root, True, self.subset.mask_dir, self.subset.place, self.tally)
            for file in sorted(pictures_among(files, self.subset, self.tally)):
                stem = os.path.splitext(file)[0]
                for key in {stem, stem.rpartition("/")[2]}:
                    self._by_stem.setdefault(key, []).append(file)
        return self._by_stem

    def tell_unlisted(self, names: Sequence[str]) -> None:
        """Pictures of the folder that the metadata says nothing of, where the folder has been read."""
        if self._by_stem is None:
            return
        listed, files = set(names), {file for matches in self._by_stem.values() for file in matches}
        rest = sorted(files - listed)
        if rest:
            self.tally.add(problems.NOT_LISTED, self.root / rest[0], UserError(
                f"{len(rest)} pictures in {self.root} are not in the metadata and are left out, the first is {rest[0]}",
                place=self.subset.place), len(rest))


def _record(values: Any, place: str, separator: str) -> Record:
    remedy = 'write {"caption": "...", "tags": "..."}'
    if not isinstance(values, dict):
        raise UserError(f"the record is not an object: {str(values)[:40]!r}", place=place, remedy=remedy)
    image = next((values[key] for key in IMAGE_KEYS if key in values), None)
    if not isinstance(image, (str, os.PathLike)) or not str(image) or not is_text(os.fspath(image)):
        raise UserError("the record names no picture", place=place, remedy='add "image_path": "file"')
    try:
        caption = joined(values.get("caption"), values.get("tags"), separator)
    except ValueError as error:
        raise UserError(f"{image}: {error}", place=place, remedy=remedy) from None
    weight = values.get("loss_weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not (math.isfinite(weight) and weight >= 0):
        raise UserError(f"{image}: loss_weight is {str(weight)[:40]}", place=place, remedy="use a number of at least 0")
    mask = values.get("mask") or ""
    if not isinstance(mask, (str, os.PathLike)) or not is_text(os.fspath(mask)):
        raise UserError(f"{image}: its mask is not a path: {str(mask)[:40]!r}", place=place, remedy="give the path of a picture")
    return Record(os.fspath(image), caption, float(weight), place, os.fspath(mask))


def _of_file(path: Path, tally: Tally) -> Iterator[tuple[str, Any]]:
    """(place, record as a dict with its picture under ``image_path``)."""
    try:
        if path.suffix.lower() == ".jsonl":
            with open(path, encoding="utf-8-sig") as lines:
                for number, line in enumerate(lines, 1):
                    if line.strip():
                        place = f"{path}:{number}"
                        try:
                            yield place, json.loads(line)
                        except (ValueError, RecursionError) as error:
                            tally.add(problems.BAD_METADATA, path, _not_json(error, path, number))
            return
        with open(path, encoding="utf-8-sig") as file:
            pairs = json.load(file, object_pairs_hook=_Pairs)
    except OSError as error:
        tally.add(problems.BAD_METADATA, path, UserError(f"cannot be read: {error.strerror or error}", place=str(path),
                                                         remedy="change its permissions"))
        return
    except (ValueError, RecursionError) as error:  # JSON and UTF-8 alike
        tally.add(problems.BAD_METADATA, path, _not_json(error, path))
        return
    if not isinstance(pairs, _Pairs):
        tally.add(problems.BAD_METADATA, path, UserError("not an object of pictures", place=str(path),
                                                         remedy='write {"picture": {"caption": "..."}, ...}, or use .jsonl'))
        return
    for image, record in pairs:
        plain = _plain(record)
        yield (str(path), {**plain, "image_path": image}) if isinstance(record, _Pairs) else (f"{path}: {image}", plain)


def _not_json(error: Exception, path: Path, line: int | None = None) -> UserError:
    """``line``: of a file with JSON in each line; else the whole file was read, and ``error`` may know the line."""
    if isinstance(error, UnicodeDecodeError):
        return UserError("not a UTF-8 text file", place=str(path), remedy="save it again with the encoding UTF-8")
    if isinstance(error, json.JSONDecodeError):
        place = f"{path}:{line or error.lineno}"
        return UserError(f"not JSON: {error.msg} (column {error.colno})", place=place,
                         remedy="mend that place, or remove the file from the dataset")
    return UserError(f"not JSON: {error}", place=str(path) if line is None else f"{path}:{line}",
                     remedy="mend the file, or remove it from the dataset")


class _Pairs(tuple):
    """A JSON object as it is written. A dict would keep the last of two records of one picture and say nothing."""


def _plain(value: Any) -> Any:
    return {name: _plain(inner) for name, inner in value} if isinstance(value, _Pairs) else value


def _of_sequence(source: str, place: str, tally: Tally) -> Iterator[tuple[str, Any]]:
    """An instance of the class ``source``, made without arguments, is a sequence of ``{"image": path, "caption": text}``, with
    ``"tags"``, ``"mask"`` (the path of a mask picture) and ``"loss_weight"`` where wanted."""
    module, _, name = source.rpartition(".")
    try:
        sequence = getattr(importlib.import_module(module), name)()
        count = len(sequence)
    except Exception as error:  # somebody else's code
        tally.add(problems.BAD_METADATA, None, UserError(
            f"cannot open {source}: {type(error).__name__}: {error}", place=place,
            remedy="give package.module.Class, of which an instance without arguments is a sequence (len() and [index])"))
        return
    for index in range(count):
        where = f"{source}[{index}]"
        try:
            yield where, sequence[index]
        except Exception as error:
            tally.add(problems.BAD_METADATA, None, UserError(f"{type(error).__name__}: {error}", place=where,
                                                             remedy="mend the class"))

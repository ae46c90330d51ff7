"""Which files a subset has: pictures, the caption file of each, the mask of each. Looks at names alone, opens nothing."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy

from library.data import problems
from library.data.caption_files import stems
from library.data.header import SUFFIXES, readable_suffixes
from library.data.problems import Tally
from library.data.spec import SubsetSpec
from library.data.strings import Strings
from library.errors import UserError

NO_FILE = -1  # the caption source of a picture without a caption file


@dataclass(frozen=True)
class Found:
    """The pictures of one subset in the order of their names (N of them), before any is looked at.

    ``sources`` (N,) int16 says which caption file a picture has (see ``caption_name``), ``texts`` is its words where those are
    known without a file; one of the two is None. ``weights`` (N,) float32 and ``masks`` are as in ``items.Listing``.
    """

    root: Path
    names: Strings
    sources: numpy.ndarray | None
    texts: Strings | None = None
    weights: numpy.ndarray | None = None
    masks: Strings | None = None


def find(subset: SubsetSpec, tally: Tally) -> Found:
    """The pictures of ``image_dir``, with or without its subfolders. What is amiss goes to ``tally``."""
    assert subset.image_dir is not None
    files, inner = _files(subset.image_dir, subset.recursive, subset.mask_dir, subset.place, tally)
    names = sorted(pictures_among(files, subset, tally))
    if not names and not any(problem.kind == problems.BAD_FOLDER for problem in tally.problems):
        remedy = f"put {', '.join(sorted(readable_suffixes()))} files there or correct image_dir"
        if inner and not subset.recursive:
            remedy = "folders inside it are searched only with recursive = true; or give each one its own [[datasets.subsets]]"
        tally.add(problems.EMPTY_FOLDER, subset.image_dir,
                  UserError(f"no pictures in {subset.image_dir}", place=subset.place, remedy=remedy))
    sources = _caption_sources(names, subset.caption_suffixes, files)
    return Found(subset.image_dir, Strings.of(names), sources, masks=pair_masks(names, subset, tally))


def pictures_among(files: Sequence[str], subset: SubsetSpec, tally: Tally) -> list[str]:
    """Those that Pillow can read, by their suffix."""
    readable = readable_suffixes()
    known = {suffix: suffix in readable for suffix in SUFFIXES}
    names, foreign = [], []
    for name in files:
        can = known.get("." + name.rpartition(".")[2].lower())
        if can:
            names.append(name)
        elif can is False:
            foreign.append(name)
    if foreign:
        first = min(foreign)
        tally.add(problems.FORMAT, first, UserError(
            f"{len(foreign)} pictures left out because this Pillow cannot read their format, the first is {first}",
            place=subset.place, remedy="install Pillow with that format, or convert them"), len(foreign))
    return names


def all_files(root: Path, recursive: bool, without: Path | None, place: str, tally: Tally) -> list[str]:
    """Names relative to ``root``, with ``/`` between folders, in no order. Names that start with a dot are caches and the
    resource forks that macOS scatters over foreign disks. The folder ``without`` (masks, which are no pictures to learn) is
    left out."""
    return _files(root, recursive, without, place, tally)[0]


def _files(root: Path, recursive: bool, without: Path | None, place: str, tally: Tally) -> tuple[list[str], bool]:
    """(names, whether there are folders inside)."""
    found: list[str] = []
    inner = False
    for prefix, names, folders in _walk(root, recursive, without, place, tally):
        inner = inner or bool(folders)
        found += [prefix + name for name in names] if prefix else names
    return found, inner


def _walk(root: Path, recursive: bool, without: Path | None, place: str, tally: Tally
          ) -> Iterator[tuple[str, list[str], list[str]]]:
    """(prefix of the names, files, folders) of each folder. A folder that links lead to more than once is visited once, under
    its own name where it lies inside ``root``: links are followed last."""
    waiting, links, seen = [""], [], {_identity(without)} if without is not None else set()
    while waiting or links:
        prefix = waiting.pop() if waiting else links.pop()
        folder = os.path.join(root, prefix) if prefix else str(root)
        identity = _identity(folder)
        if identity in seen and prefix:
            continue
        seen.add(identity)
        names, folders = [], []
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        continue
                    if _is_folder(entry):
                        folders.append(entry.name)
                        if recursive:
                            (links if entry.is_symlink() else waiting).append(f"{prefix}{entry.name}/")
                    else:
                        names.append(entry.name)
        except OSError as error:
            tally.add(problems.BAD_FOLDER, folder, UserError(f"cannot read {folder}: {error.strerror or error}", place=place,
                                                             remedy="change its permissions"))
        waiting.sort(reverse=True)
        links.sort(reverse=True)
        yield prefix, names, folders


def _is_folder(entry: os.DirEntry) -> bool:
    """A link that leads nowhere or to itself is a file, of which the look at it says what is wrong."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def _identity(folder: str | Path) -> tuple[int, int] | str:
    try:
        state = os.stat(folder)
    except OSError:
        return str(folder)
    return state.st_dev, state.st_ino


def _caption_sources(names: Sequence[str], suffixes: Sequence[str], files: Sequence[str]) -> numpy.ndarray:
    """The first that exists of: the picture's stem with each suffix in order, then the stem without face numbers."""
    fold = _folded if os.name == "nt" else str
    present = {fold(name) for name in files if name.endswith(tuple(suffixes))} if os.name != "nt" else set(map(fold, files))
    sources = numpy.full(len(names), NO_FILE, dtype=numpy.int16)
    for row, name in enumerate(names):
        dot = name.rpartition(".")[0]
        if fold(dot + suffixes[0]) in present:  # nearly always
            sources[row] = 0
            continue
        for code, candidate in enumerate(_caption_names(name, suffixes)):
            if fold(candidate) in present:
                sources[row] = code
                break
    return sources


def _folded(name: str) -> str:
    return name.casefold()


def _caption_names(name: str, suffixes: Sequence[str]) -> list[str]:
    return [stem + suffix for stem in stems(name) for suffix in suffixes]


def caption_name(name: str, source: int, suffixes: Sequence[str]) -> str:
    """The caption file that ``Found.sources`` speaks of, relative to the root as the picture's ``name`` is."""
    if source < len(suffixes):
        return name.rpartition(".")[0] + suffixes[source]
    return _caption_names(name, suffixes)[source]


def pair_masks(names: Sequence[str], subset: SubsetSpec, tally: Tally) -> Strings | None:
    """For each picture the path of the file of the same stem in ``mask_dir`` (of a picture in a subfolder: in the same subfolder
    there); None for a subset without mask files."""
    if subset.mask_dir is None:
        return None
    nested = any("/" in name for name in names)
    files = all_files(subset.mask_dir, nested or subset.recursive, None, subset.place, tally)
    by_stem: dict[str, str] = {}
    for name in sorted(pictures_among(files, subset, tally)):
        other = by_stem.setdefault(os.path.splitext(name)[0], name)
        if other != name:
            tally.add(problems.NO_MASK, subset.mask_dir / name, UserError(
                f"{other} and {name} are masks of the same picture", place=str(subset.mask_dir), remedy="remove one of them"))
    used, masks = set(), []
    for name in names:
        stem = os.path.splitext(name)[0]
        mask = by_stem.get(stem)
        masks.append("" if mask is None else str(subset.mask_dir.absolute() / mask))
        used.add(stem)
        if mask is None:
            tally.add(problems.NO_MASK, (subset.image_dir or Path()) / name, UserError(
                f"no mask for {name} (looked for {os.path.basename(stem)}.png and other pictures in {subset.mask_dir})",
                place=subset.place, remedy="add a mask of that name, white where the picture counts, or remove the picture"))
    spare = [mask for stem, mask in by_stem.items() if stem not in used]
    if spare:
        tally.add(problems.SPARE_MASK, subset.mask_dir / spare[0], UserError(
            f"{len(spare)} masks in {subset.mask_dir} belong to no picture, the first is {spare[0]}", place=subset.place,
            remedy="check the names of the pictures"), len(spare))
    return Strings.of(masks)

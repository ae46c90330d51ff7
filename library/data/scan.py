"""Folders -> items: finds the pictures, their sizes (headers only) and captions, and gives each its bucket."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from library.data.bucket import Placement, Rule
from library.data.header import SUFFIXES, open_picture, readable_suffixes, upright_size
from library.data.spec import DatasetSpec, SubsetSpec
from library.errors import UserError, raise_all
from library.log import log

SHOWN_PER_KIND = 5  # mistakes of one kind spelled out before the rest is counted


@dataclass(frozen=True)
class Item:
    """One picture of one subset. ``sample_id`` does not depend on where the folder lies; ``size`` is (width, height)
    after the EXIF orientation; ``place`` is the subset's ``file:line``."""

    sample_id: str
    path: Path
    size: tuple[int, int]
    caption: str
    dataset: int
    repeats: int
    placement: Placement
    place: str


def scan(specs: Sequence[DatasetSpec]) -> tuple[Item, ...]:
    """All pictures of all subsets, sorted by name within a folder, so in the same order on every system.

    Raises UserErrors with what is wrong with pictures, captions and folders: the first five of each kind and a count.
    """
    mistakes = _Mistakes()
    readable = readable_suffixes()
    items: list[Item] = []
    for dataset, spec in enumerate(specs):
        for number, subset in enumerate(spec.subsets):
            items += _scan_subset(subset, f"{dataset}.{number}", dataset, spec.rule, readable, mistakes)
    raise_all(mistakes.errors())
    return tuple(items)


class _Mistakes:
    """UserErrors by kind, so that a thousand missing captions do not hide one broken picture."""

    def __init__(self) -> None:
        self.kinds: dict[str, list[UserError]] = {}

    def add(self, kind: str, error: UserError) -> None:
        self.kinds.setdefault(kind, []).append(error)

    def errors(self) -> list[UserError]:
        shown = []
        for kind, errors in self.kinds.items():
            shown += errors[:SHOWN_PER_KIND]
            if len(errors) > SHOWN_PER_KIND:
                shown.append(UserError(f"{len(errors) - SHOWN_PER_KIND} more: {kind}"))
        return shown


def _scan_subset(subset: SubsetSpec, prefix: str, dataset: int, rule: Rule, readable: frozenset[str],
                 mistakes: _Mistakes) -> list[Item]:
    names = _picture_names(subset, readable, mistakes)
    items, cut = [], 0
    for name in names:
        path = subset.image_dir / name
        try:
            with open_picture(path, str(path)) as picture:
                size = upright_size(picture)
        except UserError as error:
            mistakes.add("pictures that cannot be read", error)
            continue
        try:
            caption, whole = find_caption(path, subset)
        except UserError as error:
            mistakes.add("captions missing or unreadable", error)
            continue
        cut += not whole
        items.append(Item(f"{prefix}/{name}", path, size, caption, dataset, subset.num_repeats, rule.place(size), subset.place))
    if cut:
        log.warning("%s: %d caption files have several lines; only the first is used, as in the dialect", subset.place, cut)
    return items


def _picture_names(subset: SubsetSpec, readable: frozenset[str], mistakes: _Mistakes) -> list[str]:
    try:
        with os.scandir(subset.image_dir) as entries:
            # Names that start with a dot are caches and the resource forks that macOS scatters over foreign disks.
            found = [(entry.name, entry.is_dir()) for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        mistakes.add("folders that cannot be read", UserError(f"cannot read {subset.image_dir}: {error.strerror or error}",
                                                              place=subset.place, remedy="change its permissions"))
        return []
    files = sorted(name for name, is_folder in found if not is_folder)
    unreadable = [name for name in files if Path(name).suffix.lower() in set(SUFFIXES) - readable]
    if unreadable:
        log.warning("%s: %d pictures left out because this Pillow cannot read their format, the first is %s",
                    subset.place, len(unreadable), unreadable[0])
    names = [name for name in files if Path(name).suffix.lower() in readable]
    if not names:
        remedy = f"put {', '.join(sorted(readable))} files there or correct image_dir"
        if any(is_folder for _, is_folder in found):
            remedy = "folders inside it are not searched: give each one its own [[datasets.subsets]]"
        mistakes.add("folders without pictures",
                     UserError(f"no pictures in {subset.image_dir}", place=subset.place, remedy=remedy))
    return names


def find_caption(picture: Path, subset: SubsetSpec) -> tuple[str, bool]:
    """(the caption, False if more lines than the used one hold text): the first line with text of the caption file
    beside the picture, else ``class_tokens``.

    Raises UserError without either, and for a file that is empty or not UTF-8 (a byte order mark is accepted).
    """
    for suffix in subset.caption_suffixes:
        path = picture.with_name(picture.stem + suffix)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            continue
        except OSError as error:
            raise UserError(f"the caption cannot be read: {error.strerror or error}", place=str(path),
                            remedy="change its permissions") from None
        lines = [line.strip() for line in _decode(data, path).splitlines() if line.strip()]
        if not lines:
            raise UserError("the caption file is empty", place=str(path),
                            remedy="write a caption into it, or remove it and set class_tokens for the subset")
        return lines[0], len(lines) == 1
    if subset.class_tokens is not None:
        return subset.class_tokens, True
    looked = " or ".join(picture.stem + suffix for suffix in subset.caption_suffixes)
    raise UserError(f"the picture has no caption ({looked} beside it) and its subset no class_tokens", place=str(picture),
                    remedy=f"write one, or set class_tokens at {subset.place}")


def _decode(data: bytes, path: Path) -> str:
    remedy = f"save it again as UTF-8, for instance: iconv -f {{}} -t UTF-8 '{path.name}' > new.txt"
    if data[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in data:
        raise UserError("the caption is UTF-16, not UTF-8", place=str(path), remedy=remedy.format("UTF-16"))
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"the caption is not UTF-8 (byte 0x{data[error.start]:02x})", place=f"{path}:{line}",
                        remedy=remedy.format("WINDOWS-1252")) from None

"""Settings -> items: finds the pictures of all subsets, their sizes and captions, and gives each its bucket.

What was found out is kept where ``index_dir`` says, and a later start reads only what changed: a file counts as unchanged while
its size and time do. A file written within two seconds of a look is read again by the next one. That goes for pictures, captions
and mask files alike; the hashes of the bytes of pictures and masks are remembered as long as the file is unchanged.
"""

from __future__ import annotations

import ctypes
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from pathlib import Path

import numpy

from library.data import problems
from library.data.bucket import Size, assign
from library.data.examine import Check, examine
from library.data.index import Kept
from library.data.items import Items, Listing
from library.data.listing import Found, find
from library.data.metadata_file import find_listed
from library.data.problems import Problem, Tally
from library.data.spec import DatasetSpec, SubsetSpec
from library.data.strings import Strings
from library.errors import UserError
from library.file_lock import FileLock
from library.log import log

LARGE = 50_000  # pictures


@dataclass(frozen=True)
class Scan:
    """``items`` are the pictures that can be read; one whose caption is amiss is among them, with an empty caption."""

    items: Items
    problems: tuple[Problem, ...]
    kept: tuple[Kept | None, ...]  # the index of each listing

    def raise_errors(self) -> None:
        """Raise UserErrors with the first five errors of each kind and the number of the others."""
        problems.raise_errors(self.problems)

    def remember(self, listing: int, rows: numpy.ndarray, content: numpy.ndarray,
                 mask_content: numpy.ndarray | None = None) -> None:
        """Keep the content hashes (n, 16) uint8 of rows (n,) of ``items.listings[listing]`` for later runs. ``mask_content``:
        those of their masks, given where the listing has ``masks``."""
        here, kept = self.items.listings[listing], self.kept[listing]
        for values, hashes in ((here.content, content), (here.mask_content, mask_content)):
            if values is not None and hashes is not None and values.flags.writeable:
                values[rows] = hashes
        if kept is not None:
            kept.remember(rows, content, mask_content)


def scan(specs: Sequence[DatasetSpec], *, index_dir: Callable[[SubsetSpec], Path | None] = lambda subset: None,
         check: Check = "fast") -> Scan:
    """All pictures of all subsets, sorted by name within a subset, so in the same order on every system.

    ``index_dir`` gives the folder to keep a subset's index in, or None. ``check``: "fast" reads what has another size or time
    than at the last look, "full" reads everything and forgets the content hashes, "none" believes the index and looks only at
    what it does not have. Raises nothing for mistakes in the data: they are in the result's ``problems``.
    """
    began = time.time_ns()
    listings: list[Listing] = []
    kept: list[Kept | None] = []
    gathered: list[Problem] = []
    scanned: dict[tuple, tuple[Listing, Kept | None]] = {}
    for subset in (subset for spec in specs for subset in spec.subsets):
        folder = index_dir(subset)
        # The same folder with the same captions may stand in several datasets, one for each resolution.
        key = (_where(subset, None), _how(subset), folder)
        if key not in scanned:
            tally = Tally()
            scanned[key] = _scan_subset(subset, folder, check, began, tally)
            gathered += tally.problems
        listing, index = scanned[key]
        listings.append(listing)
        kept.append(index)
        gathered += _more_lines(listing, subset)
    found = Scan(_items(tuple(specs), tuple(listings)), tuple(gathered), tuple(kept))
    if len(found.items) >= LARGE:
        _give_memory_back()
    return found


def _give_memory_back() -> None:
    """What a large scan used for a while is some hundred bytes for each picture in small pieces, which glibc would keep."""
    with suppress(OSError, AttributeError, TypeError):  # other systems have no such function, and no such habit
        ctypes.CDLL(None).malloc_trim(0)


def _scan_subset(subset: SubsetSpec, folder: Path | None, check: Check, began: int, tally: Tally) -> tuple[Listing, Kept | None]:
    kept = None if folder is None else Kept(folder, _where(subset, folder), _how(subset))
    with _locked(kept, _root(subset)) as obstacle:
        old = None if kept is None else kept.load()
        same_captions = old is not None
        if old is not None and old.sound and check == "none":
            listed = _is_listed(subset)
            found = Found(_root(subset), old.names, None if listed else old.sources, old.captions if listed else None,
                          old.weights, old.masks)
        else:
            found = (find_listed if _is_listed(subset) else find)(subset, tally)
            old = kept.load_other() if old is None and kept is not None else old
        columns, changed = examine(found, old, same_captions, subset, check, began, tally)
        if kept is not None and changed and obstacle is None:
            try:
                columns = kept.save(columns)
            except (OSError, UserError) as error:
                obstacle = str(error)
    if obstacle is not None and changed and kept is not None:
        tally.add(problems.NO_INDEX, kept.folder, UserError(
            f"the index of the pictures cannot be kept in {kept.folder} ({obstacle}): every start looks at them anew",
            place=subset.place, remedy="make the folder writable, or set --cache_dir to another one"))
        kept.detach()
    return Listing(found.root, columns.names, columns.captions, columns.sizes, columns.name_hash, columns.stamps,
                   columns.content, columns.weights, columns.masks, columns.mask_content), kept


def _tell_waiting(pictures: Path, lock: Path, seconds: float) -> None:
    log.info("waiting (for %.0f s now) for another run that is looking at the pictures of %s and holds %s", seconds, pictures,
             lock)


@contextmanager
def _locked(kept: Kept | None, pictures: Path) -> Iterator[str | None]:
    """Holds the lock of an index and gives None, or says why nothing can be written there."""
    if kept is None:
        yield None
        return
    lock, obstacle = FileLock(kept.lock_path, partial(_tell_waiting, pictures, kept.lock_path)), None
    try:
        kept.folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError as error:
        obstacle = error.strerror or str(error)
    try:
        yield obstacle
    finally:
        lock.release()


def _is_listed(subset: SubsetSpec) -> bool:
    return subset.metadata_file is not None or subset.source is not None


def _root(subset: SubsetSpec) -> Path:
    """What the names of a subset's pictures count from."""
    if subset.image_dir is not None:
        return subset.image_dir
    return Path() if subset.metadata_file is None else subset.metadata_file.parent


def _where(subset: SubsetSpec, folder: Path | None) -> str:
    """Stands for the folder of the pictures in the name of an index. An index inside that folder moves with it."""
    root = _root(subset).absolute()
    return _short_hash("." if folder is not None and folder.absolute().parent == root else str(root))


def _how(subset: SubsetSpec) -> str:
    """Stands for the settings that decide which pictures a subset has and what their captions are."""
    joins = _is_listed(subset) or any(suffix.lower().endswith(".json") for suffix in subset.caption_suffixes)
    files = [None if path is None else str(path.absolute()) for path in (subset.metadata_file, subset.mask_dir)]
    return _short_hash([subset.source, *files, subset.recursive, subset.caption_suffixes, subset.class_tokens,
                        subset.captions.separator if joins else None])


def _short_hash(value: object) -> str:
    return blake2b(json.dumps(value).encode("utf-8", "surrogatepass"), digest_size=6).hexdigest()


def _more_lines(listing: Listing, subset: SubsetSpec) -> list[Problem]:
    """One problem for all captions of several lines, where nothing draws one of the lines."""
    if subset.captions.wildcard:
        return []
    rows = _rows_with_newlines(listing.captions)
    if not len(rows):
        return []
    first = listing.root / listing.names[int(rows[0])]
    return [Problem(problems.MORE_LINES, first, UserError(
        f"{len(rows)} captions have several lines, of which only the first is used, as in the dialect; one is that of {first}",
        place=subset.place, remedy="enable_wildcard = true draws one of the lines at each showing"), len(rows))]


def _rows_with_newlines(texts: Strings, piece: int = 1 << 24) -> numpy.ndarray:
    found = [numpy.flatnonzero(texts.blob[start:start + piece] == ord("\n")) + start
             for start in range(0, len(texts.blob), piece)]
    places = numpy.concatenate([numpy.empty(0, dtype=numpy.int64), *found])
    return numpy.unique(numpy.searchsorted(texts.offsets, places, side="right") - 1)


def _items(specs: tuple[DatasetSpec, ...], listings: tuple[Listing, ...]) -> Items:
    """The readable rows of all listings, with their buckets."""
    columns: dict[str, list[numpy.ndarray]] = {"listing": [], "row": [], "repeats": [], "group": []}
    groups: list[tuple[int, Size]] = []
    number = 0
    for dataset, spec in enumerate(specs):
        sizes = []
        for subset in spec.subsets:
            rows = numpy.flatnonzero(listings[number].sizes[:, 0] > 0).astype(numpy.int32)
            sizes.append(listings[number].sizes[rows])
            columns["listing"].append(numpy.full(len(rows), number, dtype=numpy.uint16))
            columns["row"].append(rows)
            columns["repeats"].append(numpy.full(len(rows), subset.num_repeats, dtype=numpy.int32))
            number += 1
        index, buckets = assign(numpy.concatenate(sizes), spec.rule)
        columns["group"].append(index + numpy.int32(len(groups)))
        groups += [(dataset, bucket) for bucket in buckets]
    return Items(specs, listings, **{name: numpy.concatenate(parts) for name, parts in columns.items()}, groups=tuple(groups))

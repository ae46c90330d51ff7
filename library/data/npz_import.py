"""Latents that another trainer cached beside the pictures (one ``.npz`` for each) become records of our own store.

What such a file says is checked: the size of the picture, the shape of the latents, the crop, finite numbers; and it must be
younger than its picture. What it does not say is taken on trust, because whoever imports asked for it: that the same
autoencoder made it. Its latents are one random sample of the autoencoder's distribution, where we keep the mean, and its
pictures were scaled by other filters and, where they are transparent, not laid on white.
"""

from __future__ import annotations

import io
import os
import zipfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy
import torch
from PIL import Image

from library.data.augment import plain_view
from library.data.filling import mask_to_bytes
from library.data.header import orientation
from library.data.image import load_view, mask_to_cells
from library.data.items import Item, Items
from library.data.keys import UNKNOWN, LatentKeys, as_keys, content_hash
from library.errors import UserError

if TYPE_CHECKING:
    from library.data.bucket import Size
    from library.data.store import Store

THREADS, AHEAD = 4, 64


class NpzFacts(Protocol):
    """What an architecture says of such files: its ``NpzLayout`` (nothing here knows architectures)."""

    @property
    def files(self) -> tuple[str, ...]: ...

    @property
    def sized_keys(self) -> bool: ...

    @property
    def shift(self) -> float: ...

    @property
    def scale(self) -> float: ...


class Unfit(ValueError):
    """Why a file cannot be used."""


@dataclass
class Imported:
    """``unfit``: (file, why it was not used)."""

    records: int = 0
    known: int = 0
    without: int = 0  # pictures that have no such file
    unfit: list[tuple[Path, str]] = field(default_factory=list)


def read(path: Path, layout: NpzFacts, size: Size, bucket: Size, cells: tuple[int, int, int]
         ) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Latents (C, h, w) float16 of the picture as it is, and flipped where the file has them.

    ``size``: (width, height) of the picture; ``bucket``: of the crop in pixels; ``cells``: (C, h, w). Raises Unfit.
    """
    suffix = f"_{cells[1]}x{cells[2]}" if layout.sized_keys else ""
    try:
        with numpy.load(path, allow_pickle=False) as file:
            arrays = {name: file[name + suffix] for name in ("latents", "latents_flipped", "original_size", "crop_ltrb")
                      if name + suffix in file.files}
            present = [name for name in file.files if name.startswith("latents")]
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise Unfit(f"it cannot be read ({error})") from None
    if "latents" not in arrays:
        raise Unfit(f"it has no latents of {cells[2]}x{cells[1]} cells (width x height), only {', '.join(present) or 'none'}")
    if "original_size" in arrays and arrays["original_size"].tolist() != list(size):
        width, height = arrays["original_size"].tolist()
        raise Unfit(f"it was made of a picture of {width}x{height}, and this one has {size[0]}x{size[1]}")
    if "crop_ltrb" in arrays and not _same_crop(arrays["crop_ltrb"], size, bucket):
        raise Unfit(f"it was cropped to another shape than {bucket[0]}x{bucket[1]}")
    return _half(arrays["latents"], layout, cells), (
        _half(arrays["latents_flipped"], layout, cells) if "latents_flipped" in arrays else None)


def _half(array: numpy.ndarray, layout: NpzFacts, cells: tuple[int, int, int]) -> torch.Tensor:
    if array.shape != cells or array.dtype.kind != "f":
        raise Unfit(f"its latents are {array.shape} {array.dtype}, expected {cells} floating point")
    half = ((torch.from_numpy(array).float() - layout.shift) * layout.scale).half()
    if not half.isfinite().all():
        raise Unfit("its latents are not finite in half precision")
    return half


def _same_crop(crop: numpy.ndarray, size: Size, bucket: Size) -> bool:
    """The trainer writes where the whole picture lies when it is fitted *into* the bucket; so the numbers name the bucket."""
    scale = min(bucket[0] / size[0], bucket[1] / size[1])
    fitted = [size[0] * scale, size[1] * scale]
    left, top = (bucket[0] - fitted[0]) // 2, (bucket[1] - fitted[1]) // 2
    return crop.shape == (4,) and bool(numpy.abs(crop - [left, top, left + fitted[0], top + fitted[1]]).max() <= 1.5)


def import_latents(items: Items, store: Store, folders: numpy.ndarray, identity: str, layout: NpzFacts,
                   channels: int, factor: int, ignore_dates: bool = False) -> Imported:
    """Add the latents of ``items`` that lie beside them to ``store`` under the keys that a run will look for.

    ``folders``: the folder of the store for each listing; ``identity``: of the autoencoder that the run will use; ``channels``
    and ``factor``: of the latents. What is in the store already stays. Pictures that cannot be read raise UserError.
    """
    reader = _Reader(items, store, LatentKeys(items, identity), layout, channels, factor, ignore_dates)
    result = Imported()
    wanted = [(row, path) for row, path in _files_of(items, layout) if path is not None]
    result.without = len(items) - len(wanted)
    shared = {path for path, count in _pictures_of(items, wanted).items() if count > 1}
    for number in numpy.unique(folders):
        mine = [(row, path) for row, path in wanted if folders[items.listing[row]] == number]
        with store.writer(int(number)) as writer, ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as pool:
            for start in range(0, len(mine), AHEAD):
                batch = [(row, path) for row, path in mine[start:start + AHEAD] if path not in shared]
                for (_, path), found in zip(batch, pool.map(reader.records, *zip(*batch)) if batch else (), strict=True):
                    if isinstance(found, Unfit):
                        result.unfit.append((path, str(found)))
                        continue
                    result.known += not found
                    for key, tensors in found:
                        writer.put(key, tensors)
                        result.records += 1
    result.unfit += [(path, "several pictures differ only in their extension, and it does not say which one it was made of")
                     for path in sorted(shared)]
    store.refresh()
    return result


def _files_of(items: Items, layout: NpzFacts) -> Iterator[tuple[int, Path | None]]:
    """Each row with the file beside its picture, or None."""
    for row, (width, height) in enumerate(items.sizes.tolist()):
        picture = items.path(row)
        names = [pattern.format(stem=picture.stem, width=width, height=height) for pattern in layout.files]
        yield row, next((path for name in names if (path := picture.with_name(name)).exists()), None)


def _pictures_of(items: Items, wanted: list[tuple[int, Path]]) -> Counter[Path]:
    """How many different pictures each file stands beside: ``a.png`` and ``a.jpg`` would share one."""
    return Counter(path for path, _ in {(path, items.path(row)) for row, path in wanted})


class _Reader:
    """What the threads do."""

    def __init__(self, items: Items, store: Store, keys: LatentKeys, layout: NpzFacts, channels: int, factor: int,
                 ignore_dates: bool):
        self.items, self.store, self.keys, self.layout = items, store, keys, layout
        self.channels, self.factor, self.ignore_dates = channels, factor, ignore_dates

    def records(self, row: int, path: Path) -> list[tuple[bytes, dict[str, torch.Tensor]]] | Unfit:
        """The records that the store lacks: one, two with a flipped one, or none."""
        item = self.items[row]
        try:
            data, mask_data, keys = self._keys(row, item)
            missing = [flip for flip, found in enumerate(self.store.find(as_keys(b"".join(keys)))) if found < 0]
            if not missing:
                return []
            if not self.ignore_dates and path.stat().st_mtime_ns < item.path.stat().st_mtime_ns:
                raise Unfit("it is older than its picture (--ignore_dates imports it all the same)")
            with Image.open(io.BytesIO(data)) as picture:
                if orientation(picture) != 1:
                    raise Unfit("its picture is turned by EXIF data, which the other trainer does not look at")
            width, height = item.placement.bucket
            cells = (self.channels, height // self.factor, width // self.factor)
            versions = read(path, self.layout, item.size, item.placement.bucket, cells)
            if missing == [1] and versions[1] is None:
                return []
            mask = self._mask(item, data, mask_data, cells)
            return [(keys[flip], self._record(versions[flip], mask, bool(flip))) for flip in missing
                    if versions[flip] is not None]
        except Unfit as error:
            return error

    def _keys(self, row: int, item: Item) -> tuple[bytes, bytes | None, list[bytes]]:
        try:
            data = item.path.read_bytes()
            mask_data = item.mask.read_bytes() if isinstance(item.mask, Path) else None
        except OSError as error:
            raise UserError(f"the picture or its mask cannot be read: {error.strerror or error}", place=str(item.path)) from None
        content, mask_content = content_hash(data), UNKNOWN if mask_data is None else content_hash(mask_data)
        flips = (False, True) if item.subset.augment.flip else (False,)
        return data, mask_data, [self.keys.of(row, flip, content, mask_content) for flip in flips]

    def _mask(self, item: Item, data: bytes, mask_data: bytes | None, cells: tuple[int, int, int]) -> torch.Tensor | None:
        """(h, w) uint8, of the picture and not of the file: it is then the one that a run would make."""
        if item.mask is None:
            return None
        _, mask = load_view(data, plain_view(item), str(item.path), "alpha" if mask_data is None else mask_data)
        return mask_to_bytes(mask_to_cells(mask[None], *cells[1:]))[0, 0]

    @staticmethod
    def _record(latents: torch.Tensor, mask: torch.Tensor | None, flip: bool) -> dict[str, torch.Tensor]:
        if mask is None:
            return {"latents": latents}
        return {"latents": latents, "mask": mask.flip(-1) if flip else mask}

"""PyTorch's ``.ckpt`` and ``.bin`` files written tensor by tensor: a zip archive with a pickle of names and one entry per tensor.

``torch.save`` needs every tensor in memory in its final format at once, which for a model in training is a second copy. Here
one chunk is. The pickle calls nothing but what rebuilds tensors, so ``torch.load(weights_only=True)`` reads the file.
Layout: https://docs.pytorch.org/docs/stable/notes/serialization.html (`data.pkl`, `byteorder`, `data/<number>`, `version`).
"""

from __future__ import annotations

import io
import math
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from library.atomic import atomic_file
from library.checkpoint.dtypes import TORCH_DTYPES
from library.checkpoint.export import Entry
from library.checkpoint.writer import CHUNK_ELEMENTS, require_room, stored_bytes
from library.errors import UserError

_ROOT = "archive"  # every name in the file begins with it, as in what torch.save writes to a stream
_STORAGES = {"F64": torch.DoubleStorage, "F32": torch.FloatStorage, "F16": torch.HalfStorage, "BF16": torch.BFloat16Storage,
             "I64": torch.LongStorage, "I32": torch.IntStorage, "I16": torch.ShortStorage, "I8": torch.CharStorage,
             "U8": torch.ByteStorage, "BOOL": torch.BoolStorage}
_ALIGNMENT = 64  # of each tensor's bytes, as PyTorch's writer has it
_LOCAL_HEADER, _EXTRA_HEADER = 30, 4  # bytes in the zip format before a name, and before the padding in an extra field


@dataclass(frozen=True)
class _Storage:
    """Stands for a tensor's data in the pickle, which refers to it by number."""

    number: int
    entry: Entry


class _Tensor:
    """Pickles as the call that rebuilds the tensor ``entry`` from its storage."""

    def __init__(self, number: int, entry: Entry):
        self.number, self.entry = number, entry

    def __reduce__(self) -> tuple[Any, ...]:
        shape = tuple(self.entry.shape)
        strides = tuple(math.prod(shape[axis + 1:]) for axis in range(len(shape)))
        storage = _Storage(self.number, self.entry)
        return torch._utils._rebuild_tensor_v2, (storage, 0, shape, strides, False, OrderedDict())


class _Pickler(pickle.Pickler):
    def persistent_id(self, obj: Any) -> tuple[Any, ...] | None:
        if not isinstance(obj, _Storage):
            return None
        return "storage", _STORAGES[obj.entry.dtype], str(obj.number), "cpu", math.prod(obj.entry.shape)


def write_pickle(path: Path, entries: Iterable[Entry], get: Callable[[str], torch.Tensor], *,
                 key: str | None = "state_dict") -> int:
    """Write ``entries``, each tensor taken from ``get(name)`` when its turn comes; returns the file's size.

    They stand under ``key`` as in a ``.ckpt``; None: at the top, as in a ``.bin``. The file appears whole or not at all.
    UserError: as ``write_safetensors``; also for formats that such a file cannot hold.
    """
    path, entries = Path(path), list(entries)
    odd = next((entry for entry in entries if entry.dtype not in _STORAGES), None)
    if odd is not None:
        raise UserError(f"not saved: {odd.name!r} is {odd.dtype}, which this kind of file cannot hold", place=str(path),
                        remedy="use --save_model_as safetensors, or set save_precision")
    require_room(path, archive_bytes(entries))
    content: Any = {entry.name: _Tensor(number, entry) for number, entry in enumerate(entries)}
    text = io.BytesIO()
    _Pickler(text, protocol=2).dump(content if key is None else {key: content})
    with atomic_file(path) as file:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            archive.writestr(_name("data.pkl"), text.getvalue())
            archive.writestr(_name("byteorder"), "little")
            for number, entry in enumerate(entries):
                _write_tensor(archive, number, entry, get, path)
            archive.writestr(_name("version"), "3\n")
        size = file.seek(0, io.SEEK_END)
    return size


def archive_bytes(entries: Iterable[Entry]) -> int:
    """About how large a file of ``entries`` is: their data, and their names three times."""
    return sum(math.prod(entry.shape) * TORCH_DTYPES[entry.dtype].itemsize + 512 + 3 * len(entry.name) for entry in entries)


def _name(name: str) -> zipfile.ZipInfo:
    """An entry without a date, so that the same weights give the same file."""
    return zipfile.ZipInfo(f"{_ROOT}/{name}")


def _write_tensor(archive: zipfile.ZipFile, number: int, entry: Entry, get: Callable[[str], torch.Tensor],
                  path: Path) -> None:
    tensor = get(entry.name)
    assert tuple(tensor.shape) == tuple(entry.shape), f"{entry.name}: {tuple(tensor.shape)}, announced {entry.shape}"
    flat = tensor.detach().reshape(-1)
    info = _name(f"data/{number}")
    info.file_size = flat.numel() * TORCH_DTYPES[entry.dtype].itemsize  # a large one makes zipfile use 64-bit fields
    start = archive.fp.tell() + _LOCAL_HEADER + len(info.filename) + _EXTRA_HEADER
    if info.file_size < zipfile.ZIP64_LIMIT // 2:  # larger ones get a field of zipfile's own there
        padding = -start % _ALIGNMENT
        info.extra = b"FB" + padding.to_bytes(2, "little") + b"Z" * padding
    with archive.open(info, "w") as out:
        for begin in range(0, flat.numel(), CHUNK_ELEMENTS):
            out.write(stored_bytes(flat[begin:begin + CHUNK_ELEMENTS], entry, path))

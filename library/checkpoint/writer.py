"""Safetensors files written tensor by tensor: never more than one tensor and one chunk of it in memory beside the model."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import torch

from library.atomic import atomic_file
from library.checkpoint.dtypes import FLOAT8, TORCH_DTYPES
from library.checkpoint.export import Entry
from library.checkpoint.header import DTYPE_BYTES
from library.errors import NoRoom, UserError

CHUNK_ELEMENTS = 4 << 20


DIGEST = "0" * 64  # as a value of metadata: stands for the digits of the sha256 of all tensor data
_HASH_PLACEHOLDER = "0x" + DIGEST


class Checksum(Protocol):
    """As the objects of hashlib and xxhash are."""

    def update(self, data: bytes | memoryview, /) -> None: ...


def write_safetensors(path: Path, entries: Iterable[Entry | tuple[str, tuple[int, ...], str]], get: Callable[[str], torch.Tensor],
                      metadata: Mapping[str, str] | None = None, *, add_hash_key: str | None = None,
                      on_progress: Callable[[int, int], None] | None = None, checksum: Checksum | None = None) -> int:
    """Write ``entries`` (name, shape, dtype), each tensor taken from ``get(name)`` when its turn comes; returns the file's size.

    Tensors stand in the order given, wider formats before narrower ones so that each is aligned. ``add_hash_key``: metadata
    key for the sha256 of all tensor data, as ``0x`` and 64 digits (modelspec.hash_sha256); a value of ``metadata`` that is
    ``DIGEST`` becomes the bare digits. The file appears whole or not at all. UserError: not enough room on the disk (told before
    anything is written), a value that is not finite or does not fit the format (with the tensor's name), no right to write.
    ``on_progress(done_bytes, total_bytes)`` counts tensor data.
    ``checksum`` is shown every byte of the file, so it cannot be had together with ``add_hash_key`` or
    ``DIGEST``, which change some later.
    """
    assert checksum is None or add_hash_key is None
    path = Path(path)
    entries = sorted((Entry(*entry) for entry in entries), key=lambda entry: -DTYPE_BYTES[entry.dtype])
    assert len({entry.name for entry in entries}) == len(entries), "a name is written twice"
    header, data_bytes = _header(entries, {**(metadata or {}), **({add_hash_key: _HASH_PLACEHOLDER} if add_hash_key else {})})
    require_room(path, len(header) + data_bytes)
    blanks = {_value_position(header, add_hash_key, _HASH_PLACEHOLDER): "0x"} if add_hash_key else {}
    blanks |= {_value_position(header, key, DIGEST): "" for key, value in (metadata or {}).items() if value == DIGEST}
    digest, done = hashlib.sha256(), 0
    # hashing and writing both let go of the interpreter lock, so the hash costs no time beside the disk
    with atomic_file(path) as file, ThreadPoolExecutor(max_workers=1) as hasher:
        file.write(header)
        if checksum is not None:
            checksum.update(header)
        hashed: Future | None = None
        for entry in entries:
            tensor = get(entry.name)
            assert tuple(tensor.shape) == tuple(entry.shape), f"{entry.name}: {tuple(tensor.shape)}, announced {entry.shape}"
            flat = tensor.detach().reshape(-1)
            for start in range(0, flat.numel(), CHUNK_ELEMENTS):
                data = stored_bytes(flat[start:start + CHUNK_ELEMENTS], entry, path)
                if hashed is not None:
                    hashed.result()  # one chunk at a time, in order
                hashed = hasher.submit(digest.update, data) if blanks else None
                if checksum is not None:
                    checksum.update(data)
                file.write(data)
                done += len(data)
                if on_progress is not None:
                    on_progress(done, data_bytes)
        if hashed is not None:
            hashed.result()
        assert done == data_bytes
        for position, prefix in blanks.items():
            file.seek(position)
            file.write(f"{prefix}{digest.hexdigest()}".encode())
    return len(header) + data_bytes


def _header(entries: list[Entry], metadata: Mapping[str, str]) -> tuple[bytes, int]:
    """The length and JSON that open the file, padded with blanks so that the data begins at a multiple of 8; bytes of data."""
    assert all(isinstance(text, str) for item in metadata.items() for text in item), "metadata are strings"
    fields: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for entry in entries:
        start, end = end, end + math.prod(entry.shape) * DTYPE_BYTES[entry.dtype]
        fields[entry.name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [start, end]}
    text = _json(fields).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, end


def file_bytes(entries: Iterable[Entry]) -> int:
    """Size of a file of these tensors, but for its metadata."""
    header, data_bytes = _header(list(entries), {})
    return len(header) + data_bytes


def _json(value: object) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


def _value_position(header: bytes, key: str, value: str) -> int:
    """Where the first character of ``value`` stands. Quotes inside other strings are escaped, so this text occurs once."""
    text = f"{_json(key)}:{_json(value)}".encode()
    assert header.count(text) == 1
    return header.index(text) + len(text) - len(value) - 1


def stored_bytes(values: torch.Tensor, entry: Entry, path: Path) -> memoryview:
    """The stored form of ``values`` (n,), checked. Reads from an accelerator wait here for what was queued (a sync point)."""
    wanted = TORCH_DTYPES[entry.dtype]
    stored = values.to(wanted)
    # some versions of torch saturate when they cast to fp8, others make it NaN
    clipped = wanted in FLOAT8 and values.numel() > 0 and float(values.float().abs().max()) > torch.finfo(wanted).max
    if wanted.is_floating_point and (clipped or not _finite(stored)):
        if not _finite(values):
            count = int((~torch.isfinite(values.float())).sum())
            raise UserError(f"not saved: {entry.name!r} holds values that are not finite ({count} or more)", place=str(path),
                            remedy="the training has diverged; start again from the last good file with a lower learning_rate")
        largest = float(values.float().abs().max())
        raise UserError(f"not saved: {entry.name!r} has a value of size {largest:g}, beyond {entry.dtype}", place=str(path),
                        remedy="set save_precision to bf16 or float")
    return memoryview(stored.cpu().contiguous().view(torch.uint8).numpy())


def _finite(values: torch.Tensor) -> bool:
    values = values if values.element_size() > 1 else values.float()  # fp8 knows neither sum nor isfinite
    wide = torch.float64 if values.dtype == torch.float64 else torch.float32
    # A finite sum has finite terms, and costs a tenth of isfinite. The sum of finite terms may still overflow: then look at each.
    return bool(values.sum(dtype=wide).isfinite()) or bool(torch.isfinite(values).all())


def require_room(path: Path, needed: int) -> None:
    """NoRoom when the disk of ``path`` has less than ``needed`` bytes free. The folder need not exist yet."""
    free = free_bytes(path)
    if free is not None and free < needed:
        raise NoRoom(f"not enough space on the disk: {path.name} needs {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free",
                     place=str(path), remedy="free some space or choose another folder; nothing was written")


def free_bytes(path: Path) -> int | None:
    """What the disk of ``path`` has left; None where the system does not tell. The folder need not exist yet."""
    folder = path.parent
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return None  # some network file systems do not tell; a full disk is then found while writing

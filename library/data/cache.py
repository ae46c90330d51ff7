"""Encoded pictures and captions, kept under a key of everything that decides their value.

One value is one safetensors file ``<folder>/<first two letters>/<key>.safetensors``, written aside and renamed, with a
checksum of its data: a reader sees a whole value or none, whoever is killed or writes at the same time. A changed
picture, caption, encoder or setting has another key, so it is encoded anew and nothing else is.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from library.atomic import write_atomic
from library.data.bucket import Placement
from library.errors import UserError
from library.log import log

if TYPE_CHECKING:
    from library.data.scan import Item

VERSION = 1  # raise it when the way pictures are decoded, scaled or stored changes
FOLDER = ".kiln_cache"
_NO_CHECKSUM = "00000000"


class Cache:
    """Named tensors by key: in memory with ``directory`` None, else in files."""

    def __init__(self, directory: Path | None):
        self.directory = directory
        self._memory: dict[str, dict[str, torch.Tensor]] = {}

    def get(self, key: str) -> dict[str, torch.Tensor] | None:
        """The value, or None when there is none; a damaged file counts as none and is named in a warning."""
        if self.directory is None:
            return self._memory.get(key)
        path = self.path(key)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise UserError(f"the cache file cannot be read: {error.strerror or error}", place=str(path),
                            remedy="change its permissions or choose another --cache_dir") from None
        try:
            return _unpack(data)
        except (ValueError, KeyError, TypeError, SafetensorError) as error:
            log.warning("%s is damaged (%s); it will be made again", path, error)
            return None

    def put(self, key: str, tensors: dict[str, torch.Tensor]) -> None:
        """Store CPU tensors; the last of several writers wins. Raises UserError when the folder cannot be written."""
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        if self.directory is None:
            self._memory[key] = tensors
            return
        path = self.path(key)
        try:
            write_atomic(path, _pack(tensors))
        except UserError as error:
            if path.exists() and self.get(key) is not None:
                return  # Windows does not replace a file that another process has open; what stands there is as good
            raise UserError(error.message, place=error.place, remedy=f"{error.remedy} (--cache_dir)") from None
        except OSError as error:
            raise UserError(f"the cache cannot be written: {error.strerror or error}", place=str(path),
                            remedy="choose another --cache_dir") from None

    def path(self, key: str) -> Path:
        """The file of ``key`` (disk caches only)."""
        assert self.directory is not None
        return self.directory / key[:2] / f"{key}.safetensors"


@dataclass(frozen=True)
class Stored:
    """Where one encoded value lies."""

    cache: Cache = field(repr=False)
    key: str
    of: str  # the picture's path or the caption, for messages

    def read(self) -> dict[str, torch.Tensor]:
        """The tensors. Raises UserError when the file went away or was damaged after the start."""
        value = self.cache.get(self.key)
        if value is None:
            raise UserError(f"the cached value of {self.of!r} is gone or damaged", place=str(self.cache.path(self.key)),
                            remedy="start again: it will be encoded anew")
        return value


def opener(cache_dir: Path | None, to_disk: bool) -> Callable[[Item], Cache]:
    """Chooses each item's cache: memory, the folder given, or ``.kiln_cache`` beside the picture."""
    opened: dict[Path | None, Cache] = {}

    def cache_for(item: Item) -> Cache:
        directory = None if not to_disk else Path(cache_dir) if cache_dir is not None else item.path.parent / FOLDER
        return opened.setdefault(directory, Cache(directory))  # in one go: several threads ask
    return cache_for


def content_hash(data: bytes) -> str:
    """Of a picture file's bytes."""
    return blake2b(data, digest_size=16).hexdigest()


def latent_key(picture_hash: str, identity: str, placement: Placement) -> str:
    """``identity`` names the encoder's weights, arithmetic and scaling."""
    return _key("latent", picture_hash, identity, placement.bucket, placement.resized, placement.crop)


def text_key(caption: str, identity: str) -> str:
    """``identity`` names the encoders' weights, tokenizers and settings."""
    return _key("text", caption, identity)


def _key(*parts: object) -> str:
    return blake2b(json.dumps([VERSION, *parts]).encode(), digest_size=20).hexdigest()


def _pack(tensors: dict[str, torch.Tensor]) -> bytes:
    # A bytearray view would save a copy; values are a few megabytes.
    data = save(tensors, metadata={"crc32": _NO_CHECKSUM})
    checksum = f"{zlib.crc32(_body(data)):08x}"
    return data.replace(f'"crc32":"{_NO_CHECKSUM}"'.encode(), f'"crc32":"{checksum}"'.encode(), 1)


def _unpack(data: bytes) -> dict[str, torch.Tensor]:
    body = _body(data)
    expected = json.loads(data[8:len(data) - len(body)])["__metadata__"]["crc32"]
    if f"{zlib.crc32(body):08x}" != expected:
        raise ValueError("its checksum does not match")
    return load(data)


def _body(data: bytes) -> memoryview:
    """What follows the header of a safetensors file: 8 bytes of length, then JSON."""
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > len(data) - 8:
        raise ValueError("it is cut off")
    return memoryview(data)[8 + length:]

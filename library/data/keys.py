"""Names of encoded values: 16-byte hashes of everything that decides a value, and the folders in which values are kept.

A changed picture, mask, caption, encoder or setting has another key, so it is encoded anew and nothing else is; a picture that
was renamed or copied keeps its key. No torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from hashlib import blake2b
from pathlib import Path

import numpy

from library.data.items import Items

VERSION = 2  # raise it when the way pictures are decoded, scaled or stored changes
FOLDER = ".kiln_cache"
KEY_BYTES = 16  # of a content hash and of a key
UNKNOWN = bytes(KEY_BYTES)  # the content hash of a file that nobody has read yet


def folder_of(root: Path, cache_dir: Path | None) -> Path:
    """Where the caches of pictures under ``root`` lie."""
    return Path(cache_dir) if cache_dir is not None else Path(root) / FOLDER


def cache_folders(items: Items, cache_dir: Path | None) -> tuple[tuple[Path, ...], numpy.ndarray]:
    """The distinct cache folders, and for each of the items' listings which of them is its own (int64)."""
    folders = [folder_of(listing.root, cache_dir) for listing in items.listings]
    distinct = tuple(dict.fromkeys(folders))
    return distinct, numpy.array([distinct.index(folder) for folder in folders], dtype=numpy.int64)


def content_hash(data: bytes) -> bytes:
    """16 bytes that stand for a file's content."""
    return blake2b(data, digest_size=KEY_BYTES).digest()


class LatentKeys:
    """The keys of the latents of the middle crops of ``items``. ``identity`` names the autoencoder's weights, arithmetic and
    scaling. Hashes of contents are those of ``content_hash``: of the picture file, and of the mask file where there is one
    (else ``UNKNOWN``; a mask in the picture's own transparency needs no hash)."""

    def __init__(self, items: Items, identity: str):
        self.kinds, columns = _kinds_of_crop(items)
        subsets = [items.subsets[int(listing)] for listing, *_ in columns]
        self._prefixes = [[_hasher("latents", identity, flip, subset.mask == "alpha", subset.interpolation, *place)
                           for subset, (_, *place) in zip(subsets, columns, strict=True)] for flip in (False, True)]

    def of(self, row: int, flip: bool, content: bytes, mask_content: bytes = UNKNOWN) -> bytes:
        """The key of one row of the items."""
        hasher = self._prefixes[flip][self.kinds[row]].copy()
        hasher.update(content if mask_content == UNKNOWN else content + mask_content)
        return hasher.digest()

    def of_many(self, rows: numpy.ndarray, flip: bool, content: numpy.ndarray, mask_content: numpy.ndarray) -> numpy.ndarray:
        """(n, 16) uint8 for ``rows`` (n,) of the items; the hashes (n, 16) uint8 are aligned with ``rows``."""
        ours, masks, keys = _split(content), _split(mask_content), bytearray()
        for row, one, mask in zip(rows.tolist(), ours, masks, strict=True):
            keys += self.of(row, flip, one, mask)
        return as_keys(keys)


def text_keys(texts: Iterable[str], identity: str, trim: Mapping[str, str]) -> numpy.ndarray:
    """(M, 16) uint8. ``identity`` names the encoders' weights, tokenizers and settings; ``trim``: see ``fill_text``."""
    prefix, keys = _hasher("text", identity, sorted(trim.items())), bytearray()
    for text in texts:
        hasher = prefix.copy()
        hasher.update(text.encode("utf-8", "surrogatepass"))
        keys += hasher.digest()
    return as_keys(keys)


def as_keys(data: bytes | bytearray) -> numpy.ndarray:
    """Hashes end to end -> (N, 16) uint8."""
    return numpy.frombuffer(bytes(data), dtype=numpy.uint8).reshape(-1, KEY_BYTES)


def _split(hashes: numpy.ndarray) -> list[bytes]:
    data = numpy.ascontiguousarray(hashes).tobytes()
    return [data[start:start + KEY_BYTES] for start in range(0, len(data), KEY_BYTES)]


def _hasher(*parts: object):
    return blake2b(json.dumps([VERSION, *parts]).encode() + b"\0", digest_size=KEY_BYTES)


def _kinds_of_crop(items: Items) -> tuple[numpy.ndarray, list[tuple]]:
    """Which of few kinds each item is, and each kind's (listing, bucket, resized, crop). A set of a million pictures has some
    thousand kinds, so that only a hash of the content is left to do for each picture."""
    buckets, scaled = items.buckets, items.resized
    where = _pair(items.listing, items.group)
    code = _pair(_numbered(where), _numbered(_pair(scaled[:, 0], scaled[:, 1])))
    _, first, kinds = numpy.unique(code, return_index=True, return_inverse=True)
    columns = []
    for index in first.tolist():
        bucket, size = tuple(buckets[index].tolist()), tuple(scaled[index].tolist())
        crop = ((size[0] - bucket[0]) // 2, (size[1] - bucket[1]) // 2)
        columns.append((items.listing[index], bucket, size, crop))
    return kinds.reshape(-1), columns


def _pair(high: numpy.ndarray, low: numpy.ndarray) -> numpy.ndarray:
    return high.astype(numpy.int64) << 32 | low.astype(numpy.int64)


def _numbered(codes: numpy.ndarray) -> numpy.ndarray:
    return numpy.unique(codes, return_inverse=True)[1].reshape(-1)

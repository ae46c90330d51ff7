"""Fills the caches: encodes what has no value yet, each distinct picture and caption once, and nothing else."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch

from library.data.cache import Cache, Stored, content_hash, latent_key, text_key
from library.data.image import load_bytes, to_signal
from library.errors import UserError, raise_all

if TYPE_CHECKING:
    from library.data.scan import Item

Progress = Callable[[int, int], None]  # (done, total) of what has to be encoded
T, R = TypeVar("T"), TypeVar("R")
SHOWN = 5


def fill_latents(items: Sequence[Item], cache_for: Callable[[Item], Cache], encode: Callable[[torch.Tensor], torch.Tensor],
                 identity: str, batch_size: int, progress: Progress | None = None) -> tuple[Stored, ...]:
    """Where each item's ``{"latents": (C, h, w) float16}`` lies, in the order of ``items``.

    ``encode``: (B, 3, H, W) float32 in [-1, 1] on the CPU -> (B, C, h, w). A batch has pictures of one size. Raises
    UserErrors for pictures that cannot be decoded (after all the others are done) and UserError naming the picture when
    the encoder's answer is not finite in half precision.
    """
    def locate(item: Item) -> Stored:
        return Stored(cache_for(item), latent_key(content_hash(_read(item.path)), identity, item.placement), str(item.path))

    def decode(pair: tuple[Item, Stored]) -> torch.Tensor | UserError:
        item, stored = pair
        try:
            data = _read(item.path)
            if latent_key(content_hash(data), identity, item.placement) != stored.key:
                raise UserError("the picture changed while it was being encoded", place=str(item.path), remedy="start again")
            return load_bytes(data, item.placement, str(item.path))
        except UserError as error:
            return error

    with ThreadPoolExecutor(max(1, min(4, os.cpu_count() or 1))) as pool:  # Pillow and hashing let go of the GIL
        stored = tuple(_ahead(pool, locate, items))
        missing = list(_missing(zip(items, stored, strict=True)))
        missing.sort(key=lambda pair: pair[0].placement.bucket)  # stable: batches of one size, otherwise in order
        errors: list[UserError] = []
        done, batch = 0, []
        for index, (pair, pixels) in enumerate(zip(missing, _ahead(pool, decode, missing), strict=True)):
            if isinstance(pixels, UserError):
                errors.append(pixels)
            else:
                batch.append((pair[1], pixels))
            last = index + 1 == len(missing) or missing[index + 1][0].placement.bucket != pair[0].placement.bucket
            if batch and (last or len(batch) == batch_size):
                with torch.no_grad():
                    latents = encode(to_signal(torch.stack([pixels for _, pixels in batch])))
                assert len(latents) == len(batch), "encode must keep the batch"
                for (place, _), one in zip(batch, latents, strict=True):
                    place.cache.put(place.key, {"latents": _half(one, f"the latents of this picture ({place.of})")})
                done, batch = done + len(batch), []
                if progress:
                    progress(done, len(missing))
    if len(errors) > SHOWN:
        errors = [*errors[:SHOWN], UserError(f"{len(errors) - SHOWN} more: pictures that cannot be decoded")]
    raise_all(errors)
    return stored


def fill_text(items: Iterable[Item], cache_for: Callable[[Item], Cache], encode: Callable[[list[str]], dict[str, torch.Tensor]],
              identity: str, batch_size: int, progress: Progress | None = None) -> dict[str, Stored]:
    """Where each distinct caption's named tensors lie; floats in half precision, masks and numbers as they are.

    ``encode``: captions -> named tensors (B, ...). A caption is kept in the cache of the first item that has it.
    """
    stored: dict[str, Stored] = {}
    for item in items:
        if item.caption not in stored:
            stored[item.caption] = Stored(cache_for(item), text_key(item.caption, identity), item.caption)
    missing = [caption for caption, _ in _missing(stored.items())]
    for start in range(0, len(missing), batch_size):
        captions = missing[start:start + batch_size]
        with torch.no_grad():
            encoded = {name: tensor.cpu() for name, tensor in encode(captions).items()}
        assert all(len(tensor) == len(captions) for tensor in encoded.values()), "encode must keep the batch"
        for index, caption in enumerate(captions):
            # clone: a view would keep, and store, the whole batch
            value = {name: _half(tensor[index], f"{name} of the caption {caption!r}") if tensor.is_floating_point()
                     else tensor[index].clone() for name, tensor in encoded.items()}
            stored[caption].cache.put(stored[caption].key, value)
        if progress:
            progress(start + len(captions), len(missing))
    return stored


def _missing(pairs: Iterable[tuple[T, Stored]]) -> Iterator[tuple[T, Stored]]:
    """The pairs without a valid value, each place once."""
    seen = set()
    for what, stored in pairs:
        place = (id(stored.cache), stored.key)
        if place not in seen and stored.cache.get(stored.key) is None:
            yield what, stored
        seen.add(place)


def _half(tensor: torch.Tensor, what: str) -> torch.Tensor:
    half = tensor.to("cpu", torch.float16, copy=True)
    if not torch.isfinite(half).all():
        finite = bool(torch.isfinite(tensor).all())
        reason = "exceed the range of half precision" if finite else "contain NaN or infinity"
        raise UserError(f"{what} {reason}",
                        remedy="remove or replace it; if it happens to all, encode in float32 (--mixed_precision no)")
    return half


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"the picture cannot be read: {error.strerror or error}", place=str(path),
                        remedy="put it back, or start again without it") from None


def _ahead(pool: ThreadPoolExecutor, work: Callable[[T], R], inputs: Sequence[T], ahead: int = 16) -> Iterator[R]:
    """``map`` in order that holds at most ``ahead`` results, so that decoded pictures do not pile up."""
    waiting = iter(inputs)
    futures = [pool.submit(work, one) for one in islice(waiting, ahead)]
    while futures:
        yield futures.pop(0).result()
        futures += [pool.submit(work, one) for one in islice(waiting, 1)]

"""Fills the cache of text: encodes the texts that have no value yet, each once, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy
import torch

from library.data.filling import FolderWriter, Progress, Ranks, fill_rounds, leaving, require_finite, require_space, share_of
from library.data.keys import KEY_BYTES, text_keys

if TYPE_CHECKING:
    from library.data.store import Store


def fill_text(texts: Sequence[str], folders: numpy.ndarray, store: Store,
              encode: Callable[[list[str]], Mapping[str, torch.Tensor]], identity: str, batch_size: int, *,
              trim: Mapping[str, str] | None = None, ranks: Ranks = Ranks(), progress: Progress | None = None) -> numpy.ndarray:
    """(M,) int64: the rows of ``store`` with each text's named tensors; floats in half precision, masks and numbers as they are.

    ``encode``: texts -> named tensors (B, ...) on any device. ``folders`` (M,): where each is kept; of equal texts, which are
    encoded once, the first decides. ``trim`` (name -> name of its mask): of these tensors and their masks only the real tokens
    are kept, dim 0 up to the last true one of the mask; they are read back with zeros for the rest.
    """
    trim = trim or {}
    keys = text_keys(texts, identity, trim)
    rows = numpy.full(len(keys), -1, dtype=numpy.int64)

    def missing() -> numpy.ndarray:
        rows[:] = store.find(keys)
        lacking = numpy.flatnonzero(rows < 0)
        _, first = numpy.unique(numpy.ascontiguousarray(keys[lacking]).view(f"V{KEY_BYTES}").reshape(-1), return_index=True)
        todo = lacking[first]
        return todo[numpy.lexsort((todo, folders[todo]))]

    def work(todo: numpy.ndarray, written: list[bytes]) -> None:
        runs = [part.tolist() for part in numpy.split(todo, numpy.flatnonzero(numpy.diff(folders[todo])) + 1)]
        mine, before = share_of(ranks, runs, batch_size), None
        with FolderWriter(store, written) as writer:
            for start in range(0, len(mine), batch_size):
                some = mine[start:start + batch_size]
                words = [texts[index] for index in some]
                with torch.no_grad():
                    values = dict(encode(words))
                assert all(len(value) == len(words) for value in values.values()), "encode must keep the batch"
                now = (some, words, values, {name: leaving(value) for name, value in values.items()})
                if before is None:
                    space(values, todo)
                else:
                    put(before, writer)
                before = now
                if progress:
                    progress(start + len(some), len(mine), start + len(some))
            if before is not None:
                put(before, writer)

    def put(batch: tuple, writer: FolderWriter) -> None:
        some, words, values, leaving_ = batch
        halves = {name: arrived() for name, arrived in leaving_.items()}
        for at, (index, text) in enumerate(zip(some, words, strict=True)):
            for name, half in halves.items():
                require_finite(half[at], values[name][at], f"{name} of the caption {text!r}")
            tensors, full = _trimmed({name: half[at] for name, half in halves.items()}, trim)
            writer.put(int(folders[index]), keys[index].tobytes(), tensors, full)

    def space(values: Mapping[str, torch.Tensor], todo: numpy.ndarray) -> None:
        if store.in_memory or trim:  # how much trimmed text takes is not known before
            return
        size = sum(value[0].numel() * (2 if value.is_floating_point() else value.element_size()) for value in values.values())
        numbers, counts = numpy.unique(folders[todo], return_counts=True)
        require_space(store, {int(folder): float(size * count) for folder, count in zip(numbers, counts, strict=True)})

    fill_rounds(ranks, store, missing, work, lambda nothing: None)
    return rows


def _trimmed(tensors: dict[str, torch.Tensor], trim: Mapping[str, str]) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
    """The real tokens of one text, and the lengths that readers see."""
    full: dict[str, int] = {}
    for name, mask_name in trim.items():
        mask = tensors[mask_name] if mask_name not in full else None
        if mask is not None:
            real = mask.nonzero()
            full[mask_name] = len(mask)
            tensors[mask_name] = mask[:int(real[-1]) + 1 if len(real) else 1]
        full[name] = len(tensors[name])
        tensors[name] = tensors[name][:len(tensors[mask_name])]
    return tensors, full

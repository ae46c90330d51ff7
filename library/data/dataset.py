"""Items and caches -> batches, in the order of the plan, prepared ahead by threads or by worker processes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy
import torch

from library.data.augment import View
from library.data.filling import ahead
from library.data.image import load_view
from library.data.items import Items
from library.data.loading import in_processes, in_thread
from library.data.plan import MicroBatch, StepBatches, StepPlan
from library.data.showing import EMPTY, Course, Showing, show

if TYPE_CHECKING:
    from library.data.store import Store

DECODERS = 2  # threads that decode pictures where there are no worker processes; caches are read by one: a second made it slower
AHEAD = 4  # batches

Order = tuple[tuple[Path, View, Literal["alpha"] | Path | None], ...]  # what a worker process needs for one batch
Pictures = tuple[torch.Tensor, torch.Tensor | None]  # (B, 3, H, W) uint8 and masks (B, H, W) uint8


@dataclass(frozen=True)
class Batch:
    """B samples of one picture size. Letters: C latent channels, h w latent sides, H W picture sides.

    Of ``latents`` and ``pixels`` one is None, and of the two masks at least one. Floats are as the caches hold them.
    """

    sample_ids: tuple[str, ...]
    paths: tuple[str, ...]
    captions: tuple[str, ...]
    latents: torch.Tensor | None  # (B, C, h, w) float16; None when latents are not cached
    pixels: torch.Tensor | None  # (B, 3, H, W) uint8; None when they are
    text: dict[str, torch.Tensor] | None  # name -> (B, ...); None when text is not cached
    geometry: torch.Tensor  # (B, 6) int64: original height, width; crop top, left; target height, width
    weight: torch.Tensor  # (B,) float32: of the loss; 0 for a filler
    mask: torch.Tensor | None = None  # (B, 1, h, w) float32 in 0..1, with cached latents; None: no sample has one
    pixel_mask: torch.Tensor | None = None  # (B, H, W) uint8, with pixels


@dataclass(frozen=True)
class StepMicro:
    """What one rank runs in optimizer step ``step`` (from 0); ``real_samples`` are those of all ranks."""

    step: int
    epoch: int
    micro: tuple[Batch, ...]
    real_samples: int


@dataclass(frozen=True)
class LatentCache:
    """``rows`` (N, 2) int64 of the store, for each item as it is and flipped (-1: never flipped)."""

    store: Store
    rows: numpy.ndarray


@dataclass(frozen=True)
class TextCache:
    """``rows`` (N, K) int64 of the store, for each item's caption variants; ``empty``: the row of the empty caption (-1 where
    no caption is ever dropped)."""

    store: Store
    rows: numpy.ndarray
    empty: int


@dataclass(frozen=True)
class TrainingData:
    """The items with what is cached of them; what is not is decoded, or left to be encoded, as it is needed."""

    items: Items
    course: Course
    latents: LatentCache | None = None
    text: TextCache | None = None

    def showings(self, micro: MicroBatch, epoch: int, step: int) -> list[Showing]:
        return [show(self.items[each.item], each.repeat, self.course, epoch, step) for each in micro.occurrences]

    def assemble(self, micro: MicroBatch, showings: Sequence[Showing], pictures: Pictures | None) -> Batch:
        """The batch; ``pictures`` are decoded ones, None when latents are cached."""
        latents = mask = text = None
        if self.latents is not None:
            rows = [self.latents.rows[each.item, int(shown.view.flip)]
                    for each, shown in zip(micro.occurrences, showings, strict=True)]
            stored = self.latents.store.read_many(rows, {"mask": 255})  # the whole picture counts where others have a mask
            latents, mask = stored["latents"], stored.get("mask")
        if self.text is not None:
            rows = [self.text.empty if shown.variant == EMPTY else self.text.rows[each.item, shown.variant]
                    for each, shown in zip(micro.occurrences, showings, strict=True)]
            text = self.text.store.read_many(rows)
        weights = [0.0 if micro.filler else shown.weight for shown in showings]
        return Batch(
            sample_ids=tuple(shown.sample_id for shown in showings), paths=tuple(str(shown.path) for shown in showings),
            captions=tuple(shown.caption for shown in showings), latents=latents,
            pixels=None if pictures is None else pictures[0], text=text,
            geometry=torch.tensor([shown.geometry for shown in showings], dtype=torch.int64),
            weight=torch.tensor(weights, dtype=torch.float32), mask=None if mask is None else mask.float()[:, None] / 255,
            pixel_mask=None if pictures is None else pictures[1])


def batches(data: TrainingData, plan: StepPlan, rank: int, start_step: int, stop_step: int, workers: int) -> Iterator[StepMicro]:
    """The steps ``start_step`` to ``stop_step`` - 1 of one rank, the next ones being prepared meanwhile.

    ``workers`` processes decode pictures, and live until the end; with cached latents, or 0, threads do all. The batches are
    the same. Close the generator when leaving early: it ends its threads and processes.
    """
    def wanted() -> Iterator[tuple[StepBatches, MicroBatch, list[Showing]]]:
        for step in range(start_step, stop_step):
            dealt = plan.step(step)
            for micro in dealt.micro[rank]:
                yield dealt, micro, data.showings(micro, dealt.epoch, step)

    if data.latents is None and workers > 0:
        source = _from_processes(data, wanted(), workers)
    else:
        source = in_thread(lambda: _from_threads(data, wanted()), ahead=AHEAD)
    with closing(source):
        for step in range(start_step, stop_step):
            dealt, first = next(source)
            micro = (first, *(next(source)[1] for _ in dealt.micro[rank][1:]))
            yield StepMicro(step, dealt.epoch, micro, dealt.real_samples)


def _from_threads(data: TrainingData, wanted: Iterator[tuple]) -> Iterator[tuple[StepBatches, Batch]]:
    def make(asked: tuple[StepBatches, MicroBatch, list[Showing]]) -> tuple[StepBatches, Batch]:
        dealt, micro, showings = asked
        return dealt, data.assemble(micro, showings, None if data.latents is not None else decode(_order(showings)))

    if data.latents is not None:
        yield from map(make, wanted)
        return
    with ThreadPoolExecutor(DECODERS, thread_name_prefix="data") as pool:
        try:
            yield from ahead(pool, make, wanted, DECODERS)
        finally:
            pool.shutdown(cancel_futures=True)


def _from_processes(data: TrainingData, wanted: Iterator[tuple], workers: int) -> Iterator[tuple[StepBatches, Batch]]:
    """Processes only decode pictures: they get paths and crops, and neither the table of items nor the caches."""
    asked, kept = itertools.tee(wanted)
    answers = in_processes(_decode_to_arrays, (_order(showings) for _, _, showings in asked), workers)

    def assembled() -> Iterator[tuple[StepBatches, Batch]]:
        with closing(answers):
            for dealt, micro, showings in kept:
                pixels, mask = next(answers)
                pictures = torch.from_numpy(pixels), None if mask is None else torch.from_numpy(mask)
                yield dealt, data.assemble(micro, showings, pictures)
    return in_thread(assembled, ahead=1)  # text is read from its cache while the step runs


def _order(showings: Sequence[Showing]) -> Order:
    return tuple((shown.path, shown.view, shown.mask) for shown in showings)


def decode(order: Order) -> Pictures:
    """The pictures and masks of one batch; a picture without a mask among others that have one counts everywhere."""
    loaded = [load_view(path, view, str(path), mask) for path, view, mask in order]
    masks = [mask for _, mask in loaded]
    if all(mask is None for mask in masks):
        return torch.stack([pixels for pixels, _ in loaded]), None
    filled = [torch.full(pixels.shape[1:], 255, dtype=torch.uint8) if mask is None else mask for pixels, mask in loaded]
    return torch.stack([pixels for pixels, _ in loaded]), torch.stack(filled)


def _decode_to_arrays(order: Order) -> tuple[numpy.ndarray, numpy.ndarray | None]:
    """In a worker process. Tensors would travel in shared memory, of which containers often have 64 MB: arrays go through the
    pipe, as fast."""
    pixels, mask = decode(order)
    return pixels.numpy(), None if mask is None else mask.numpy()

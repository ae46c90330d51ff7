"""Items and caches -> batches, in the order of the plan, prepared ahead by a thread or by DataLoader workers."""

from __future__ import annotations

import itertools
import os
import queue
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from library.data.bucket import MicroBatch, StepPlan
from library.data.cache import Stored
from library.data.image import load_bytes, to_signal
from library.errors import UserError

if TYPE_CHECKING:
    from library.data.scan import Item

T = TypeVar("T")


@dataclass(frozen=True)
class Batch:
    """B samples of one picture size. Letters: C latent channels, h w latent sides, H W picture sides."""

    sample_ids: tuple[str, ...]
    paths: tuple[str, ...]
    captions: tuple[str, ...]
    latents: torch.Tensor | None  # (B, C, h, w) float32; None when latents are not cached
    pixels: torch.Tensor | None  # (B, 3, H, W) float32 in [-1, 1]; None when they are
    text: dict[str, torch.Tensor] | None  # name -> (B, ...); None when text is not cached
    geometry: torch.Tensor  # (B, 6) int64: original height, width; crop top, left; target height, width
    weight: torch.Tensor  # (B,) float32; 0 for a filler
    mask: None = None


@dataclass(frozen=True)
class StepMicro:
    """What one rank runs in optimizer step ``step`` (from 0); ``real_samples`` are those of all ranks."""

    step: int
    epoch: int
    micro: tuple[Batch, ...]
    real_samples: int


@dataclass(frozen=True)
class TrainingData:
    """The items with what is cached of them; without ``latents`` pictures are decoded as they are needed."""

    items: Sequence[Item]
    latents: Sequence[Stored] | None = None  # aligned with items
    text: Mapping[str, Stored] | None = None  # by caption

    def pixels(self, micro: MicroBatch) -> torch.Tensor | None:
        """(B, 3, H, W) uint8 of the pictures, or None when their latents are cached."""
        if self.latents is not None:
            return None
        return _decode([self.items[each.item] for each in micro.occurrences])

    def assemble(self, micro: MicroBatch, pixels: torch.Tensor | None) -> Batch:
        """The batch; ``pixels`` as from ``pixels()``."""
        items = [self.items[each.item] for each in micro.occurrences]
        latents = text = None
        if self.latents is not None:
            latents = torch.stack([self.latents[each.item].read()["latents"] for each in micro.occurrences]).float()
        if self.text is not None:
            values = [self.text[item.caption].read() for item in items]
            text = {name: torch.stack([value[name] for value in values]) for name in values[0]}
        return Batch(
            sample_ids=tuple(each.sample_id for each in micro.occurrences), paths=tuple(str(item.path) for item in items),
            captions=tuple(item.caption for item in items), latents=latents,
            pixels=None if pixels is None else to_signal(pixels), text=text,
            geometry=torch.tensor([_geometry(item) for item in items], dtype=torch.int64),
            weight=torch.full((len(items),), 0.0 if micro.filler else 1.0))


def batches(data: TrainingData, plan: StepPlan, rank: int, start_step: int, stop_step: int, workers: int) -> Iterator[StepMicro]:
    """The steps ``start_step`` to ``stop_step`` - 1 of one rank, the next ones being prepared meanwhile.

    ``workers`` processes decode pictures; with cached latents, or 0, one thread does all. The batches are the same.
    Close the generator when leaving early: it ends its thread and processes.
    """
    def wanted() -> Iterator[MicroBatch]:
        for step in range(start_step, stop_step):
            yield from plan.step(step).micro[rank]

    if data.latents is None and workers > 0:
        source = _with_processes(data, wanted(), min(workers, os.cpu_count() or 1))
    else:
        source = _with_thread(lambda: (data.assemble(micro, data.pixels(micro)) for micro in wanted()))
    try:
        for step in range(start_step, stop_step):
            batches_of_step = plan.step(step)
            micro = tuple(next(source) for _ in batches_of_step.micro[rank])
            yield StepMicro(step, batches_of_step.epoch, micro, batches_of_step.real_samples)
    finally:
        source.close()


def _decode(items: Sequence[Item]) -> torch.Tensor:
    return torch.stack([load_bytes(item.path, item.placement) for item in items])


def _geometry(item: Item) -> tuple[int, ...]:
    (width, height), place = item.size, item.placement
    return height, width, place.crop[1], place.crop[0], place.bucket[1], place.bucket[0]


def _with_thread(produce: Callable[[], Iterable[T]], ahead: int = 4) -> Iterator[T]:
    """What ``produce`` yields, computed up to ``ahead`` values early by one thread; its exception is raised here."""
    results: queue.Queue[tuple[str, object]] = queue.Queue(maxsize=ahead)
    stopped = threading.Event()

    def put(kind: str, value: object) -> bool:
        while not stopped.is_set():
            try:
                results.put((kind, value), timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def run() -> None:
        try:
            for value in produce():
                if not put("value", value):
                    return
            put("end", None)
        except BaseException as error:  # handed to the reader
            put("error", error)

    thread = threading.Thread(target=run, name="data", daemon=True)
    thread.start()
    try:
        while True:
            kind, value = results.get()
            if kind == "error":
                raise value  # type: ignore[misc]
            if kind == "end":
                return
            yield value  # type: ignore[misc]
    finally:
        stopped.set()
        thread.join()


def _with_processes(data: TrainingData, wanted: Iterable[MicroBatch], workers: int) -> Iterator[Batch]:
    """Workers only decode pictures: caches in memory stay in this process and are not copied to them."""
    requests, order = itertools.tee(wanted)
    # Without a generator of its own the loader would draw its base seed from torch's global state.
    loader = DataLoader(_Pictures(data.items), batch_size=None, sampler=requests, num_workers=workers, collate_fn=_unchanged,
                        worker_init_fn=_start_worker, generator=torch.Generator())
    answers = iter(loader)
    try:
        for micro in order:
            answer = next(answers)
            if isinstance(answer, UserError):
                raise answer
            yield data.assemble(micro, answer)
    finally:
        del answers  # ends the processes


class _Pictures(Dataset):
    """MicroBatch -> its pictures (B, 3, H, W) uint8, or the UserError, which torch would bury in a stack trace."""

    def __init__(self, items: Sequence[Item]):
        self.items = items

    def __getitem__(self, micro: MicroBatch) -> torch.Tensor | UserError:
        try:
            return _decode([self.items[each.item] for each in micro.occurrences])
        except UserError as error:
            return error


def _unchanged(value: T) -> T:
    return value


def _start_worker(index: int) -> None:
    """Ctrl-C and SIGTERM often reach the whole process group. The main process then finishes its step and saves, so a
    worker lives on until it is told to end, after SIGTERM for half a minute at most."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def end_later(signum: int, frame: object) -> None:
        timer = threading.Timer(30, os._exit, (0,))
        timer.daemon = True
        timer.start()
    signal.signal(signal.SIGTERM, end_later)

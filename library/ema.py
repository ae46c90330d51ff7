"""A running average of the trained weights (Polyak averaging): smoother than any single step, saved beside the weights.

After update ``t`` (from 0) the average moves by a share of ``1 - min(decay, (1 + t) / (10 + t))`` towards the weights. The
second term is the customary warm-up (TensorFlow's ``ExponentialMovingAverage``): without it the first weights, which know
nothing yet, would stay in the average for thousands of steps.

The average is kept in float32 whatever the weights are. A step moves it by a thousandth or less of its distance to the weights,
which is below the spacing of bfloat16 nearly always; stochastic rounding would keep the mean, but the noise that it adds in each
of the thousands of steps that the average reaches over is as large as what averaging takes away.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from library.errors import UserError

CHUNK_BYTES = 64 << 20  # of weights on their way to the average; two such buffers where it is kept in main memory
_WEIGHT = "weight/"


def decay_at(decay: float, updates: int) -> float:
    """The share of the average that stays at the update after ``updates`` earlier ones."""
    return min(decay, (1 + updates) / (10 + updates))


class Ema:
    """The average of ``weights`` (name -> tensor, bfloat16 or float32), on ``device``, or beside each weight where that is None.

    The tensors of ``weights`` are looked at after every step, so they have to stay the same objects. When the average is on
    another device it follows behind: ``update`` returns at once, and a thread copies and averages while the next step's forward
    and backward passes run. ``wait`` has to be called before the weights change again; then the average is exactly what it
    would be without the delay. ``lagged`` overrides that choice; it must be False where the weights are moved about during a
    step, as streamed blocks are.
    """

    def __init__(self, weights: Mapping[str, Tensor], decay: float, device: torch.device | None = None,
                 lagged: bool | None = None):
        assert 0 < decay < 1 and all(weight.dtype in (torch.bfloat16, torch.float32) for weight in weights.values())
        self.weights, self.decay, self.updates = dict(weights), decay, 0
        self.average = {name: weight.detach().to(device or weight.device, torch.float32, copy=True).contiguous()
                        for name, weight in weights.items()}
        away = any(self.average[name].device != weight.device for name, weight in weights.items())
        self.lagged = away if lagged is None else lagged
        self._chunks = _chunks(self.weights)
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="ema") if self.lagged else None
        self._running: Future | None = None
        self._staging = _Staging(self.weights, self._chunks) if self.lagged else None
        self._swapped = False

    def update(self) -> None:
        """Take in the weights as they are now, after an optimizer step."""
        assert not self._swapped, "the model has the averaged weights now"
        self.wait()
        share = 1 - decay_at(self.decay, self.updates)
        self.updates += 1
        if self._worker is None:
            for names in self._chunks:
                self._move(names, [self.weights[name] for name in names], share)
        else:
            self._running = self._worker.submit(self._follow, share, _stepped(self.weights))

    def wait(self) -> None:
        """Until the weights of the latest update have been taken in. Errors of the thread are raised here."""
        running, self._running = self._running, None
        if running is not None:
            running.result()

    def _follow(self, share: float, stepped: list[torch.cuda.Event]) -> None:
        """In the thread: one chunk is copied while the one before it is averaged."""
        with self._staging.streams(stepped):
            arriving = self._staging.fetch(0)
            for index, names in enumerate(self._chunks):
                values = arriving.wait()
                if index + 1 < len(self._chunks):
                    arriving = self._staging.fetch(index + 1)
                self._move(names, values, share)

    @torch.no_grad()
    def _move(self, names: list[str], values: list[Tensor], share: float) -> None:
        averages = [self.average[name] for name in names]
        here = [value.detach().to(average.device, torch.float32) for value, average in zip(values, averages, strict=True)]
        torch._foreach_lerp_(averages, here, share)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Inside, the model has the averaged weights, rounded to its own dtype; afterwards its own, bit for bit.

        Nothing is copied aside for that: each average's memory holds the weight meanwhile (and of a bfloat16 weight also
        the half of the average that the weight has no room for). So the weights must not change inside.
        """
        assert not self._swapped
        self.wait()
        done: list[str] = []
        self._swapped = True
        try:
            for name, weight in self.weights.items():
                _exchange(weight, self.average[name], show=True)
                done.append(name)
            yield
        finally:
            for name in done:
                _exchange(self.weights[name], self.average[name], show=False)
            self._swapped = False

    def state_dict(self) -> dict[str, Any]:
        """For ``train_state``: the tensors are the live ones, each an entry of its own, so that reading goes one by one too."""
        assert not self._swapped, "the averages hold the weights now"
        self.wait()
        return {"updates": self.updates, **{_WEIGHT + name: tensor for name, tensor in self.average.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what ``state_dict`` gave, bit for bit. UserError, with nothing changed, when it is of other weights."""
        assert not self._swapped
        self.wait()
        stray = sorted({_WEIGHT + name for name in self.average} ^ (state.keys() - {"updates"}))
        if stray:
            name = stray[0].removeprefix(_WEIGHT)
            raise UserError(f"the saved average is of other weights ({len(stray)} names stand on one side only, such as "
                            f"{name!r})", remedy="resume with the model and the settings it was saved with")
        for name, tensor in self.average.items():
            tensor.copy_(state[_WEIGHT + name])
        self.updates = int(state["updates"])

    def close(self) -> None:
        self.wait()
        if self._worker is not None:
            self._worker.shutdown()


def _chunks(weights: Mapping[str, Tensor]) -> list[list[str]]:
    """Names in order, in stretches of one device and at most CHUNK_BYTES; a larger weight is a stretch of its own."""
    chunks: list[list[str]] = []
    room, device = 0, None
    for name, weight in weights.items():
        if weight.nbytes > room or weight.device != device:
            chunks.append([])
            room, device = CHUNK_BYTES, weight.device
        chunks[-1].append(name)
        room -= weight.nbytes
    return chunks


def _stepped(weights: Mapping[str, Tensor]) -> list[torch.cuda.Event]:
    """Events that have happened once what is queued now, the optimizer's step, is done."""
    events = []
    for device in {weight.device for weight in weights.values() if weight.device.type == "cuda"}:
        events.append(torch.cuda.Event())
        events[-1].record(torch.cuda.current_stream(device))
    return events


class _Arriving:
    def __init__(self, values: list[Tensor], copied: torch.cuda.Event | None):
        self._values, self._copied = values, copied

    def wait(self) -> list[Tensor]:
        if self._copied is not None:
            self._copied.synchronize()
        return self._values


class _Staging:
    """Two buffers in main memory through which chunks of weights come from their device, on a stream of their own there."""

    def __init__(self, weights: Mapping[str, Tensor], chunks: list[list[str]]):
        self._weights, self._chunks = weights, chunks
        devices = [weight.device for weight in weights.values() if weight.device.type == "cuda"]
        self._stream = torch.cuda.Stream(devices[0]) if devices else None
        largest = max((sum(_padded(weights[name]) for name in names) for names in chunks), default=0)
        self._buffers = [torch.empty(largest, dtype=torch.uint8, pin_memory=bool(devices)) for _ in range(2)]

    @contextmanager
    def streams(self, stepped: list[torch.cuda.Event]) -> Iterator[None]:
        for event in stepped:
            self._stream.wait_event(event)
        with torch.no_grad(), torch.cuda.stream(self._stream):  # nothing where it is None
            yield

    def fetch(self, index: int) -> _Arriving:
        """Begin to copy chunk ``index``; its buffer is free again when chunk ``index + 2`` is fetched."""
        buffer, start, values = self._buffers[index % 2], 0, []
        for name in self._chunks[index]:
            weight = self._weights[name]
            place = buffer[start:start + weight.nbytes].view(weight.dtype).view(weight.shape)
            values.append(place.copy_(weight.detach(), non_blocking=True))
            start += _padded(weight)
        copied = None
        if self._stream is not None:
            copied = torch.cuda.Event()
            copied.record(self._stream)
        return _Arriving(values, copied)


def _padded(weight: Tensor) -> int:
    return -(-weight.nbytes // 64) * 64


@torch.no_grad()
def _exchange(weight: Tensor, average: Tensor, show: bool) -> None:
    """``show``: put the average, rounded, into ``weight``, and what is needed to undo that into ``average``; else undo it."""
    held = weight.detach().to(average.device, copy=True).contiguous()  # one weight at a time is held twice
    if weight.dtype == torch.float32:
        weight.copy_(average)
        average.copy_(held)
        return
    # A bfloat16 is the upper half of a float32. Shown is the average's upper half, rounded up from the middle on; the average's
    # memory holds its lower half above the weight's 16 bits. The carry follows from the lower half: all of it can be undone.
    bits, half = average.view(torch.int32), held.view(torch.int16).int() & 0xFFFF
    if show:
        low, upper = bits & 0xFFFF, bits >> 16
        shown = upper + (low >> 15)
        bits.copy_((low << 16) | half)
    else:
        low = (bits >> 16) & 0xFFFF
        shown = bits & 0xFFFF
        bits.copy_(((half - (low >> 15)) << 16) | low)
    weight.copy_(shown.to(torch.int16).view(torch.bfloat16))

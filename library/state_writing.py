"""States on their way to the disk: written at once, or by a thread from copies while steps go on. Read back in both cases."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from library.background import Background
from library.checkpoint import train_state
from library.checkpoint.snapshot import available_memory
from library.checkpoint.state_find import next_serial
from library.checkpoint.train_state import StateFacts, open_state
from library.checkpoint.verify import Damaged
from library.checkpoint.writer import require_room
from library.errors import UserError
from library.log import log

Place = tuple[Any, ...]  # keys and indices that lead to a tensor
_SPARE = 1 << 30  # bytes of host memory that copies leave free for all else


@dataclass(frozen=True)
class Contents:
    """What a state is made of, as ``train_state.save`` takes it. ``name``: of the run, whose states are numbered in order."""

    facts: StateFacts
    name: str
    weights: Mapping[str, Tensor]
    parts: Mapping[str, Any]

    def put(self, path: Path) -> None:
        """Write the folder and read it back. UserError as ``train_state.save``; Damaged when it is not what was written. Its
        serial is above those there and above that of ``facts``, which is of the state that the run went on from."""
        facts = replace(self.facts, serial=max(next_serial(path.parent, self.name), self.facts.serial + 1))
        size = train_state.save(path, facts, self.weights, self.parts)
        try:
            open_state(path)
        except UserError as error:  # it stays, as a read may fail once; --resume latest passes over it as long as it is broken
            raise Damaged(error.message, place=error.place, remedy="look at the disk; older states stay as they are") from error
        log.info("state of step %d: %s (%.2f GB)", facts.step, path, size / 1e9)


class StateWriter:
    """``state(step, epoch)`` gives what there is to write. ``beside``: it is copied to host memory and written by a thread; where
    there is no room for the copies it is written at once, which is said. There is one set of copies, so the next state waits
    for the last.

    ``reading()`` is a context in which all weights can be read; ``on_failure`` gets what the thread could not do, in the thread
    that calls in.
    """

    def __init__(self, state: Callable[[int, int], Contents], reading: Callable[[], AbstractContextManager], *, beside: bool,
                 on_failure: Callable[[Exception], None]):
        self._state, self._reading, self._beside, self._on_failure = state, reading, beside, on_failure
        self._thread = Background("saving a state", lasting=True)
        self._copies = _Copies()

    def write(self, path: Path, step: int, epoch: int, then: Callable[[], None], at_once: bool = False) -> None:
        """Put a whole state in place, read it back and call ``then()``, now or when the thread is done; or raise."""
        self.wait()
        contents = self._state(step, epoch)
        with self._reading():
            require_room(path, sum(tensor.nbytes for _, tensor in _tensors(contents)))  # before anything is copied
            if not self._beside or at_once or not self._copies.fit(contents):
                contents.put(path)
                then()
                return
            copied = self._copies.take(contents)

        def job() -> None:
            copied.put(path)
            then()

        self._thread.start(job)

    def collect(self) -> None:
        """Tell of a state that the thread could not write, when there is one. Defects of ours are raised."""
        self._told(self._thread.collect)

    def wait(self) -> None:
        """Until nothing is being written, then as ``collect``."""
        self._told(self._thread.wait)

    def _told(self, ask: Callable[[], None]) -> None:
        try:
            ask()
        except (UserError, OSError) as error:
            self._on_failure(error)


class _Copies:
    """Copies of a state's tensors in host memory, which is kept and used again for the next state."""

    def __init__(self) -> None:
        self._held: dict[Place, Tensor] = {}
        self._told = False

    def fit(self, contents: Contents) -> bool:
        """Whether the host has room for them; said once when it has not."""
        needed = sum(tensor.nbytes for place, tensor in _tensors(contents) if not self._has(place, tensor))
        free = available_memory() if needed else 0
        if not needed or needed + _SPARE <= free:
            return True
        if not self._told:
            log.warning("states are written between two steps: a copy of one for --async_save takes %.1f GB more of host "
                        "memory, and %.1f GB are free", needed / 1e9, free / 1e9)
            self._told = True
        return False

    @torch.no_grad()
    def take(self, contents: Contents) -> Contents:
        """``contents`` as they are now. Waits for the device (a sync point): afterwards steps may change them."""
        def copy(place: Place, value: Any) -> Any:
            if isinstance(value, Mapping):
                return {key: copy((*place, key), one) for key, one in value.items()}
            if isinstance(value, (list, tuple)):
                return type(value)(copy((*place, index), one) for index, one in enumerate(value))
            if not isinstance(value, Tensor):
                return value
            if not self._has(place, value):
                self._held[place] = torch.empty_like(value, device="cpu", memory_format=torch.contiguous_format)
            return self._held[place].copy_(value)
        return replace(contents, weights=copy(("",), contents.weights), parts=copy((), contents.parts))

    def _has(self, place: Place, tensor: Tensor) -> bool:
        held = self._held.get(place)
        return held is not None and (held.shape, held.dtype) == (tensor.shape, tensor.dtype)


def _tensors(contents: Contents) -> list[tuple[Place, Tensor]]:
    found: list[tuple[Place, Tensor]] = []

    def look(place: Place, value: Any) -> None:
        if isinstance(value, Tensor):
            found.append((place, value))
        elif isinstance(value, Mapping):
            for key, one in value.items():
                look((*place, key), one)
        elif isinstance(value, (list, tuple)):
            for index, one in enumerate(value):
                look((*place, index), one)
    look(("",), contents.weights)
    look((), contents.parts)
    return found

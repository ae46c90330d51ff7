"""What can be chosen to fit a run into memory, and what cannot: plain records that the planner computes with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from library.memory.measured import Weight

LOOK_AHEAD = 2


@dataclass(frozen=True)
class Setting:
    """How memory is spent; every field costs time or numbers of its own. The defaults are the fastest and largest.

    ``recompute``: what blocks keep for the backward pass: everything, results of products and attention (``selective``), or their
    inputs alone (``all``); with ``every`` = k only each k-th block does so. ``offload``: these inputs wait in host memory.
    ``streamed``: blocks whose weights live in host memory, and ``look_ahead`` copies under way while one computes. ``unit``: what
    is stepped at once, the model after its backward pass, or a ``block`` or ``parameter`` within it. ``stream_states``:
    optimizer states of streamed blocks live on the host too.
    """

    recompute: Literal["none", "selective", "all"] = "none"
    every: int = 1
    offload: bool = False
    streamed: int = 0
    look_ahead: int = LOOK_AHEAD
    unit: Literal["model", "block", "parameter"] = "model"
    stream_states: bool = False

    def problem(self, blocks: int) -> str | None:
        """Why this cannot be done to a model of so many blocks; None when it can."""
        if self.streamed > blocks:
            return f"{self.streamed} of {blocks} blocks cannot be streamed"
        if self.streamed and (self.recompute == "none" or self.every != 1):
            return "streamed blocks must be recomputed"
        if self.streamed and self.unit == "model":
            return "streamed blocks must be stepped during the backward pass"
        if self.stream_states and not self.streamed:
            return "states can only follow blocks that are streamed"
        if self.offload and self.recompute != "all":
            return "only the inputs of blocks that keep nothing else can wait on the host"
        if self.every != 1 and self.recompute == "none":
            return "nothing is recomputed"
        return None

    def words(self) -> str:
        """For people, the flags by their names."""
        parts = []
        if self.recompute != "none":
            what = "recompute selectively" if self.recompute == "selective" else "recompute all"
            what += f", every {self.every}. block" if self.every != 1 else ""
            parts.append(what + (", inputs on the host" if self.offload else ""))
        if self.unit != "model":
            parts.append(f"step per {self.unit}")
        if self.streamed:
            parts.append(f"{self.streamed} blocks streamed{' with their states' if self.stream_states else ''}")
        return "; ".join(parts) or "everything kept on the card"


@dataclass(frozen=True)
class Optimizer:
    """``state_bytes`` of one weight; ``temporaries``: bytes per element that a step takes and gives back; ``separable``: weights
    may be stepped some at a time."""

    name: str
    state_bytes: Callable[[Weight], int]
    temporaries: int = 0
    separable: bool = True


@dataclass(frozen=True)
class Fixed:
    """What the run is, whatever is chosen. Sizes in bytes.

    ``rounding``: bf16 weights are stepped through float32 stand-ins. ``average``: where averaged weights are kept, in float32.
    ``encoders``: models that stay on the card because their results are not cached; ``encoding``: those that are there before
    training, to fill caches. ``single``: products are in float32. ``cached``: caches in host memory, ``cached_on_disk`` the
    others. ``checkpoint``: a file of the model, of which there are ``checkpoints``. ``cuda`` False: the CPU is the device.
    """

    optimizer: Optimizer
    micro_batches: int = 1
    ranks: int = 1
    rounding: bool = False
    single: bool = False
    average: Literal["no", "host", "device"] = "no"
    encoders: int = 0
    encoding: int = 0
    cached: int = 0
    cached_on_disk: int = 0
    checkpoint: int = 0
    checkpoints: int = 1
    cuda: bool = True

"""The formulas of the planner: bytes of every kind, bytes over the bus, and seconds, of one setting.

Letters. Segments j = 0 .. 2N of the model in the order in which they run, blocks at odd places (``measure.py``). w_j, t_j, o_j:
bytes of weights, of trained weights (so of gradients, which have the dtype of their weight) and of optimizer states of j.
S: the streamed blocks, a = ``look_ahead``, s = min(a + 1, |S|) slots, m = ``micro_batches``.

Moments. Memory is not the sum of the largest of everything: gradients come while activations go. So each moment that can be the
worst one is summed up by itself, and the plan shows the largest:

- ``forward``: the forward pass has just ended. What autograd keeps of all segments is there, and with autocast the copy that
  it makes of every float32 weight: its cache is emptied when the pass ends, or at each block when any is streamed.
- ``backward j``: segment j runs backward. What the segments 0 .. j keep is there, what those behind it kept is gone, and their
  gradients have come (all of them: with several micro-batches from the one before, with several processes because the buckets
  of DistributedDataParallel exist throughout). A recomputed block has just made anew all that it did not keep.
- ``update``: the optimizer steps, after the backward pass (unit "model" only; else it is part of ``backward j``).

Kept by segment j: all that autograd saves there; of a recomputed block its inputs, with "selective" also its products; with
``offload`` its inputs only while it is one of the ``IN_FLIGHT`` next to run backward. Storages that several keep count once.

Streaming. Every block has a region in host memory with each tensor rounded up to 256 bytes; the ring has s slots of the
largest one. Per micro-batch a forward pass copies in all but the s blocks that the backward pass left in the ring, and a
backward pass all but the s that the forward pass left. The last backward pass copies out what was trained. States move in and
out in the last backward pass; sums of gradients come in for every micro-batch but the first and go out for every one but the
last.

Seconds. A product of f operations takes f / (REACHED F) on a card of F per second (in the dtype of products), anything else its
traffic / W, where W is the memory bandwidth; a pass takes at least CALL_SECONDS for each call that Python has to make, and at
least as long as its copies:

    T = m max(forward, in_f / B) + m max(backward + recompute, max(in_b, out_b) / B) + update

with B the bandwidth of the bus each way (both ways at once). That is "hidden" where compute is the larger one in both.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from library.memory.amounts import Copies, Time, Work
from library.memory.cards import Card
from library.memory.measured import Measured, Weight
from library.memory.setting import Fixed, Setting

ALIGNMENT = 256  # of tensors in a region
IN_FLIGHT = 3  # offloaded inputs that are on the card: of the block that runs and of the two before it
OFFLOADED_FROM = 1024**2  # smaller inputs stay
ROUNDING_CHUNK = 256 * 1024**2  # float32 weights that are stepped at a time, unless a single one is larger (optim/rounding.py)
ROUNDING_DRAWS = 2 * 4 * 16 * 1024**2  # random integers, and the numbers they are added to
CONTEXT = 600_000_000  # what CUDA, cuBLAS and cuDNN take for themselves: an estimate, 0.4 to 0.7 GB on current drivers
FRAGMENTS = 0.03  # of what comes and goes during a step: an estimate of what the allocator cannot use
HOST_PROGRAM = {True: 3_000_000_000, False: 600_000_000}  # Python and torch, with and without CUDA's libraries: an estimate
REACHED = 0.75  # of a card's peak in large products: typical of cuBLAS
CALL_SECONDS = 8e-6  # eager torch, one operation

PARTS = ("weights", "ring", "gradients", "states", "activations", "casts", "workspace", "average", "encoders", "context")
"""Of the device's memory; in every moment each has a size."""


def evenly(count: int, chosen: int) -> tuple[int, ...]:
    """Which of ``count`` blocks are streamed: the middles of ``chosen`` equal parts."""
    return tuple((2 * index + 1) * count // (2 * chosen) for index in range(chosen))


def region(sizes: Iterable[int]) -> int:
    """Bytes of tensors side by side."""
    return sum(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes)


@dataclass(frozen=True)
class Held:
    """Bytes that are there because autograd, or the recompute of a block, needs them: ``activations`` and ``casts`` of weights;
    ``own`` are those among both that go when the segment has run backward."""

    activations: int
    casts: int
    own: int


def held(measured: Measured, recomputed: frozenset[int], selective: bool, offload: bool) -> tuple[Held, ...]:
    """For each segment: what is there while it runs backward."""
    casts = frozenset().union(*(segment.casts for segment in measured.segments))
    kept: set[int] = set()
    near: list[frozenset[int]] = []
    found = []
    before = 0
    for j, segment in enumerate(measured.segments):
        if j in recomputed:
            leaving = frozenset(number for number in segment.inputs if offload and measured.sizes[number] >= OFFLOADED_FROM)
            near = [*near, leaving][-IN_FLIGHT:]
            kept |= segment.inputs - leaving
            if selective:
                kept |= segment.products
        else:
            kept |= segment.saved
        there = kept.union(*near, segment.saved if j in recomputed else ())
        total, of_casts = measured.total(there), measured.total(there & casts)
        found.append(Held(total - of_casts, of_casts, total - before))
        before = measured.total(kept.union(*near))
    return tuple(found)


@dataclass(frozen=True)
class Needs:
    """All that one setting needs; every number is computed when it is first asked for.

    ``shared``: what settings have in common, for whoever asks for many of one run.
    """

    measured: Measured
    fixed: Fixed
    setting: Setting
    shared: dict = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        problem = self.setting.problem(len(self.measured.blocks))
        assert problem is None, problem

    @cached_property
    def streamed(self) -> tuple[int, ...]:
        """Segments whose weights are streamed."""
        return tuple(2 * place + 1 for place in evenly(len(self.measured.blocks), self.setting.streamed)) \
            if self.setting.streamed else ()

    @cached_property
    def recomputed(self) -> frozenset[int]:
        """Segments that are run again in the backward pass."""
        if self.setting.recompute == "none":
            return frozenset()
        return frozenset(2 * place + 1 for place in range(self.setting.every - 1, len(self.measured.blocks), self.setting.every))

    @property
    def slots(self) -> int:
        return min(self.setting.look_ahead + 1, len(self.streamed))

    # -- device --

    @cached_property
    def moments(self) -> Mapping[str, Mapping[str, int]]:
        """Moment -> part -> bytes."""
        found = {"forward": self._forward()}
        found |= {f"backward {self.measured.describe(j)}": self._backward(j)
                  for j in reversed(range(len(self.measured.segments)))}
        if self.setting.unit == "model":
            found["update"] = self._moment(gradients=self._gradients(0), workspace=self._update_workspace(self._trained()))
        return found

    @cached_property
    def worst(self) -> str:
        """The moment that needs the most."""
        return max(self.moments, key=lambda moment: sum(self.moments[moment].values()))

    @property
    def device(self) -> Mapping[str, int]:
        """Part -> bytes in the worst moment."""
        return self.moments[self.worst]

    @property
    def device_bytes(self) -> int:
        """What the card must have for training."""
        return sum(self.device.values())

    @property
    def allocated_bytes(self) -> int:
        """What torch will call allocated, which is less: nothing of the context, and no fragments."""
        return max(sum(parts.values()) - parts["context"] for parts in self.moments.values())

    @property
    def encoding_bytes(self) -> int:
        """What it must have before that, to fill caches, at least."""
        return self.fixed.encoding + (CONTEXT if self.fixed.cuda else 0) if self.fixed.encoding else 0

    def _moment(self, gradients: int = 0, activations: int = 0, casts: int = 0, workspace: int = 0) -> dict[str, int]:
        passing = gradients + activations + casts + workspace
        context = CONTEXT + int(FRAGMENTS * passing) if self.fixed.cuda else 0
        resident = sum(segment.bytes_of() for j, segment in enumerate(self.measured.segments) if j not in self.streamed)
        return {"weights": resident, "ring": self._ring, "gradients": gradients,
                "states": self._states, "activations": activations, "casts": casts, "workspace": workspace,
                "average": 4 * self._trained_count if self.fixed.average == "device" else 0, "encoders": self.fixed.encoders,
                "context": context}

    @cached_property
    def _ring(self) -> int:
        """Slots for weights, for states that follow them, and for sums of gradients."""
        sizes = [max(self._regions("weights"), default=0)]
        if self.setting.stream_states:
            sizes.append(max(self._regions("states"), default=0))
        if self.fixed.micro_batches > 1:
            sizes.append(max(self._regions("trained"), default=0))
        return self.slots * sum(sizes)

    def _regions(self, kind: str) -> tuple[int, ...]:
        """Bytes of the region of each streamed block: of its ``weights``, those ``trained``, or the ``states`` of these."""
        if ("region", kind) not in self.shared:
            self.shared["region", kind] = {j: region(self._region_sizes(kind, segment.weights))
                                 for j, segment in enumerate(self.measured.segments)}
        return tuple(self.shared["region", kind][j] for j in self.streamed)

    def _region_sizes(self, kind: str, weights: Sequence[Weight]) -> Iterable[int]:
        if kind == "states":
            return (self.fixed.optimizer.state_bytes(weight) for weight in weights if weight.trained)
        return (weight.size for weight in weights if weight.trained or kind == "weights")

    @cached_property
    def state_bytes(self) -> tuple[int, ...]:
        """Of each segment, wherever they are."""
        if "state bytes" not in self.shared:
            self.shared["state bytes"] = tuple(sum(self._region_sizes("states", segment.weights))
                                               for segment in self.measured.segments)
        return self.shared["state bytes"]

    @cached_property
    def _states(self) -> int:
        streamed = self.streamed if self.setting.stream_states else ()
        return sum(size for j, size in enumerate(self.state_bytes) if j not in streamed)

    def _gradients(self, j: int) -> int:
        """While segment ``j`` runs backward: of the segments from there on, or of all where they wait for another micro-batch or
        for other processes. Stepped on the way, only those of its block, and of what is outside of all blocks."""
        trained = [segment.bytes_of(True) for segment in self.measured.segments]
        own = trained[j] if j < len(trained) else 0
        if self.fixed.micro_batches > 1:
            return sum(size for i, size in enumerate(trained) if i not in self.streamed) + (own if j in self.streamed else 0)
        if self.setting.unit == "model":
            return sum(trained if self.fixed.ranks > 1 else trained[j:])
        if self.setting.unit == "block":
            return own + (trained[0] if j else 0)
        return 0

    @cached_property
    def _held(self) -> tuple[Held, ...]:
        key = (self.recomputed, self.setting.recompute, self.setting.offload)
        if key not in self.shared:
            self.shared[key] = held(self.measured, self.recomputed, self.setting.recompute == "selective", self.setting.offload)
        return self.shared[key]

    def _forward(self) -> dict[str, int]:
        measured, last = self.measured, len(self.measured.segments) - 1
        head = measured.segments[last]
        casts = self._held[last].casts
        if not self.streamed:
            casts = measured.total(frozenset().union(*(segment.casts for segment in measured.segments)))
        workspace = max(0, head.forward_peak - measured.total(head.saved))
        return self._moment(self._gradients(last + 1), self._held[last].activations, casts, workspace)

    def _backward(self, j: int) -> dict[str, int]:
        segment, there = self.measured.segments[j], self._held[j]
        workspace = segment.backward_peak
        if j in self.recomputed:
            workspace = max(workspace, segment.forward_peak - self.measured.total(segment.saved - segment.inputs))
        if self.setting.unit != "model":
            update = self._update_workspace([weight for weight in segment.weights if weight.trained])
            # parameters are stepped while their block runs, a block when it has run and what it kept is gone
            workspace = workspace + update if self.setting.unit == "parameter" else max(workspace, update - there.own)
        return self._moment(self._gradients(j), there.activations, there.casts, segment.carried + workspace)

    def _update_workspace(self, weights: Sequence[Weight]) -> int:
        """Float32 stand-ins of weights and gradients, a chunk at a time, and what the optimizer makes for itself."""
        if not weights:
            return 0
        largest = max(weight.count for weight in weights)
        together = largest if self.setting.unit == "parameter" else sum(weight.count for weight in weights)
        workspace = self.fixed.optimizer.temporaries * largest
        if self.fixed.rounding:
            stepped = max(4 * largest, min(4 * together, ROUNDING_CHUNK)) if self.fixed.optimizer.separable else 4 * together
            workspace += 2 * stepped + min(8 * largest, ROUNDING_DRAWS)
        return workspace

    def _trained(self) -> list[Weight]:
        if "trained" not in self.shared:
            self.shared["trained"] = [weight for segment in self.measured.segments for weight in segment.weights
                                      if weight.trained]
        return self.shared["trained"]

    @cached_property
    def _trained_count(self) -> int:
        return sum(weight.count for weight in self._trained())

    # -- host and disk --

    @cached_property
    def pinned(self) -> Mapping[str, int]:
        """Host memory that the device reads: part -> bytes."""
        return {"weights": sum(self._regions("weights")),
                "states": sum(self._regions("states")) if self.setting.stream_states else 0,
                "gradients": sum(self._regions("trained")) if self.fixed.micro_batches > 1 else 0,
                "activations": self._offloaded}

    @cached_property
    def _offloaded(self) -> int:
        if not self.setting.offload:
            return 0
        inputs = frozenset().union(*(self.measured.segments[j].inputs for j in self.recomputed))
        return sum(self.measured.sizes[number] for number in inputs if self.measured.sizes[number] >= OFFLOADED_FROM)

    @cached_property
    def ordinary(self) -> Mapping[str, int]:
        """Ordinary host memory, of one process: part -> bytes. On a CPU what the device holds comes to it."""
        average = 4 * self._trained_count if self.fixed.average == "host" else 0
        return {"program": HOST_PROGRAM[self.fixed.cuda], "average": average, "caches": self.fixed.cached}

    @property
    def disk(self) -> Mapping[str, int]:
        return {"caches": self.fixed.cached_on_disk, "checkpoints": self.fixed.checkpoint * self.fixed.checkpoints}

    # -- bus --

    @cached_property
    def forward_copies(self) -> Copies:
        """Of one micro-batch."""
        return Copies(sum(self._regions("weights")[self.slots:]), self._offloaded)

    @cached_property
    def backward_copies(self) -> Copies:
        """Of the micro-batches of one step together."""
        micro, weights = self.fixed.micro_batches, self._regions("weights")
        copies = Copies(micro * (sum(weights[:len(weights) - self.slots]) + self._offloaded), sum(self._regions("trained")))
        if self.setting.stream_states:
            states = self._regions("states")
            copies += Copies(self._returning(states), sum(states))
        trained = self._regions("trained")
        return copies + Copies((micro - 1) * self._returning(trained), (micro - 1) * sum(trained))

    def _returning(self, sizes: Sequence[int]) -> int:
        """Bytes that a ring which only takes part in backward passes copies in: it ends with blocks 0 .. s - 1 and begins with
        the last s, so where these overlap the block is there."""
        return sum(sizes) - sum(sizes[len(sizes) - self.slots:self.slots])

    @property
    def bus(self) -> Copies:
        """Of one optimizer step."""
        micro = self.fixed.micro_batches
        return Copies(micro * self.forward_copies.into, micro * self.forward_copies.out) + self.backward_copies

    # -- time --

    @cached_property
    def recompute_work(self) -> Work:
        """Of one micro-batch."""
        work = sum((self.measured.segments[j].forward for j in self.recomputed), Work())
        return Work(0, work.traffic, work.calls) if self.setting.recompute == "selective" else work

    @property
    def flops(self) -> int:
        """Of one optimizer step."""
        measured = self.measured
        return self.fixed.micro_batches * (measured.forward.flops + measured.backward.flops + self.recompute_work.flops)

    def time(self, card: Card) -> Time:
        """On one ``card``, of one optimizer step."""
        micro, measured = self.fixed.micro_batches, self.measured
        forward = micro * self._seconds(measured.forward, card)
        backward = micro * self._seconds(measured.backward + self.recompute_work, card)
        copy_forward, copy_backward = micro * self.forward_copies.seconds(card.bus), self.backward_copies.seconds(card.bus)
        # weights, gradients and states are read, weights and states written
        moved = sum(3 * weight.size for weight in self._trained()) + 2 * sum(self.state_bytes)
        if self.fixed.average != "no":
            moved += 12 * self._trained_count
        return Time(max(forward, copy_forward), max(backward, copy_backward), moved / card.bandwidth,
                    copy_forward + copy_backward, copy_forward <= forward and copy_backward <= backward)

    def _seconds(self, work: Work, card: Card) -> float:
        peak = card.single if self.fixed.single else card.peak
        return max(work.flops / (REACHED * peak) + work.traffic / card.bandwidth, work.calls * CALL_SECONDS)

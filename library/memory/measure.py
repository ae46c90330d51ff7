"""What a training step of a model needs, measured without weights and without a device.

The forward and backward pass run once on tensors that have a shape but no memory (``trace.py``). Of blocks that are alike in
everything that matters, one is run and the others are taken for the same: the largest models take a few seconds.

The model is seen as a chain of segments: what lies before the first block, the first block, what lies between it and the next
one, and so on. Everything that autograd keeps belongs to the segment in which it was saved. A storage is a number: segments
may keep the same one, and a sum over segments counts it once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from library.memory.amounts import Work
from library.memory.measured import Measured, Segment, Weight
from library.memory.trace import Kernels, Reading, Trace


def measure(module: nn.Module, blocks: Sequence[nn.Module], losses: Callable[[], Tensor], autocast: torch.dtype | None = None,
            cuda: bool = True) -> Measured:
    """``module`` (parameters on meta, ``requires_grad`` as in training; it is used up) with its ``blocks`` in the order in which
    they run. ``losses`` makes the batch and calls the module; its sum is what runs backward. ``autocast``: the dtype of
    mixed precision. ``cuda``: what a GPU would do; else what torch does on a CPU, exactly."""
    with FakeTensorMode(allow_non_fake_inputs=True), ExitStack() as stack:
        _without_memory(module)
        trace = Trace((*module.parameters(), *module.buffers()), cuda)
        run = _Run(trace, autocast)
        for block in blocks:
            block.forward = run.around(block)
            stack.callback(delattr, block, "forward")
        for parameter in module.parameters():
            if parameter.requires_grad:
                stack.callback(parameter.register_post_accumulate_grad_hook(_give_up_gradient).remove)
        with Kernels(trace, cuda), trace, Reading():
            with run.autocast(), run.trace.saved(lambda: run.saving):
                total = losses().sum()
            run.begin_backward()
            assert len(run.segments) == 2 * len(blocks) + 1, "a block did not run, or ran twice"
            total.backward()
            run.end()
    return Measured(_with_weights(run.segments, module, blocks), tuple(trace.sizes))


def _give_up_gradient(parameter: Tensor) -> None:
    parameter.grad = None


@dataclass
class _Open:
    """A segment that is being measured."""

    name: str
    saved: set[int] = field(default_factory=set)
    products: set[int] = field(default_factory=set)
    casts: set[int] = field(default_factory=set)
    forward: Work = Work()
    backward: Work = Work()
    forward_start: int = 0
    forward_peak: int = 0
    backward_peak: int = 0
    carried: int = 0

    def close(self) -> Segment:
        return Segment(self.name, (), frozenset(self.saved), frozenset(), frozenset(self.products), frozenset(self.casts),
                       self.forward, self.backward, self.forward_peak, self.backward_peak, self.carried)


class _Run:
    """The measured run: where it is, and the segments so far."""

    def __init__(self, trace: Trace, autocast: torch.dtype | None):
        self.trace, self._autocast = trace, autocast
        self._gaps: list[_Open] = []
        self._blocks: list[Segment] = []
        self._alike: dict[Any, _Pattern] = {}
        self._backward_start = 0
        self._at = 0  # the gap that runs backward
        self._open_gap()

    def autocast(self) -> torch.autocast:
        return torch.autocast("cpu", dtype=self._autocast or torch.bfloat16, enabled=self._autocast is not None)

    @property
    def saving(self) -> set[int]:
        return self._current.saved

    @property
    def segments(self) -> list[Segment]:
        gaps = [gap.close() for gap in self._gaps]
        return [segment for pair in zip(gaps, self._blocks) for segment in pair] + [gaps[-1]]

    def _enter(self, segment: _Open) -> None:
        self._current = segment
        self.trace.products, self.trace.casts = segment.products, segment.casts
        self.trace.peak = segment.forward_start = self.trace.live

    def _leave(self) -> None:
        self._current.forward_peak = self.trace.peak - self._current.forward_start
        self._current.forward = self.trace.take_work()

    def _open_gap(self) -> None:
        self._gaps.append(_Open(f"gap {len(self._gaps)}"))
        self._enter(self._gaps[-1])

    def around(self, block: nn.Module) -> Callable[..., Any]:
        """``block.forward`` for the time of the measurement: a single node in the graph of the model."""
        forward = block.forward

        def run(*args: Any, **kwargs: Any) -> Any:
            leaves, structure = tree_flatten((args, kwargs))
            tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
            self._leave()
            results: list[Any] = []

            def inside(*inputs: Tensor) -> list[Tensor]:
                there = iter(inputs)
                filled = [next(there) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
                given_args, given_kwargs = tree_unflatten(filled, structure)
                kind = _kind(block, leaves, structure, [self.trace.number(tensor) for tensor in inputs])
                if kind not in self._alike:
                    self._alike[kind] = self._measure(block, forward, given_args, given_kwargs, inputs)
                segment, outputs = self._alike[kind].again(self.trace, inputs)
                results.append(self._alike[kind].structure)
                self._blocks.append(segment)
                return outputs

            place = len(self._blocks)
            # without it a block whose inputs need no gradient would seem not to train
            anchor = torch.empty(0, requires_grad=any(parameter.requires_grad for parameter in block.parameters()))
            outputs = _Block.apply(self, place, inside, anchor, *tensors)
            self._open_gap()
            (shape, present), made = results[0], iter(outputs)
            return tree_unflatten([next(made) if there else None for there in present], shape)

        return run

    def _measure(self, block: nn.Module, forward: Callable[..., Any], args: tuple, kwargs: dict,
                 inputs: Sequence[Tensor]) -> _Pattern:
        """Run one block forward and backward."""
        segment = _Open(type(block).__name__)
        trace = self.trace
        first = len(trace.sizes)
        self._enter(segment)
        with torch.enable_grad():
            results, structure = tree_flatten(forward(*args, **kwargs))
            outputs = [leaf for leaf in results if leaf is not None]  # a last block may have nothing to say about its text
            self._leave()
            with torch.autocast("cpu", enabled=False):
                torch.clear_autocast_cache()
                graded = [output for output in outputs if output.requires_grad]
                gradients = [torch.empty_like(output) for output in graded]
                trace.products, trace.casts = set(), set()  # those of the backward pass are not kept for another one
                trace.peak = before = trace.live
                if graded:
                    torch.autograd.backward(graded, gradients)
                segment.backward_peak, segment.backward = trace.peak - before, trace.take_work()
        return _Pattern.of(segment.close(), first, inputs, [output.detach() for output in outputs],
                           (structure, tuple(leaf is not None for leaf in results)), trace)

    def begin_backward(self) -> None:
        self._leave()
        torch.clear_autocast_cache()
        self.trace.products, self.trace.casts = set(), set()
        self._at = len(self._gaps) - 1
        self._enter_gap_backward()

    def enter_block_backward(self, place: int) -> None:
        self._leave_gap_backward()
        self._blocks[place] = replace(self._blocks[place], carried=self._carried(place + 1))
        self._at = place

    def leave_block_backward(self) -> None:
        self._enter_gap_backward()

    def end(self) -> None:
        self._leave_gap_backward()

    def _enter_gap_backward(self) -> None:
        gap = self._gaps[self._at]
        gap.carried = self._carried(self._at + 1)
        self.trace.peak = self._backward_start = self.trace.live

    def _leave_gap_backward(self) -> None:
        gap = self._gaps[self._at]
        gap.backward_peak, gap.backward = self.trace.peak - self._backward_start, self.trace.take_work()

    def _carried(self, gaps: int) -> int:
        """Bytes that are there beside what the first ``gaps`` gaps keep."""
        kept = set().union(*(gap.saved for gap in self._gaps[:gaps]))
        return max(0, self.trace.live - sum(self.trace.sizes[number] for number in kept))


class _Block(torch.autograd.Function):
    """A block in the graph of the model, run or repeated by ``inside``. ``anchor`` needs a gradient when the block trains."""

    @staticmethod
    def forward(ctx: Any, run: _Run, place: int, inside: Callable[..., list[Tensor]], anchor: Tensor,
                *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.run, ctx.place = run, place
        needed = ctx.needs_input_grad[4:]
        ctx.like = [(tensor.shape, tensor.dtype) if need else None for tensor, need in zip(inputs, needed, strict=True)]
        return tuple(inside(*(tensor.detach().requires_grad_(need) for tensor, need in zip(inputs, needed, strict=True))))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple:
        ctx.run.enter_block_backward(ctx.place)
        back = [torch.empty(like[0], dtype=like[1]) if like else None for like in ctx.like]
        ctx.run.leave_block_backward()
        return None, None, None, None, *back


@dataclass(frozen=True)
class _Pattern:
    """A measured block, ready to be repeated with other storages: numbers from ``first`` up to ``end`` are its own, and those in
    ``given`` were given to it."""

    segment: Segment
    first: int
    end: int
    given: tuple[int | None, ...]
    outputs: tuple[_View, ...]
    structure: Any

    @classmethod
    def of(cls, segment: Segment, first: int, inputs: Sequence[Tensor], outputs: Sequence[Tensor], structure: Any,
           trace: Trace) -> _Pattern:
        views = tuple(_View(output.shape, output.stride(), output.storage_offset(), output.dtype, trace.number(output))
                      for output in outputs)
        return cls(segment, first, len(trace.sizes), tuple(trace.number(tensor) for tensor in inputs), views, structure)

    def again(self, trace: Trace, inputs: Sequence[Tensor]) -> tuple[Segment, list[Tensor]]:
        """The segment with new numbers, and its outputs."""
        given = [trace.number(tensor) for tensor in inputs]
        new = {old: now for old, now in zip(self.given, given, strict=True) if old is not None and now is not None}
        storages = {old: tensor for old, tensor in zip(self.given, inputs, strict=True) if old is not None}
        outputs: list[Tensor] = []
        for view in self.outputs:
            if view.number not in storages:
                storages[view.number] = torch.empty(trace.sizes[view.number] // view.dtype.itemsize, dtype=view.dtype)
                new[view.number] = trace.number(storages[view.number])
            outputs.append(view.into(storages[view.number]))
        used = self.segment.saved | self.segment.products | self.segment.casts
        for number in sorted(used - new.keys()):
            new[number] = trace.add(trace.sizes[number]) if self.first <= number < self.end else number
        renamed = {name: frozenset(new[number] for number in getattr(self.segment, name))
                   for name in ("saved", "products", "casts")}
        written = sum(trace.sizes[number] for number in {trace.number(output) for output in outputs} - {None})
        return replace(self.segment, inputs=frozenset(number for number in given if number is not None), output_bytes=written,
                       **renamed), outputs


@dataclass(frozen=True)
class _View:
    """How a tensor looks into its storage."""

    shape: torch.Size
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    number: int | None

    def into(self, storage: Tensor) -> Tensor:
        """The same view of the storage of a tensor."""
        assert storage.dtype == self.dtype, "a block gives back a view of another dtype"
        return storage.as_strided(self.shape, self.stride, self.offset)


def _kind(block: nn.Module, leaves: Sequence[Any], structure: Any, numbers: Sequence[int | None]) -> Any:
    """Equal for blocks of which one can stand for the other."""
    parameters = tuple((name, tuple(p.shape), p.dtype, p.requires_grad) for name, p in block.named_parameters())
    order: dict[int | None, int] = {}
    same = tuple(order.setdefault(number, len(order)) for number in numbers)
    given = tuple((tuple(leaf.shape), leaf.stride(), leaf.dtype, leaf.requires_grad) if isinstance(leaf, Tensor) else repr(leaf)
                  for leaf in leaves)
    return repr(block), parameters, given, repr(structure), same


def _without_memory(module: nn.Module) -> None:
    """Replace parameters and buffers by fake ones; what is tied stays tied."""
    made: dict[int, Tensor] = {}
    for child in module.modules():
        for table in (child._parameters, child._buffers):
            for name, tensor in table.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    empty = torch.empty(tensor.shape, dtype=tensor.dtype)
                    made[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
                table[name] = made[id(tensor)]


def _with_weights(segments: Sequence[Segment], module: nn.Module, blocks: Sequence[nn.Module]) -> tuple[Segment, ...]:
    """Each block with its parameters and buffers; those of the rest count for the first gap, where their gradients end."""
    seen: set[int] = set()

    def weights(part: nn.Module) -> tuple[Weight, ...]:
        found = []
        for tensor in (*part.parameters(), *part.buffers()):
            if id(tensor) not in seen:
                seen.add(id(tensor))
                found.append(Weight(tuple(tensor.shape), tensor.itemsize, tensor.requires_grad, isinstance(tensor, nn.Parameter)))
        return tuple(found)

    filled = list(segments)
    for place, block in enumerate(blocks):
        filled[2 * place + 1] = replace(segments[2 * place + 1], weights=weights(block))
    filled[0] = replace(segments[0], weights=weights(module))
    return tuple(filled)

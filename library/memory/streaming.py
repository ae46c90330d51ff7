"""Block streaming: the weights of some blocks live in pinned host memory and pass through a ring of device slots.

Forward copies in only, since the host copies stay valid. Backward copies in and, once a block has run, copies out what a step
has changed. Each streamed block is one flat region on either side, so a copy is one call, and its parameters look into its
slot for good, so no tensor is touched in Python. DESIGN.md section 5.1-5.4 has the facts this rests on.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from library.errors import UserError
from library.memory.boundaries import Boundaries, Listener
from library.memory.layout import Layout, lay_out_tensors
from library.memory.ring import Ring
from library.memory.schedule import make_schedule
from library.memory.transport import Transport

LOOK_AHEAD = 2  # copying out block i+1 and copying in block i-1 both overlap with computing block i


class Streaming(Listener):
    """Streams the blocks at the ascending ``places`` of ``boundaries.blocks`` (``schedule.evenly`` spreads them).

    Everything of a streamed block moves: weights, biases, norms, buffers; except parameters for which ``stays`` is true (a
    LoRA's), which are put on the device. Blocks may come from any device; call ``move_rest`` for the rest of the model. Build
    optimizers afterwards.

    ``recomputed``: blocks that run under ``Recompute``; without it autograd would keep looking at weights that were replaced,
    so UserError for a streamed block that is not among them. Parameters that train may only be streamed together with
    ``StepInBackward``, which is what calls ``changed``; a training forward pass without it is an AssertionError.

    Between steps the parameters show whatever is in their slots. ``host_weights()`` makes them readable and writable;
    ``state_dict()`` outside of it is refused. A forward pass that no backward pass follows, an exception in either, another
    model in between: all leave it in order, as a block that is not there when it is needed is fetched.
    """

    def __init__(self, boundaries: Boundaries, places: Sequence[int], recomputed: Collection[nn.Module], transport: Transport,
                 look_ahead: int = LOOK_AHEAD, stays: Callable[[Parameter], bool] = lambda parameter: False,
                 poison: bool = False):
        self.places = tuple(places)
        self.number = {place: number for number, place in enumerate(self.places)}  # place among all blocks -> among streamed
        self.blocks = [boundaries.blocks[place] for place in self.places]
        _refuse(self.blocks, recomputed)
        self.schedule = make_schedule(len(boundaries.blocks), self.places, look_ahead)
        self.transport = transport
        self.step_rings: list[Ring] = []  # what a step needs besides the weights; copied in for backward passes only
        self.has_stepper = False
        self._poison = poison
        self._tensors = [_moving(block, stays) for block in self.blocks]
        _refuse_shared(self._tensors)
        self.trained = [[t for t in tensors if t.requires_grad] for tensors in self._tensors]
        self._on_host = False
        host, self.layouts = [], []
        for tensors in self._tensors:  # one block at a time: its old memory is free before the next one is pinned
            layout = lay_out_tensors(tensors)
            host.append(_fill(transport.host(layout.size), layout, tensors))
            self.layouts.append(layout)
        changing = [lay_out_tensors(trained).size for trained in self.trained]  # the trained ones stand in front
        self.weights = self.make_ring(host, changing)
        self.weights.filled = [True] * len(host)
        self._host_views = [layout.host_views(region) for layout, region in zip(self.layouts, self.weights.host, strict=True)]
        self._device_views = [layout.views(region) for layout, region in zip(self.layouts, self.weights.device, strict=True)]
        self._point(self._device_views)
        for block in self.blocks:
            for parameter in block.parameters():
                if stays(parameter):
                    parameter.data = parameter.data.to(transport.device)
        self._boundaries = boundaries
        boundaries.listeners.append(self)
        self._guards = [block.register_state_dict_pre_hook(self._guard) for block in self.blocks]

    def make_ring(self, host: Sequence[Tensor], changing: Sequence[int]) -> Ring:
        """Another ring over the same blocks, for ``step_rings``."""
        return Ring(host, changing, self.schedule.slots, self.transport, self._poison)

    def move_rest(self, module: nn.Module) -> None:
        """Put every parameter and buffer of ``module`` that is not streamed on the device."""
        streamed = {id(tensor) for tensors in self._tensors for tensor in tensors}
        for tensor in (*module.parameters(), *module.buffers()):
            if id(tensor) not in streamed:
                tensor.data = tensor.data.to(self.transport.device)

    def enter_forward(self, place: int) -> None:
        training = torch.is_grad_enabled()
        assert self.has_stepper or not (training and any(self.trained)), "streamed parameters train, but nothing steps them"
        torch.clear_autocast_cache()  # casts of weights that have moved on
        self._bring(self.weights, (self.schedule.forward if training else self.schedule.forward_only)[place], place)
        if training and place == len(self._boundaries.blocks) - 1:
            for ring in self.step_rings:
                if ring.active:
                    self._bring(ring, self.schedule.turn, None)

    def enter_backward(self, place: int) -> None:
        for ring in (self.weights, *self.step_rings):
            if ring.active:
                self._bring(ring, self.schedule.backward[place], place)

    def leave_backward(self, place: int) -> None:
        number = self.number.get(place)
        if number is not None:
            for ring in (self.weights, *self.step_rings):
                ring.store(number)

    def _bring(self, ring: Ring, wanted: Sequence[int], place: int | None) -> None:
        for number in wanted:
            ring.bring(number)
        if place in self.number:
            ring.use(self.number[place])

    def changed(self, place: int) -> None:
        """Weights of the block, which is running backward, were written to."""
        self.weights.changed(self.number[place])

    @contextmanager
    def host_weights(self) -> Iterator[None]:
        """Within it the parameters and buffers look at their host copies, which may be read (export) and written (resume)."""
        self.settle()
        self._point(self._host_views)
        self._on_host = True
        try:
            yield
        finally:
            self._on_host = False
            self._point(self._device_views)
            self.weights.forget()  # they may have been written to

    def settle(self) -> None:
        """Bring the host copies up to date and wait for that."""
        for ring in (self.weights, *self.step_rings):
            ring.store_all()
        self.transport.drain()

    def detach(self) -> None:
        """Back to a plain model, its streamed blocks in ordinary host memory: move it where it is wanted."""
        self.settle()
        self._point(self._host_views)
        self._boundaries.listeners.remove(self)
        for guard in self._guards:
            guard.remove()
        self.transport.close()

    def _point(self, views: Sequence[Sequence[Tensor]]) -> None:
        for tensors, targets in zip(self._tensors, views, strict=True):
            for tensor, target in zip(tensors, targets, strict=True):
                tensor.data = target

    def _guard(self, block: nn.Module, prefix: str, keep_vars: bool) -> None:
        # With keep_vars people ask for names and shapes.
        assert self._on_host or keep_vars, "streamed weights are read outside of host_weights()"


def _moving(block: nn.Module, stays: Callable[[Parameter], bool]) -> list[Tensor]:
    """What moves of a block: parameters that train, parameters that do not, buffers; each once."""
    parameters = [parameter for parameter in block.parameters() if not stays(parameter)]
    return sorted(parameters, key=lambda parameter: not parameter.requires_grad) + list(block.buffers())


def _fill(region: Tensor, layout: Layout, tensors: Sequence[Tensor]) -> Tensor:
    """Move ``tensors`` into ``region``: their old memory is given up."""
    for tensor, view in zip(tensors, layout.host_views(region), strict=True):
        view.copy_(tensor.detach())
        tensor.data = view
    return region


def _refuse(blocks: Sequence[nn.Module], recomputed: Collection[nn.Module]) -> None:
    covered = {id(block) for block in recomputed}
    bare = sum(id(block) not in covered for block in blocks)
    if not blocks:
        raise UserError("no block is to be streamed", place="--blocks_to_swap", remedy="ask for at least 1, or leave it out")
    if bare:
        raise UserError(f"{bare} of {len(blocks)} streamed blocks keep their activations", place="--blocks_to_swap",
                        remedy="add --gradient_checkpointing, which must cover all blocks that are streamed")
    for block in blocks:
        for module in block.modules():
            assert not getattr(module, "track_running_stats", False), "buffers that a forward pass changes are not copied out"


def _refuse_shared(blocks: Sequence[Sequence[Tensor]]) -> None:
    owners: dict[int, int] = {}
    for number, tensors in enumerate(blocks):
        for tensor in tensors:
            assert owners.setdefault(id(tensor), number) == number, "two streamed blocks share a tensor"
            assert type(tensor.data) is Tensor and tensor.layout is torch.strided, f"cannot stream a {type(tensor.data).__name__}"

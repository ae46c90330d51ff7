"""Optimizer steps inside the backward pass: each unit is stepped, and its gradients given up, as soon as they are complete."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import Parameter

from library.errors import UserError
from library.memory.boundaries import Boundaries, Listener
from library.memory.partial import PartialGradients
from library.memory.ring import Ring
from library.memory.states import StreamedStates, probe_states
from library.memory.streaming import Streaming
from library.optim.groups import Group
from library.optim.rounding import StochasticRounding
from library.optim.schedule import Curve
from library.optim.state import Calls, holding
from library.optim.updater import UpdateInfo, non_finite, total_norm
from library.optim.updating import Updating

Average = Callable[[Sequence[Tensor]], None]
"""Replaces gradients, in place, by their means over all ranks. Called on every rank for the same tensors in the same order."""


@dataclass
class _Unit:
    """What is stepped together. ``stepped``: for each of the optimizer's groups, what it holds of this unit."""

    names: tuple[str, ...]
    parameters: tuple[Parameter, ...]
    stepped: list[list[Parameter]]
    place: int | None  # of its block
    step: int = field(default=-1)  # that it was last stepped in


class StepInBackward(Updating, Listener):
    """The updater of ``--fused_backward_pass`` (``unit`` "parameter") and ``--blockwise_fused_optimizers`` ("block", and all
    that is outside of the blocks as one more unit). The same weights as with ``StepAfterBackward``, bit for bit, and the same
    state, so that a run may go on with another unit or with none.

    Call ``begin_microbatch`` before the forward pass of every micro-batch and ``after_backward`` after its backward pass. With
    several micro-batches the gradients of resident parameters wait in ``.grad``, those of streamed ones on the host.

    A unit whose gradient is not finite is not stepped, nor are those that follow: ``after_backward`` raises NonFinite, and
    units stepped before it in the same backward pass have had an ordinary update. The look at the norm makes the host wait
    once per unit. ``guard`` False leaves that out: then the error comes after the weights have taken the numbers.

    UserError: an optimizer that sums over all parameters (``Calls.separable``); ``max_grad_norm`` other than 0, as the norm over
    all gradients is not known when the first unit is stepped; scaled float16 gradients. Several processes: do not wrap the model,
    give ``average`` (see ``average_over_ranks``); every rank must have gradients for the same parameters.
    """

    inside_backward = True

    def __init__(self, optimizer: torch.optim.Optimizer, groups: Sequence[Group], schedule: Curve,
                 unit: Literal["parameter", "block"], boundaries: Boundaries, streaming: Streaming | None = None,
                 rounding: StochasticRounding | None = None, max_grad_norm: float = 0.0, average: Average | None = None,
                 guard: bool = True, stream_states: bool = False):
        if max_grad_norm:
            raise UserError(f"a norm over all gradients ({max_grad_norm:g}) is not known when weights are updated during the "
                            "backward pass", place="--max_grad_norm",
                            remedy="set --max_grad_norm 0, or leave --fused_backward_pass and --blockwise_fused_optimizers out")
        if stream_states and streaming is None:
            raise UserError("no block is streamed, so no optimizer state can follow it", place="--stream_optimizer_states",
                            remedy="add --blocks_to_swap, or leave it out")
        super().__init__(optimizer, groups, schedule, rounding)
        self._calls = Calls(optimizer, [group.name for group in groups])
        if not self._calls.separable:
            raise UserError(f"{type(optimizer).__name__} sums over all gradients, which are not known when the first weight is "
                            "updated", place="--optimizer_type",
                            remedy="leave --fused_backward_pass, --blockwise_fused_optimizers and --blocks_to_swap out")
        self._average, self._guard, self._streaming = average, guard, streaming
        self._units = self._make_units(unit, boundaries)
        self._of_block = {place: [u for u in self._units if u.place == place] for place in range(len(boundaries.blocks))}
        self._arrived: set[int | None] = set()  # places of blocks that got gradients from this backward pass
        self._partial: PartialGradients | None = None
        self._states = self._stream_states() if stream_states else None
        self._step, self._total_steps, self._last, self._rate = -1, 1, None, 0.0
        self._squares: Tensor | float = 0.0
        self._bad: _Unit | None = None
        self._bad_names: list[str] = []
        if streaming is not None:
            streaming.has_stepper = True
        boundaries.listeners.append(self)  # behind streaming: entered after it, left before it
        self._boundaries = boundaries
        self._hooks = []
        for one in self._units:
            for parameter in one.parameters:
                self._hooks.append(parameter.register_post_accumulate_grad_hook(self._hook(one, unit == "parameter")))

    def begin_microbatch(self, step: int, total_steps: int, last_microbatch: bool) -> None:
        """Update number ``step`` (counted from 0) gets another micro-batch, its last one or not."""
        assert not self._evaluating, "a step inside evaluating()"
        self._boundaries.notice_abort()
        if step != self._step:
            self._clear()
            self._step, self._total_steps = step, total_steps
            self._rate = self._set_learning_rates(step, total_steps)
            self._calls.begin()
        if not last_microbatch and self._partial is None and self._streaming is not None:
            self._partial = PartialGradients(self._streaming)
        if self._states is not None:
            self._states.ring.active = last_microbatch
        self._last = last_microbatch
        self._arrived.clear()

    def after_backward(self, step: int, total_steps: int, last_microbatch: bool,
                       scaler: torch.amp.GradScaler | None = None) -> UpdateInfo | None:
        """What ``StepAfterBackward.after_backward`` does, as far as it has not been done: parameters outside of the blocks."""
        if scaler is not None:
            raise UserError("float16 gradients must be scaled and looked at as a whole before any weight is updated",
                            place="--mixed_precision", remedy="use bf16, or leave --fused_backward_pass and "
                                                              "--blockwise_fused_optimizers out")
        assert (step, last_microbatch) == (self._step, self._last), "begin_microbatch was not called for this micro-batch"
        self._last = None
        if not last_microbatch:
            return None
        for place in self._partial.waiting() if self._partial is not None else ():
            self._update_late(place)
        for unit in self._units:
            self._update(unit)
        norm = math.sqrt(float(self._squares))  # waits for the device
        bad, names = self._bad, self._bad_names
        self._clear()
        if bad is not None or not math.isfinite(norm):
            error = non_finite(math.nan if math.isfinite(norm) else norm, names, step,
                               "weights that come later in the model have had this step already")
            error.weights_touched = True
            raise error
        return UpdateInfo(norm, self._rate)

    def leave_out(self, step: int, total_steps: int) -> UpdateInfo:
        """Update number ``step`` (counted from 0) is not made, or was broken off: whatever gradients there are, are given up."""
        self._boundaries.notice_abort()
        self.abort()
        return UpdateInfo(math.nan, self._first_rate(step, total_steps), skipped=True, left_out=True)

    def enter_backward(self, place: int) -> None:
        if self._partial is not None and place in self._streaming.number:
            self._partial.lend(place)

    def leave_backward(self, place: int) -> None:
        streamed = self._streaming is not None and place in self._streaming.number
        if not self._last:
            if streamed:
                self._partial.keep(place)
            return
        if place in self._arrived:
            self._update_block(place)
        elif streamed and self._partial is not None:  # it ran twice, and autograd waits for its other run; or nothing will come
            self._partial.take_back(place)

    def abort(self) -> None:
        """The step is given up; units that were stepped stay so."""
        self._clear()
        self._last = None

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """As ``Updating.state_dict``. Between steps only; streamed tensors are the host copies."""
        named = super().state_dict()
        if self._states is not None:
            self._states.save(named, self._stepped)
        return named

    def load_state_dict(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """As ``Updating.load_state_dict``. Streamed states pass over the device one parameter at a time."""
        if self._states is not None:
            self._states.forget()
        for parameter in self._loading(state):
            if self._states is not None:
                self._states.load(parameter)

    def detach(self) -> None:
        """Take the hooks off; the optimizer is left as ``StepAfterBackward`` would have it."""
        if self._states is not None:
            super().load_state_dict(self.state_dict())
        for hook in self._hooks:
            hook.remove()
        self._boundaries.listeners.remove(self)
        if self._streaming is not None:
            self._streaming.has_stepper = False
            for ring in self._rings():
                self._streaming.step_rings.remove(ring)

    def _update_block(self, place: int) -> None:
        for unit in self._of_block[place]:
            self._update(unit)
        if self._streaming is not None and place in self._streaming.number:
            if self._partial is not None:
                self._partial.drop(place)
            if self._states is not None:
                self._states.take(place)

    def _update_late(self, place: int) -> None:
        """A streamed block has gradients of earlier micro-batches only: the last one did not use it."""
        self._streaming.enter_backward(place)
        self._partial.lend(place)
        self._update_block(place)
        self._streaming.leave_backward(place)

    def _rings(self) -> list[Ring]:
        return [part.ring for part in (self._partial, self._states) if part is not None]

    def _update(self, unit: _Unit) -> None:
        live = [parameter for parameter in unit.parameters if parameter.grad is not None]
        if not live:
            return
        assert unit.step != self._step, f"{unit.names[0]} would be updated twice in step {self._step}"
        gradients = [parameter.grad for parameter in live]
        if self._average is not None:
            self._average(gradients)
        norm = total_norm(gradients)
        self._squares = self._squares + norm.double().square()
        if self._guard and self._bad is None and not math.isfinite(norm.item()):  # waits for the device
            self._bad = unit
            self._bad_names = [name for name, p in zip(unit.names, unit.parameters, strict=True)
                               if p.grad is not None and not p.grad.isfinite().all()]
        if self._bad is None:
            unit.step = self._step
            addresses = [parameter.data_ptr() for parameter in live]
            with holding(self._optimizer, unit.stepped):
                if self._rounding is not None:
                    self._rounding.step_some(self._calls, self._step, live)
                else:
                    self._calls.step()
            if self._streaming is not None and unit.place in self._streaming.number:
                assert addresses == [parameter.data_ptr() for parameter in live], "the optimizer put weights elsewhere"
                self._streaming.changed(unit.place)
                if self._states is not None:
                    self._states.changed(unit.place)
        for parameter in live:
            parameter.grad = None

    def _hook(self, unit: _Unit, update: bool) -> Callable[[Parameter], None]:
        def run(parameter: Parameter) -> None:
            assert self._last is not None, "begin_microbatch was not called"
            self._arrived.add(unit.place)
            if update and self._last:
                self._update(unit)
        return run

    def _clear(self) -> None:
        """No gradient is left, nothing is known about the next step."""
        for unit in self._units:
            for parameter in unit.parameters:
                parameter.grad = None
            unit.step = -1
        if self._partial is not None:
            self._partial.drop_all()
        self._squares, self._bad, self._bad_names, self._step = 0.0, None, [], -1

    def _make_units(self, unit: str, boundaries: Boundaries) -> list[_Unit]:
        place_of = {id(p): place for place, block in enumerate(boundaries.blocks) for p in block.parameters()}
        members: dict[Any, list[tuple[str, Parameter]]] = {}
        for group in self._groups:
            for name, parameter in group.params:
                members.setdefault(name if unit == "parameter" else place_of.get(id(parameter)), []).append((name, parameter))
        return [self._unit(tuple(pairs), place_of.get(id(pairs[0][1]))) for pairs in members.values()]

    def _unit(self, pairs: tuple[tuple[str, Parameter], ...], place: int | None) -> _Unit:
        names = {name for name, _ in pairs}
        stepped = [[self._stepped[name] for name, _ in group.params if name in names] for group in self._groups]
        return _Unit(tuple(name for name, _ in pairs), tuple(parameter for _, parameter in pairs), stepped, place)

    def _stream_states(self) -> StreamedStates:
        group_of = {id(p): number for number, held in enumerate(self._optimizer.param_groups) for p in held["params"]}
        name_of = {id(p): name for group in self._groups for name, p in group.params}
        before = self._shared.copy()

        def step(like: Parameter, trial: Parameter) -> Mapping[str, Any]:
            if made := self._optimizer.state.get(like):  # some make it when they are built
                self._optimizer.state[trial] = {key: value.clone() if isinstance(value, Tensor) else value
                                                for key, value in made.items()}
            groups = range(len(self._optimizer.param_groups))
            with holding(self._optimizer, [[trial] if number == group_of[id(like)] else [] for number in groups]):
                self._optimizer.step()
            self._shared.put_back(before)
            return self._optimizer.state.pop(trial, {})  # plain SGD keeps nothing

        stepped = [[self._stepped[name_of[id(p)]] for p in trained] for trained in self._streaming.trained]
        return StreamedStates(self._streaming, self._optimizer, stepped, probe_states(step))


def average_over_ranks(gradients: Sequence[Tensor]) -> None:
    """All-reduce over the default process group; one after the other, so that the ranks need no more memory for it."""
    ranks = torch.distributed.get_world_size()
    for work in [torch.distributed.all_reduce(gradient, async_op=True) for gradient in gradients]:
        work.wait()
    torch._foreach_div_(list(gradients), ranks)

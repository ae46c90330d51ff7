"""Optimizer states that live on the host beside the weights of their streamed block and come to the device for its step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from library.memory.layout import lay_out
from library.memory.streaming import Streaming

Specs = dict[str, tuple[tuple[int, ...], torch.dtype]]
"""Key of a state tensor -> its shape and dtype."""


class StreamedStates:
    """The states of ``stepped[number]``, the parameters (or their stand-ins) that train in streamed block ``number``.

    Any optimizer's: ``probe`` tells which tensors it will keep for a parameter. Single numbers (step counters) and tensors
    that parameters share (8-bit quantization maps) stay where they are. Between steps ``optimizer.state`` shows whatever is in
    the slots; ``save`` and ``load`` are for outside.
    """

    def __init__(self, streaming: Streaming, optimizer: torch.optim.Optimizer, stepped: Sequence[Sequence[Parameter]],
                 probe: Callable[[Parameter], Specs]):
        self._streaming, self._optimizer = streaming, optimizer
        self._keys: list[list[tuple[Parameter, str]]] = []
        layouts, host = [], []
        for parameters in stepped:
            specs = {(p, key): spec for p in parameters for key, spec in probe(p).items()}
            self._keys.append(list(specs))
            layouts.append(lay_out(specs.values()))
            host.append(streaming.transport.host(layouts[-1].size))
        self._indices: dict[int, list[tuple[int, int]]] = {}
        for number, keys in enumerate(self._keys):
            for index, (parameter, _) in enumerate(keys):
                self._indices.setdefault(id(parameter), []).append((number, index))
        self.sizes = tuple(layout.size for layout in layouts)
        self.ring = streaming.make_ring(host, self.sizes)
        self._host = [layout.host_views(region) for layout, region in zip(layouts, self.ring.host, strict=True)]
        self._device = [layout.views(region) for layout, region in zip(layouts, self.ring.device, strict=True)]
        streaming.step_rings.append(self.ring)

    def changed(self, place: int) -> None:
        """Parameters of the block, which is running backward, were stepped."""
        self.ring.changed(self._streaming.number[place])

    @torch.no_grad()
    def take(self, place: int) -> None:
        """All steps of the block are done: move the states that the optimizer has just made to where they belong."""
        number = self._streaming.number[place]
        for (parameter, key), slot in zip(self._keys[number], self._device[number], strict=True):
            state = self._optimizer.state.get(parameter)
            if state and state[key] is not slot:  # never again for an optimizer that works in place
                slot.copy_(state[key])
                state[key] = slot

    def save(self, named: Mapping[str, dict[str, Any]], stepped: Mapping[str, Parameter]) -> None:
        """Let ``named`` (of ``Updating.state_dict``) show the host copies, brought up to date."""
        self._streaming.settle()
        for name, parameter in stepped.items():
            for number, index in self._indices.get(id(parameter), ()):
                key = self._keys[number][index][1]
                if key in named[name]:
                    named[name][key] = self._host[number][index]

    def forget(self) -> None:
        """All of it is about to be loaded."""
        self._streaming.settle()
        self.ring.forget()

    @torch.no_grad()
    def load(self, parameter: Parameter) -> None:
        """Take what was put into ``optimizer.state`` for it from outside."""
        for number, index in self._indices.get(id(parameter), ()):
            key, state = self._keys[number][index][1], self._optimizer.state.get(parameter)
            if state and key in state:
                self._host[number][index].copy_(state[key])
                state[key] = self._device[number][index]
                self.ring.filled[number] = True


def probe_states(step: Callable[[Parameter, Parameter], Mapping[str, Any]]) -> Callable[[Parameter], Specs]:
    """``step(like, trial)`` steps a throw-away parameter in the group of ``like`` and returns its state. Asked once per shape
    and dtype."""
    known: dict[tuple, Specs] = {}

    def probe(parameter: Parameter) -> Specs:
        kind = (parameter.shape, parameter.dtype)
        if kind not in known:
            first, second = (_tensors(step(parameter, _trial(parameter))) for _ in range(2))
            # What two parameters have at one address belongs to the optimizer.
            known[kind] = {key: (tuple(value.shape), value.dtype) for key, value in first.items()
                           if value.data_ptr() != second[key].data_ptr()}
        return known[kind]
    return probe


def _trial(parameter: Parameter) -> Parameter:
    trial = Parameter(torch.zeros(parameter.shape, dtype=parameter.dtype, device=parameter.device))
    trial.grad = torch.zeros_like(trial)
    return trial


def _tensors(state: Mapping[str, Any]) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if isinstance(value, Tensor) and value.numel() > 1}

"""Gradients of streamed blocks between the micro-batches of a step: pinned host memory keeps the sums so far.

For each further micro-batch they come to the device with their block and autograd adds to them there, in the order and
precision in which it would have added to resident ones.
"""

from __future__ import annotations

import torch

from library.memory.layout import lay_out_tensors
from library.memory.streaming import Streaming


class PartialGradients:
    """One ring beside that of the weights. ``block`` is a place in the list of all blocks, a streamed one."""

    def __init__(self, streaming: Streaming):
        layouts = [lay_out_tensors(trained) for trained in streaming.trained]
        sizes = [layout.size for layout in layouts]
        self.ring = streaming.make_ring([streaming.transport.host(size) for size in sizes], sizes)
        self._views = [layout.views(region) for layout, region in zip(layouts, self.ring.device, strict=True)]
        self._parameters = streaming.trained
        self._held: list[list[bool]] = [[False] * len(trained) for trained in streaming.trained]  # whose sum has begun
        self._number = streaming.number
        streaming.step_rings.append(self.ring)

    def lend(self, block: int) -> None:
        """Give the sums so far to the parameters of the block, which is about to run backward."""
        number = self._number[block]
        for parameter, view, held in zip(self._parameters[number], self._views[number], self._held[number], strict=True):
            if held:
                parameter.grad = view

    def take_back(self, block: int) -> None:
        """The opposite of ``lend``, where nothing was added."""
        for parameter in self._parameters[self._number[block]]:
            parameter.grad = None

    def waiting(self) -> list[int]:
        """Blocks with sums that are not used up."""
        return [block for block, number in self._number.items() if any(self._held[number])]

    @torch.no_grad()
    def keep(self, block: int) -> None:
        """Take the gradients of the block, which has run backward; they are copied out when it is left."""
        number = self._number[block]
        targets, sources = [], []
        for index, (parameter, view) in enumerate(zip(self._parameters[number], self._views[number], strict=True)):
            gradient, parameter.grad = parameter.grad, None
            if gradient is None:
                continue
            if gradient.data_ptr() != view.data_ptr():
                targets.append(view)
                sources.append(gradient)
            self._held[number][index] = True
        if any(self._held[number]):
            self.ring.changed(number)
        if targets:
            torch._foreach_copy_(targets, sources)

    def drop(self, block: int) -> None:
        """The sums of the block are used up."""
        number = self._number[block]
        self._held[number] = [False] * len(self._held[number])
        self.ring.drop(number)

    def drop_all(self) -> None:
        for block in self._number:
            self.drop(block)

"""When the model goes from one block to the next, forward and backward: what streaming and in-backward steps listen to.

Facts used (tests/unit/test_memory_boundaries.py holds torch to them): a node behind the outputs of a block runs backward when
the gradients of all of them are there and before anything of the block is recomputed. Autograd runs nodes that are ready in the
reverse order of their creation and gradient accumulation first of all; so when it enters a block, everything that was
created by later blocks has run, their parameters' gradients included.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn


class Listener:
    """Places are those in the list of blocks."""

    def enter_forward(self, place: int) -> None:
        """The block is about to run forward, not as part of a recompute."""

    def enter_backward(self, place: int) -> None:
        """The block is about to be recomputed and to run backward."""

    def leave_backward(self, place: int) -> None:
        """All gradients of the block's parameters are there. The last one comes at the end of ``backward()``."""

    def abort(self) -> None:
        """The backward pass was broken off by an exception. Noticed when the next pass begins."""


class _Door(torch.autograd.Function):
    """Hands the outputs of a block on as they are, and tells when their gradients come back, all of them, before the block's
    own backward pass.

    torch's full backward pre-hook does the same, but for blocks called with positional inputs it puts such a node in front of
    them too: gradients of what several blocks read are then added up in another order than without hooks, and the last bits
    of a U-Net's gradients differ.
    """

    @staticmethod
    def forward(ctx: Any, tell: Callable[[], None], *outputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.tell = tell
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(output for output in outputs if not output.requires_grad))
        return outputs

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        ctx.tell()
        return None, *gradients


class Boundaries:
    """Tells ``listeners``: in their order on entering, in reverse on leaving. ``detach()`` takes the hooks off."""

    def __init__(self, blocks: Sequence[nn.Module]):
        self.blocks = tuple(blocks)
        self.listeners: list[Listener] = []
        self._task: int | None = None  # autograd's number of the backward pass under way
        self._running: int | None = None
        self._hooks = []
        for place, block in enumerate(self.blocks):
            self._hooks.append(block.register_forward_pre_hook(partial(self._forward, place), with_kwargs=True))
            self._hooks.append(block.register_forward_hook(partial(self._leave_forward, place)))

    def detach(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def notice_abort(self) -> None:
        """A new step begins: if the last backward pass did not come to its end, tell so now."""
        if self._task is not None:
            self._abort()

    def _forward(self, place: int, block: nn.Module, args: tuple, kwargs: dict) -> None:
        if torch._C._current_graph_task_id() != -1:
            return  # recomputed by the model's own means: the block was entered backward already
        self.notice_abort()
        for listener in self.listeners:
            listener.enter_forward(place)

    def _leave_forward(self, place: int, block: nn.Module, args: tuple, output: Any) -> Any:
        if not torch.is_grad_enabled() or torch._C._current_graph_task_id() != -1:
            return None
        parts = output if isinstance(output, tuple) else (output,)
        assert all(part is None or isinstance(part, torch.Tensor) for part in parts), \
            f"a {type(block).__name__} returns {[type(part).__name__ for part in parts]}: its backward pass cannot be seen"
        tensors = [part for part in parts if part is not None]
        if not any(tensor.requires_grad for tensor in tensors):
            return None
        passed = iter(_Door.apply(partial(self._backward, place), *tensors))
        handed = tuple(part if part is None else next(passed) for part in parts)
        return handed if isinstance(output, tuple) else handed[0]

    def _backward(self, place: int) -> None:
        task = torch._C._current_graph_task_id()
        if task != self._task:
            self.notice_abort()
            self._task = task
            torch.autograd.Variable._execution_engine.queue_callback(self._end)  # not called after an exception
        elif self._running != place:
            self._leave()
        self._running = place
        for listener in self.listeners:
            listener.enter_backward(place)

    def _end(self) -> None:
        self._leave()
        self._task = self._running = None

    def _leave(self) -> None:
        for listener in reversed(self.listeners):
            listener.leave_backward(self._running)

    def _abort(self) -> None:
        self._task = self._running = None
        for listener in self.listeners:
            listener.abort()

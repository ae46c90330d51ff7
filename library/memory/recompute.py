"""Activations of blocks: recomputed in the backward pass (Chen et al. 2016), in part or in whole, and their inputs offloaded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from library.memory.offload import Offload

# Products of matrices, convolutions and attention: most of the time and few of the bytes. All else is cheap to do again.
_KEPT = frozenset(
    getattr(packet, overload)
    for name in ("mm", "addmm", "bmm", "baddbmm", "convolution", "_scaled_mm", "_scaled_dot_product_flash_attention",
                 "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_efficient_attention",
                 "_scaled_dot_product_cudnn_attention", "_scaled_dot_product_fused_attention_overrideable",
                 "_flash_attention_forward", "_efficient_attention_forward")
    if (packet := getattr(torch.ops.aten, name, None)) is not None  # the list of kernels differs between versions
    for overload in packet.overloads() if overload != "out"
)


class Recompute:
    """Recomputes ``blocks`` from outside, so that it works for modules with and without support of their own.

    Only a block's ``forward`` is replaced on the instance: parameter names, hooks and state dicts stay as they are.
    Acts only while gradients are enabled. ``detach()`` puts the blocks back.

    ``selective``: outputs of matrix products and attention are kept, the rest is done again: about the speed of keeping all
    for about half the memory. ``offload``: the inputs of the blocks are kept there instead of on the device.
    """

    def __init__(self, blocks: Sequence[nn.Module], selective: bool = False, offload: Offload | None = None):
        self.blocks = tuple(blocks)
        for block in self.blocks:
            block.forward = _recomputed(block.forward, selective, offload)

    def detach(self) -> None:
        for block in self.blocks:
            del block.forward  # the class's own forward shows again


def every(blocks: Sequence[nn.Module], step: int) -> list[nn.Module]:
    """Each ``step``-th block, the last one included when it falls on one: what to recompute when there is room for the rest."""
    assert step >= 1
    return list(blocks[step - 1::step])


def _recomputed(forward: Callable, selective: bool, offload: Offload | None) -> Callable:
    contexts = {"context_fn": partial(create_selective_checkpoint_contexts, _policy)} if selective else {}

    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        if offload is not None and kwargs:
            # checkpoint() keeps what it gets by keyword in its own closure, where nobody can take it away.
            names, args, kwargs = tuple(kwargs), (*args, *kwargs.values()), {}
            function = partial(_by_keyword, forward, len(args) - len(names), names)
        else:
            function = forward
        with offload.inputs() if offload is not None else nullcontext():
            # Blocks of a denoiser draw no random numbers, so there is no generator state to save for each of them.
            return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False, **contexts, **kwargs)

    return run


def _by_keyword(forward: Callable, positional: int, names: Sequence[str], *args: Any) -> Any:
    return forward(*args[:positional], **dict(zip(names, args[positional:], strict=True)))


def _policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE
